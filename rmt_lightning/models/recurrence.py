"""The only loop over segments. Truncation, checkpointing and streaming live here.

Shapes: B batch, T segments, S text tokens of a segment, D width of the hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rmt_lightning.core.errors import UserError

State = TypeVar("State")
Piece = TypeVar("Piece")


class Segment(NamedTuple):
    """One segment of a batch of texts.

    Attributes:
        input_ids: (B, S) tokens of the text, without special tokens.
        attention_mask: (B, S), 1 for text and 0 for padding, text first; None if every row is full.
        words: (B, S, E), or with special tokens beside them: what the model has looked up beforehand, if it has.
    """

    input_ids: Tensor
    attention_mask: Tensor | None = None
    words: Tensor | None = None

    def last_token(self, hidden: Tensor) -> Tensor:
        """What stands at the last token of each row: (B, S, D) -> (B, D)."""
        if self.attention_mask is None:
            return hidden[:, -1]
        last = (self.attention_mask.sum(dim=1) - 1).clamp(min=0)
        return hidden[torch.arange(len(hidden), device=hidden.device), last]


def text_mask(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """(B, N), 1 for text and 0 for padding of plain ids (B, N); without a mask, all is text.

    Raises:
        UserError: if there are no such ids, or the mask is another.
    """
    if not isinstance(input_ids, Tensor) or input_ids.dim() != 2 or input_ids.dtype not in (torch.long, torch.int):
        raise UserError("input_ids: give a tensor of whole numbers, (texts, tokens)")
    if attention_mask is None:
        return torch.ones_like(input_ids)
    if (
        not isinstance(attention_mask, Tensor)
        or attention_mask.shape != input_ids.shape
        or not ((attention_mask == 0) | (attention_mask == 1)).all()
    ):
        raise UserError(f"attention_mask: give a tensor of 1 for text and 0 for padding, {tuple(input_ids.shape)}")
    return attention_mask.long()


def first_with_gradient(num_segments: int, bptt_depth: int) -> int:
    """The first segment that gradients reach which flow back over so many borders from the end; -1 for all of them."""
    return max(0, num_segments - 1 - bptt_depth) if bptt_depth >= 0 else 0


def unroll(
    step: Callable[[Piece, State], tuple[Tensor, State]],
    segments: Iterable[Piece],
    state: State,
    bptt_depth: int = -1,
    checkpointing: bool = False,
) -> Iterator[tuple[Tensor, State]]:
    """Run a segment model over segments in order and yield (hidden, state) after each.

    For a loss on the last segment, gradients flow back over the last `bptt_depth` borders between segments and no
    further; earlier segments build no graph (truncated backpropagation through time, RMT-2022, section 3.2).
    Nothing is kept once it has been yielded, so without gradients any number of segments takes constant memory.

    Args:
        step: the segment model, `(segment, state) -> (hidden, state)`, or any function of such a form.
        segments: any iterable; truncation needs one whose length is known.
        state: what the first segment is given.
        bptt_depth: number of borders; -1 for all of them.
        checkpointing: forget the activations of a segment and compute them again in the backward pass. Gradients are
            the same; memory grows by one state a segment instead of one forward pass. Those of the last segment are
            kept, if their number is known, for the backward pass begins with it.

    Raises:
        TypeError: if truncation is asked for and the number of segments is not known.
    """
    last = len(segments) - 1 if isinstance(segments, Sized) else None
    first = 0
    if bptt_depth >= 0 and torch.is_grad_enabled():
        if not isinstance(segments, Sized):
            raise TypeError("bptt_depth needs segments whose number is known; pass a list, or bptt_depth=-1")
        first = first_with_gradient(len(segments), bptt_depth)
    for position, segment in enumerate(segments):
        with torch.set_grad_enabled(torch.is_grad_enabled() and position >= first):
            arguments: tuple[Any, ...] = (segment, state)
            if checkpointing and torch.is_grad_enabled() and position != last:
                # Only the non-reentrant kind survives DDP with a varying number of segments.
                hidden, state = checkpoint(step, *arguments, use_reentrant=False)
            else:
                hidden, state = step(*arguments)
        yield hidden, state
