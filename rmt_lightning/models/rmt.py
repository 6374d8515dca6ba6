"""The Recurrent Memory Transformer: one segment and a memory in, hidden states and the next memory out.

RMT-2022: Bulatov, Kuratov, Burtsev, "Recurrent Memory Transformer", NeurIPS 2022, arXiv 2207.06881 (decoders).
RMT-2023: Bulatov, Kuratov, Burtsev, "Scaling Transformer to 1M tokens and beyond with RMT", arXiv 2304.11062
(encoders).

Shapes: B batch, S text tokens of a segment, M memory tokens, N tokens that the backbone sees, E width of the
embeddings, D width of the hidden states, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Annotated, Generic, Literal

import torch
from annotated_types import Ge
from torch import Tensor, nn

from rmt_lightning.models.backbone import Transformer
from rmt_lightning.models.decoder import Decoder, SegmentCache
from rmt_lightning.models.encoder import Encoder
from rmt_lightning.models.frame import DecoderFrame, EncoderFrame, Frame, FramedModel
from rmt_lightning.models.layered import Schedule, refuse_schedule
from rmt_lightning.models.memory import MemoryTokens
from rmt_lightning.models.recurrence import Segment, State
from rmt_lightning.models.segment_model import SegmentModel
from rmt_lightning.models.update import Replace, Update


class MemoryModel(FramedModel[State], MemoryTokens[State], Generic[State]):
    """A transformer whose memory is M hidden states, which stand among the embeddings of the next segment.

    Args:
        backbone: what reads segments.
        frame: where text and memory stand in them.
        segment_length: how many tokens the backbone sees of each segment.
        memory_size: M.
        update: makes what the next memory comes about by, of its width.
        bptt_depth: over how many borders between segments gradients flow back; -1 for all of them.
        gradient_checkpointing: compute activations again in the backward pass instead of keeping them.
        schedule: any but the vertical one is refused.

    Raises:
        UserError: if segment_length exceeds the backbone's positions or leaves no room for text.
    """

    def __init__(
        self,
        backbone: Transformer,
        frame: Frame,
        segment_length: int,
        memory_size: int,
        update: Callable[[int], Update],
        bptt_depth: int,
        gradient_checkpointing: bool,
        schedule: Schedule,
    ) -> None:
        refuse_schedule(schedule)
        super().__init__(backbone, frame, segment_length, bptt_depth, gradient_checkpointing)
        # The first memory stands among word embeddings, so it starts at their scale.
        self.memory = nn.Parameter(torch.randn(memory_size, backbone.width) * backbone.embedding_scale)
        self.to_embedding: nn.Module = nn.Identity()
        if backbone.embedding_width != backbone.width:
            self.to_embedding = nn.Linear(backbone.width, backbone.embedding_width)
        self.update = self.make_update(update, backbone.width)

    def _as_words(self, memory: Tensor, words: Tensor) -> Tensor:
        """The memory as the backbone reads it, beside words (B, S, E): (B, M, D) -> (B, M, E)."""
        # Under autocast hidden states are bf16 while embeddings stay fp32; the memory follows the embeddings.
        embedded: Tensor = self.to_embedding(memory)
        return embedded.to(words.dtype)

    def recorded(self) -> AbstractContextManager[list[Tensor]]:
        return self.backbone.recorded()


class RMT(MemoryModel[Tensor]):
    """One whose state is its memory, (B, M, D)."""

    def initial_state(self, batch_size: int) -> Tensor:
        """The memory before the first segment, (B, M, D): the trained vectors, the same for all."""
        return self.memory.expand(batch_size, -1, -1)

    def memory_of(self, state: Tensor) -> Tensor:
        return state


class RMTEncoder(RMT):
    """An encoder with memory tokens (RMT-2023, section 3).

    ```
    [CLS] mem … mem [SEP] text … text [SEP]      what the backbone sees of segment τ
          └─ mem_τ ─┘
    [CLS] mem … mem [SEP] text … text [SEP]      the hidden states of its last layer
          └ mem_τ+1 ┘
    ```

    The state is the memory, (B, M, D). The answer is read at [CLS] of the last segment.

    Args:
        encoder: the backbone.
        segment_length: how many tokens the backbone sees of each segment, memory and special tokens included.
        memory_size: M. Without memory (0) segments know nothing of each other.
        bptt_depth: over how many borders between segments gradients flow back; -1 for all of them.
        gradient_checkpointing: compute activations again in the backward pass instead of keeping them.
        update: how the next memory comes about: a class such as `Replace` or `Gated`, or a partial of one.
        schedule: segments are read one after the other: their memory is made by the last layer of the one before.

    Raises:
        UserError: if segment_length exceeds the backbone's positions or leaves no room for text.
    """

    # [CLS] before the memory, [SEP] after it and after the text.
    NUM_SPECIAL_TOKENS = 3

    def __init__(
        self,
        encoder: Encoder,
        segment_length: Annotated[int, Ge(1)],
        memory_size: Annotated[int, Ge(0)] = 10,
        bptt_depth: Annotated[int, Ge(-1)] = -1,
        gradient_checkpointing: bool = False,
        update: Callable[[int], Update] = Replace,
        schedule: Schedule = "vertical",
    ) -> None:
        frame = EncoderFrame(memory_size, encoder.cls_token_id, encoder.sep_token_id)
        super().__init__(
            encoder, frame, segment_length, memory_size, update, bptt_depth, gradient_checkpointing, schedule
        )
        self.encoder = encoder

    @property
    def backbone(self) -> Encoder:
        return self.encoder

    def read_segment(self, segment: Segment, memory: Tensor) -> tuple[Tensor, Tensor]:
        """`mem_τ+1` are the rows of `Transformer([mem_τ ∘ H_τ])` at the memory's places (section 3).

        Returns:
            Hidden states (B, 1 + M, D) of [CLS] and memory, which are all that is ever read; and the next memory
            (B, M, D).
        """
        words, layout = self.words(segment), self.layout(segment.input_ids.shape[1])
        given = self.frame.inputs(segment, words, self._as_words(memory, words))
        hidden = self.encoder(*given, rows=layout.place(layout.written).stop)
        return hidden, self.next_memory(hidden[:, layout.place(layout.written)], memory)


class RMTDecoder(RMT):
    """A causal language model with memory tokens (RMT-2022, section 3.2).

    Causal text cannot look ahead, so memory stands at both ends, and both are filled from the same state.

    ```
    mem … mem text … text mem … mem      what the backbone sees of segment τ
    └ mem_τ ┘             └ mem_τ ┘
    mem … mem text … text mem … mem      the hidden states of its last layer
                          └ mem_τ+1
    ```

    The state is the memory, (B, M, D). The answer is read at the last token of the text.

    Args:
        decoder: the backbone.
        segment_length: how many tokens the backbone sees of each segment, both memories included.
        memory_size: M. Without memory (0) segments know nothing of each other.
        memory_attention: whether the tokens of a memory see each other freely, or only those before them ("causal").
            Either way text sees all of the read memory, and the write memory sees all that stands before it.
        bptt_depth: over how many borders between segments gradients flow back; -1 for all of them.
        gradient_checkpointing: compute activations again in the backward pass instead of keeping them.
        update: how the next memory comes about: a class such as `Replace` or `Gated`, or a partial of one.
        schedule: segments are read one after the other: their memory is made by the last layer of the one before.

    Raises:
        UserError: if segment_length exceeds the backbone's positions or leaves no room for text.
    """

    frame: DecoderFrame

    def __init__(
        self,
        decoder: Decoder,
        segment_length: Annotated[int, Ge(1)],
        memory_size: Annotated[int, Ge(0)] = 10,
        memory_attention: Literal["free", "causal"] = "free",
        bptt_depth: Annotated[int, Ge(-1)] = -1,
        gradient_checkpointing: bool = False,
        update: Callable[[int], Update] = Replace,
        schedule: Schedule = "vertical",
    ) -> None:
        frame = DecoderFrame(memory_size, memory_size, free=memory_attention == "free")
        super().__init__(
            decoder, frame, segment_length, memory_size, update, bptt_depth, gradient_checkpointing, schedule
        )
        self.decoder = decoder
        self.memory_attention = memory_attention

    @property
    def backbone(self) -> Decoder:
        return self.decoder

    def read_segment(self, segment: Segment, memory: Tensor) -> tuple[Tensor, Tensor]:
        """`mem_τ+1` are the last rows of `Transformer([mem_τ ∘ H_τ ∘ mem_τ])` (section 3.2).

        Returns:
            Hidden states of the text (B, S, D), and the next memory (B, M, D).
        """
        words, layout = self.words(segment), self.layout(segment.input_ids.shape[1])
        hidden = self.decoder(*self.frame.inputs(segment, words, self._as_words(memory, words)))
        return hidden[:, layout.place("text")], self.next_memory(hidden[:, layout.place(layout.written)], memory)

    def open_segment(self) -> SegmentCache | None:
        """What holds a segment that is read token by token; None if the backbone reads whole ones only."""
        # A subclass may read segments in a way of its own.
        same = type(self).step is SegmentModel.step and type(self).read_segment is RMTDecoder.read_segment
        return SegmentCache(self.segment_length) if same and self.decoder.reads_pieces(self.segment_length) else None

    def continue_segment(self, input_ids: Tensor, start: Tensor, memory: Tensor | None, cache: SegmentCache) -> Tensor:
        """Read some tokens of a segment: the first, or more.

        Args:
            input_ids: (B, G).
            start: (B, 1), how many tokens of the segment's text come before them.
            memory: (B, M, D), if the segment of any row begins here; read again, it is the same. None otherwise.
            cache: what has been read of the segment.

        Returns:
            Their hidden states (B, G, D).
        """
        words = self.embed(input_ids)
        places = self.memory_size + start + torch.arange(words.shape[1], device=words.device)
        if memory is None:
            return self.decoder.go_on(words, places, places + 1, cache)
        before, seen = self.frame.memory_from(0, self.memory_size, memory)
        embeddings = torch.cat([self._as_words(memory, words), words], dim=1)
        places, seen = torch.cat([before, places], dim=1), torch.cat([seen, places + 1], dim=1)
        return self.decoder.go_on(embeddings, places, seen, cache)[:, self.memory_size :]

    def close_segment(self, memory: Tensor, cache: SegmentCache) -> Tensor:
        """The next memory (B, M, D), after a full segment that is in the cache and has begun with `memory`.

        Text does not see the write memory, so that can be read after it.
        """
        if not self.memory_size:
            return memory
        embedded = self._as_words(memory, self.embed(memory.new_zeros(0).long()))
        places, seen = self.frame.memory_from(self.memory_size + self.text_length, self.memory_size, memory)
        return self.next_memory(self.decoder.go_on(embedded, places, seen, cache), memory)
