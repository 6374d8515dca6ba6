"""What every model that reads a text segment by segment has in common.

Shapes: B batch, T segments, S text tokens of a segment, N tokens of a whole text, D width of the hidden states.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from itertools import chain, tee
from typing import Generic

import torch
from torch import Tensor, nn

from rmt_lightning.models.pretrained import SavedModel
from rmt_lightning.models.recurrence import Segment, State, unroll


class SegmentModel(nn.Module, SavedModel, ABC, Generic[State]):
    """A function `(segment, state) -> (hidden, state)` with a first state, and the ways to feed it a text.

    The state is a value, a tensor or a tree of tensors whose first dimension is the batch, never an attribute.
    To add a model, write its `initial_state`, `step` and `readout`, and one yaml in conf/model/. Its constructor is
    given what it asks for by name: `encoder`, `decoder`, `tokenizer`. So that the model can be saved, all else that the
    constructor takes is plain values, `tokenizer` is kept, and `architecture` tells the config of what is inside.

    Args:
        text_length: S, how much of a segment is text.
        width: D of what `readout` returns.
        bptt_depth: over how many borders between segments gradients flow back; -1 for all of them.
        gradient_checkpointing: compute activations again in the backward pass instead of keeping them.
    """

    def __init__(
        self, text_length: int, width: int, bptt_depth: int = -1, gradient_checkpointing: bool = False
    ) -> None:
        super().__init__()
        self.text_length = text_length
        self.width = width
        self.bptt_depth = bptt_depth
        self.gradient_checkpointing = gradient_checkpointing

    @abstractmethod
    def initial_state(self, batch_size: int) -> State:
        """The state before the first segment."""

    @abstractmethod
    def step(self, segment: Segment, state: State) -> tuple[Tensor, State]:
        """Read one segment of at most `text_length` tokens a row. A row without text leaves its state as it is."""

    @abstractmethod
    def readout(self, hidden: Tensor, segment: Segment) -> Tensor:
        """What a classifier reads after the last segment: (B, D)."""

    def forward(
        self, input_ids: Tensor | Iterable[Tensor], attention_mask: Tensor | None = None, state: State | None = None
    ) -> tuple[Tensor, State]:
        """Read a whole input.

        Args:
            input_ids: (B, T, S) text cut into full segments; or (B, N) plain ids without special tokens, of any length,
                padded anywhere, which are cut so that every row ends with its last segment; or an iterable of (B, S).
            attention_mask: (B, N), 1 for text; plain ids only.
            state: what to start from; by default `initial_state`.

        Returns:
            Hidden states of the last segment and the state after it. A row's result does not depend on the others.
        """
        for _segment, hidden, after in self._read(input_ids, attention_mask, state):  # noqa: B007
            pass
        return hidden, after

    def encode(self, input_ids: Tensor | Iterable[Tensor], attention_mask: Tensor | None = None) -> Tensor:
        """Read a whole input, given as to `forward`, and return what a classifier reads at its end: (B, D)."""
        for segment, hidden, _ in self._read(input_ids, attention_mask, None):  # noqa: B007
            pass
        return self.readout(hidden, segment)

    def _read(
        self, input_ids: Tensor | Iterable[Tensor], attention_mask: Tensor | None, state: State | None
    ) -> Iterator[tuple[Segment, Tensor, State]]:
        """Yield each segment with the hidden states and the state after it; nothing is kept of those before."""
        if isinstance(input_ids, Tensor):
            batch_size = len(input_ids)
            segments: Iterable[Segment] = (
                self.cut(input_ids, attention_mask)
                if input_ids.dim() == 2
                else [Segment(ids) for ids in input_ids.unbind(dim=1)]
            )
            to_read = segments
        else:
            stream = iter(input_ids)
            first = next(stream)
            batch_size = len(first)
            segments, to_read = tee(Segment(ids) for ids in chain([first], stream))
        if state is None:
            state = self.initial_state(batch_size)
        readings = unroll(self.step, to_read, state, self.bptt_depth, self.gradient_checkpointing)
        for segment, (hidden, after) in zip(segments, readings, strict=True):
            # Truncation may leave a trained first state without gradient.
            yield segment, touch(hidden, self.trained_state()), after

    def trained_state(self) -> list[nn.Parameter]:
        """The parameters that only `initial_state` uses."""
        return []

    def cut(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> list[Segment]:
        """Cut plain ids (B, N) into segments, counted from the end, where the question is: only the first may be short.

        Rows shorter than the longest one begin with empty segments, which leave their state untouched.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        length = max(self.text_length, -(-input_ids.shape[1] // self.text_length) * self.text_length)
        missing = length - input_ids.shape[1]
        ids = nn.functional.pad(input_ids, (missing, 0))
        mask = nn.functional.pad(attention_mask.long(), (missing, 0))
        # Padding to the front of the row, then, within each segment, to its end.
        order = mask.argsort(dim=1, stable=True)
        ids, mask = ids.gather(1, order), mask.gather(1, order)
        segments = []
        for ids_s, mask_s in zip(ids.split(self.text_length, 1), mask.split(self.text_length, 1), strict=True):
            order = mask_s.argsort(dim=1, descending=True, stable=True)
            segments.append(Segment(ids_s.gather(1, order), mask_s.gather(1, order)))
        return segments


def touch(hidden: Tensor, parameters: Iterable[nn.Parameter]) -> Tensor:
    """Give parameters that a loss may not need a gradient of zero: without one DDP averages wrongly in silence."""
    if hidden.requires_grad:
        for parameter in parameters:
            hidden = hidden + 0 * parameter.sum()
    return hidden
