"""What models have in common that keep a memory in every layer of a backbone.

Shapes: B batch, M memory tokens, G tokens that are read at once, L layers, E width of the embeddings, D width of the
layers.
"""

from __future__ import annotations

from abc import abstractmethod
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rmt_lightning.core.errors import UserError
from rmt_lightning.models import state as tree
from rmt_lightning.models.backbone import Layers, Transformer, alike, tried
from rmt_lightning.models.decoder import Decoder, SegmentCache
from rmt_lightning.models.encoder import Encoder
from rmt_lightning.models.frame import DecoderFrame, FramedModel, frame_for
from rmt_lightning.models.layered import LayeredModel, Schedule
from rmt_lightning.models.recurrence import Segment
from rmt_lightning.models.segment_model import SegmentModel


class LayerState(NamedTuple):
    """What each layer has left.

    Attributes:
        layers: L trees of (B, …).
    """

    layers: tuple[Any, ...]


class Shared(NamedTuple):
    """What all layers are told of the tokens that they read.

    Attributes:
        parts: of the backbone, told what sees what.
        memory: where memory tokens stand among them.
        written: those that the layers' next memories come from.
    """

    parts: Layers
    memory: tuple[slice, ...]
    written: slice


class OpenSegment(SegmentCache):
    """A segment that is read piece by piece, and the state that it has begun with."""

    state: LayerState


