"""What every model that reads a text segment by segment has in common.

Shapes: B batch, T segments, S text tokens of a segment, N tokens of a whole text, or those looked up of a segment, E
width of the embeddings, D width of the hidden states.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, tee
from typing import Any, Generic, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from rmt_lightning.core.errors import UserError
from rmt_lightning.models import state as tree
from rmt_lightning.models.pretrained import SavedModel
from rmt_lightning.models.recurrence import Segment, State, text_mask, unroll


class Reading(NamedTuple, Generic[State]):
    """What is known after a segment."""

    segment: Segment
    hidden: Tensor
    state: State


class SegmentModel(nn.Module, SavedModel, ABC, Generic[State]):
    """A function `(segment, state) -> (hidden, state)` with a first state, and the ways to feed it a text.

    The state is a value, a tensor or a tree of tensors whose first dimension is the batch, never an attribute.
    To add a model, write its `initial_state` and `read_segment`, and one yaml in conf/model/; `readout` too, if its
    answer is not read at the last token. Its constructor is given what it asks for by name: `encoder`, `decoder`,
    either of them as `backbone`, `tokenizer`. So that the model can be saved, all else that the constructor takes is
    plain values, `tokenizer` is kept, and `architecture` tells the config of what is inside.

    Args:
        text_length: S, how much of a segment is text.
        width: D of what `readout` returns.
        bptt_depth: over how many borders between segments gradients flow back; -1 for all of them.
        gradient_checkpointing: compute activations again in the backward pass instead of keeping them.

    Raises:
        UserError: if there is no room for text, or no such number of borders.
    """

    # Whether the state becomes larger with each segment: filled up with zeros at its end, (B, N, …), it is the same.
    grows = False

    def __init__(
        self, text_length: int, width: int, bptt_depth: int = -1, gradient_checkpointing: bool = False
    ) -> None:
        super().__init__()
        if not isinstance(text_length, int) or text_length < 1:
            raise UserError("segment_length: leaves no room for text; give a larger whole number")
        if not isinstance(bptt_depth, int) or bptt_depth < -1:
            raise UserError(f"bptt_depth={bptt_depth}: is no number of borders; give one, or -1 for all of them")
        self.text_length = text_length
        self.width = width
        self.bptt_depth = bptt_depth
        self.gradient_checkpointing = gradient_checkpointing

    @property
    def max_segments(self) -> int | None:
        """The longest input that can be read; None: there is no end."""
        return None

    def fitting(self, key: str, lengths: Sequence[int]) -> list[int]:
        """Those of the lengths, in segments, that the model can read, each once.

        Raises:
            UserError: naming the setting `key`, if it can read none of them.
        """
        longest = self.max_segments
        fitting = [length for length in dict.fromkeys(lengths) if longest is None or length <= longest]
        if lengths and not fitting:
            raise UserError(
                f"{key}={','.join(map(str, lengths))}: too long for positions; at most {longest} segments of "
                f"{self.text_length} tokens fit; give {longest} or less"
            )
        return fitting

    @abstractmethod
    def initial_state(self, batch_size: int) -> State:
        """The state before the first segment."""

    @abstractmethod
    def read_segment(self, segment: Segment, state: State) -> tuple[Tensor, State]:
        """What `step` does, but for rows without text: whatever comes out of them is dropped."""

    def step(self, segment: Segment, state: State) -> tuple[Tensor, State]:
        """Read one segment.

        Args:
            segment: at most `text_length` tokens a row. A row without text keeps its state.
            state: what the segment before has left.

        Returns:
            Hidden states, in what order is the model's own, and the next state.
        """
        hidden, after = self.read_segment(segment, state)
        if segment.attention_mask is None:
            return hidden, after
        return hidden, tree.where(segment.attention_mask.any(dim=1), after, state)

    def readout(self, hidden: Tensor, segment: Segment) -> Tensor:
        """What a classifier reads after the last segment, (B, D): by default what stands at each row's last token."""
        return segment.last_token(hidden)

    @property
    def predicts(self) -> bool:
        """Whether it is causal, and has `logits`."""
        return type(self).logits is not SegmentModel.logits

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the token that comes next, if the model is causal: (B, S, D) of `step` -> (B, S, V)."""
        raise NotImplementedError

    def forward(
        self,
        input_ids: Tensor | Iterable[Tensor] | Iterable[Segment],
        attention_mask: Tensor | None = None,
        state: State | None = None,
    ) -> tuple[Tensor, State]:
        """Read a whole input, given as to `read`.

        Returns:
            Hidden states of the last segment and the state after it. A row's result does not depend on the others.
        """
        for reading in self.read(input_ids, attention_mask, state):  # noqa: B007
            pass
        return reading.hidden, reading.state

    def encode(
        self,
        input_ids: Tensor | Iterable[Tensor] | Iterable[Segment],
        attention_mask: Tensor | None = None,
        state: State | None = None,
    ) -> Tensor:
        """Read a whole input, given as to `read`, and return what a classifier reads at its end: (B, D)."""
        for reading in self.read(input_ids, attention_mask, state):  # noqa: B007
            pass
        return self.readout(reading.hidden, reading.segment)

    def read(
        self,
        input_ids: Tensor | Iterable[Tensor] | Iterable[Segment],
        attention_mask: Tensor | None = None,
        state: State | None = None,
    ) -> Iterator[Reading[State]]:
        """Read an input and yield what is known after each segment; nothing is kept of those before.

        Args:
            input_ids: (B, T, S) text cut into full segments; or (B, N) plain ids without special tokens, of any length,
                padded anywhere, which are cut so that every row ends with its last segment; or an iterable of (B, S),
                or of a `Segment` each, where not all rows are full.
            attention_mask: (B, N), 1 for text; plain ids only.
            state: what to start from; by default `initial_state`.

        Raises:
            UserError: if it is none of these.
        """
        batch_size, segments = self._segments(input_ids, attention_mask)
        if isinstance(segments, list):
            to_read: Iterable[Segment] = self.looked_up(segments)
        else:
            segments, to_read = tee(segments)
        if state is None:
            state = self.initial_state(batch_size)
        for segment, (hidden, after) in zip(segments, self.run(to_read, state), strict=True):
            # Truncation may leave a trained first state without gradient.
            yield Reading(segment, touch(hidden, self.trained_state()), after)

    def run(self, segments: Iterable[Segment], state: State) -> Iterator[tuple[Tensor, State]]:
        """Yield what `step` returns for each segment; each is given the state that the one before has left."""
        return unroll(self.step, segments, state, self.bptt_depth, self.gradient_checkpointing)

    def _segments(
        self, input_ids: Tensor | Iterable[Tensor] | Iterable[Segment], attention_mask: Tensor | None
    ) -> tuple[int, list[Segment] | Iterator[Segment]]:
        """B, and the segments of an input, given as to `read`."""
        if isinstance(input_ids, Tensor) and input_ids.dim() != 3:
            return len(input_ids), self.cut(input_ids, attention_mask)
        if attention_mask is not None:
            raise UserError("attention_mask: is for plain ids, (texts, tokens); segments are full, so leave it out")
        segments = map(self._segment, input_ids.unbind(dim=1) if isinstance(input_ids, Tensor) else input_ids)
        if (first := next(segments, None)) is None:
            raise UserError("input_ids: holds no segment; give one at least")
        if isinstance(input_ids, Tensor):
            return len(input_ids), [first, *segments]
        return len(first.input_ids), chain([first], segments)

    def _segment(self, input_ids: Tensor | Segment) -> Segment:
        if isinstance(input_ids, Segment):
            return self._segment(input_ids.input_ids)._replace(attention_mask=input_ids.attention_mask)
        if not isinstance(input_ids, Tensor) or input_ids.dim() != 2 or input_ids.shape[1] > self.text_length:
            raise UserError(
                f"input_ids: a segment has room for {self.text_length} tokens; give tensors (texts, tokens) of no "
                "more, or plain ids (texts, tokens) of any length"
            )
        return Segment(input_ids)

    def looked_up(self, segments: list[Segment]) -> list[Segment]:
        """The same segments, for training with their `words` if the model can make use of them; by default without."""
        return segments

    def trained_state(self) -> list[nn.Parameter]:
        """The parameters that a loss may not reach: if only `initial_state` uses them, or only the next segment."""
        return []

    def saved_state(self, leaves: list[Tensor]) -> list[Tensor]:
        """The `leaves` of a state (models/state.py) as a checkpoint holds them, in the form they have now."""
        return leaves

    def cut(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> list[Segment]:
        """Cut plain ids (B, N) into segments, counted from the end, where the question is: only the first may be short.

        Rows shorter than the longest one begin with empty segments, which leave their state untouched.

        Raises:
            UserError: if these are no plain ids, or the mask is none of theirs.
        """
        attention_mask = text_mask(input_ids, attention_mask)
        length = max(self.text_length, -(-input_ids.shape[1] // self.text_length) * self.text_length)
        missing = length - input_ids.shape[1]
        ids = nn.functional.pad(input_ids, (missing, 0))
        mask = nn.functional.pad(attention_mask, (missing, 0))
        # Padding to the front of the row, then, within each segment, to its end.
        order = mask.argsort(dim=1, stable=True)
        ids, mask = ids.gather(1, order), mask.gather(1, order)
        segments = []
        for ids_s, mask_s in zip(ids.split(self.text_length, 1), mask.split(self.text_length, 1), strict=True):
            order = mask_s.argsort(dim=1, descending=True, stable=True)
            segments.append(Segment(ids_s.gather(1, order), mask_s.gather(1, order)))
        return segments


class WordModel(SegmentModel[State], Generic[State]):
    """A segment model that reads embeddings of words, which can be looked up for all segments at once."""

    @abstractmethod
    def embed(self, input_ids: Tensor) -> Tensor:
        """Word embeddings: (B, N) -> (B, N, E)."""

    def tokens(self, segment: Segment) -> Tensor:
        """The ids of all that is looked up of a segment, (B, N); by default its text."""
        return segment.input_ids

    def looked_up(self, segments: list[Segment]) -> list[Segment]:
        """Look up the words of all segments at once: the gradient of each look-up is as large as the whole table."""
        if not torch.is_grad_enabled() or self.gradient_checkpointing:
            return segments
        tokens = [self.tokens(segment) for segment in segments]
        words = self.embed(torch.cat(tokens, dim=1)).split([ids.shape[1] for ids in tokens], dim=1)
        return [segment._replace(words=found) for segment, found in zip(segments, words, strict=True)]

    def words(self, segment: Segment) -> Tensor:
        """The embeddings (B, N, E) of a segment's `tokens`."""
        return self.embed(self.tokens(segment)) if segment.words is None else segment.words


def state_size(model: SegmentModel[Any]) -> int:
    """How many bytes the first state of a sample takes, of which none is made; 0 if that cannot be told."""
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            return tree.size(model.initial_state(1))
    except Exception:  # a model of one's own may look at values, which there are none of
        return 0


def touch(hidden: Tensor, parameters: Iterable[nn.Parameter]) -> Tensor:
    """Give parameters that a loss may not need a gradient of zero: without one DDP averages wrongly in silence."""
    if hidden.requires_grad:
        for parameter in parameters:
            hidden = hidden + 0 * parameter.sum()
    return hidden