class LayerMemory(FramedModel[LayerState], LayeredModel[LayerState]):
    """A backbone each of whose layers has a memory of its own.

    What a layer reads and writes is its own: nothing that a segment leaves goes to another layer.

    Args:
        backbone: an encoder, or a causal language model.
        segment_length: how many tokens the backbone sees of each segment.
        causal_frame: where memory stands if the backbone is causal, and how much of it there is.
        bptt_depth: over how many borders between segments gradients flow back; -1 for all of them.
        gradient_checkpointing: compute activations again in the backward pass instead of keeping them.

    Raises:
        UserError: if segment_length exceeds the backbone's positions or leaves no room for text, or if the backbone's
            layers cannot be run one by one.

    Attributes:
        scales: L standard deviations of what the layers are given of some words.
    """

    def __init__(
        self,
        backbone: Encoder | Decoder,
        segment_length: int,
        causal_frame: DecoderFrame,
        bptt_depth: int,
        gradient_checkpointing: bool,
    ) -> None:
        frame = frame_for(backbone, causal_frame)
        super().__init__(backbone, frame, segment_length, bptt_depth, gradient_checkpointing)
        self.memory_size = causal_frame.written
        self.transformer = backbone
        self.scales = self._try_layers()

    def _try_layers(self) -> list[float]:
        with tried(self.backbone.model):
            segment = Segment(self.backbone.some_words(min(self.text_length, 6)))
            words = self.words(segment)
            parts = self.backbone.apart(
                *self.frame.inputs(segment, words, words[:, :1].expand(-1, self.memory_size, -1))
            )
            hidden, scales = parts.hidden, []
            for layer in parts.steps:
                scales.append(float(hidden.std()))
                hidden = layer(hidden)
            return scales

    def choose(self, schedule: Schedule) -> None:
        super().choose(schedule)
        if schedule != "diagonal":
            return
        words = self.backbone.some_words(min(self.text_length, 6))
        segments = [Segment(words), Segment(words.flip(0))]
        # Families fail in ways of their own.
        with tried(self.backbone.model), suppress(Exception):
            found, expected = (
                list(run(self, segments, self.initial_state(2)))[-1][0] for run in (LayeredModel.run, SegmentModel.run)
            )
            if alike(found, expected):
                return
        raise UserError(
            f"model.schedule={schedule}: the layers of {self.backbone.model.config.model_type} differ in more than "
            "their weights, so they cannot be run at once; choose horizontal or vertical"
        )

    @property
    def backbone(self) -> Transformer:
        return self.transformer

    @abstractmethod
    def memory_tokens(self, words: Tensor) -> Tensor:
        """The memory tokens that stand beside words, as the backbone's embedding is given them: (B, M, E)."""

    def enter(self, segment: Segment, state: LayerState) -> tuple[Tensor, Shared]:
        words, layout = self.words(segment), self.layout(segment.input_ids.shape[1])
        parts = self.backbone.apart(*self.frame.inputs(segment, words, self.memory_tokens(words)))
        memory = tuple(layout.place(name) for name, _ in layout.blocks if name.endswith("memory"))
        return parts.hidden, Shared(parts, memory, layout.place(layout.written))

    def leave(
        self, hidden: Tensor, layers: tuple[Any, ...], state: LayerState, shared: Shared
    ) -> tuple[Tensor, LayerState]:
        length = hidden.shape[1] - sum(size for _, size in self.layout(0).blocks)
        return shared.parts.finish(hidden)[:, self.frame.kept(length)], LayerState(layers)

    def open_segment(self) -> OpenSegment | None:
        """What holds a segment that is read token by token; None if the backbone reads whole ones only."""
        # A subclass may read segments in a way of its own.
        same = type(self).step is SegmentModel.step and type(self).read_segment is LayeredModel.read_segment
        reads = isinstance(self.backbone, Decoder) and self.backbone.reads_pieces(self.segment_length)
        return OpenSegment(self.segment_length) if same and reads else None

    def continue_segment(
        self, input_ids: Tensor, start: Tensor, state: LayerState | None, cache: OpenSegment
    ) -> Tensor:
        """Read some tokens of a segment: the first, or more.

        Args:
            input_ids: (B, G).
            start: (B, 1), how many tokens of the segment's text come before them.
            state: that before the segment, if that of any row begins here; None otherwise.
            cache: what has been read of the segment.

        Returns:
            Their hidden states (B, G, D).
        """
        frame, words = self._causal_frame, self.embed(input_ids)
        size = 0
        if state is not None:
            cache.state, size = state, frame.read
        places = frame.read + start + torch.arange(words.shape[1], device=words.device)
        before, seen = frame.memory_from(0, size, words)
        read = torch.cat([self.memory_tokens(words)[:, :size], words], dim=1)
        given = read, torch.cat([before, places], dim=1), torch.cat([seen, places + 1], dim=1), cache
        hidden, _ = self._read_on(*given, memory=slice(0, size), written=slice(0))
        return hidden[:, size:]

    def close_segment(self, state: LayerState, cache: OpenSegment) -> LayerState:
        """The next state, after a full segment that is in the cache and has begun with `state`.

        Text does not see the write memory, so that can be read after it.
        """
        frame, memory = self._causal_frame, slice(0, self.memory_size)
        rows = tree.leaves(state)[0]
        words = self.memory_tokens(self.embed(rows.new_zeros(len(rows), 0, dtype=torch.long)))
        places, seen = frame.memory_from(frame.read + self.text_length, self.memory_size, words)
        cache.state = state
        return self._read_on(words, places, seen, cache, memory=memory, written=memory)[1]

    def _read_on(
        self, embeddings: Tensor, places: Tensor, seen: Tensor, cache: OpenSegment, memory: slice, written: slice
    ) -> tuple[Tensor, LayerState]:
        """Read some tokens of an open segment, of which some are memory: hidden states, and what is written."""
        decoder = self.backbone
        assert isinstance(decoder, Decoder)
        parts = decoder.go_on_apart(embeddings, places, seen, cache)
        hidden, layers = self.through(parts.hidden, cache.state.layers, Shared(parts, (memory,), written))
        return parts.finish(hidden), LayerState(layers)

    @property
    def _causal_frame(self) -> DecoderFrame:
        assert isinstance(self.frame, DecoderFrame), "only text of a causal model is read piece by piece"
        return self.frame
