"""The Recurrent Memory Transformer: one segment and a memory in, hidden states and the next memory out.

RMT-2022: Bulatov, Kuratov, Burtsev, "Recurrent Memory Transformer", NeurIPS 2022, arXiv 2207.06881 (decoders).
RMT-2023: Bulatov, Kuratov, Burtsev, "Scaling Transformer to 1M tokens and beyond with RMT", arXiv 2304.11062
(encoders).

Shapes: B batch, S text tokens of a segment, M memory tokens, N tokens that the backbone sees, E width of the
embeddings, D width of the hidden states, V vocabulary.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Annotated, Literal

import torch
from annotated_types import Ge
from torch import Tensor, nn
from transformers import PretrainedConfig

from rmt_lightning.core.errors import UserError
from rmt_lightning.models.backbone import Transformer
from rmt_lightning.models.decoder import Decoder, SegmentCache
from rmt_lightning.models.encoder import Encoder
from rmt_lightning.models.memory import Layout, MemoryTokens
from rmt_lightning.models.recurrence import Segment
from rmt_lightning.models.segment_model import SegmentModel, touch
from rmt_lightning.models.update import Replace, Update


class MemoryModel(MemoryTokens[Tensor]):
    """A transformer whose state is its memory: M hidden states that stand among the embeddings of the next segment.

    Args:
        backbone: what reads segments.
        segment_length: how many tokens the backbone sees of each segment.
        memory_size: M.
        beside_text: how many of those tokens are no text, by what they are.
        update: makes what the next memory comes about by, of its width.
        bptt_depth: over how many borders between segments gradients flow back; -1 for all of them.
        gradient_checkpointing: compute activations again in the backward pass instead of keeping them.

    Raises:
        UserError: if segment_length exceeds the backbone's positions or leaves no room for text.
    """

    def __init__(
        self,
        backbone: Transformer,
        segment_length: int,
        memory_size: int,
        beside_text: dict[str, int],
        update: Callable[[int], Update],
        bptt_depth: int,
        gradient_checkpointing: bool,
    ) -> None:
        if segment_length > backbone.max_positions:
            raise UserError(
                f"data.segment_length={segment_length}: the backbone sees at most {backbone.max_positions} tokens; "
                f"give {backbone.max_positions} or less"
            )
        taken = sum(beside_text.values())
        if segment_length <= taken:
            what = " and ".join(f"{number} {kind}" for kind, number in beside_text.items())
            raise UserError(
                f"data.segment_length={segment_length}: {what} tokens leave no room for text; give more than {taken}"
            )
        super().__init__(segment_length - taken, backbone.width, bptt_depth, gradient_checkpointing)
        self.tokenizer = backbone.tokenizer
        self.segment_length = segment_length
        # The first memory stands among word embeddings, so it starts at their scale.
        self.memory = nn.Parameter(torch.randn(memory_size, backbone.width) * backbone.embedding_scale)
        self.to_embedding: nn.Module = nn.Identity()
        if backbone.embedding_width != backbone.width:
            self.to_embedding = nn.Linear(backbone.width, backbone.embedding_width)
        self.update = self.make_update(update, backbone.width)

    @property
    @abstractmethod
    def backbone(self) -> Transformer:
        """What reads segments."""

    @property
    def architecture(self) -> PretrainedConfig:
        return self.backbone.model.config

    def embed(self, input_ids: Tensor) -> Tensor:
        return self.backbone.embed(input_ids)

    def initial_state(self, batch_size: int) -> Tensor:
        """The memory before the first segment, (B, M, D): the trained vectors, the same for all."""
        return self.memory.expand(batch_size, -1, -1)

    def _as_words(self, memory: Tensor, words: Tensor) -> Tensor:
        """The memory as the backbone reads it, beside words (B, S, E): (B, M, D) -> (B, M, E)."""
        # Under autocast hidden states are bf16 while embeddings stay fp32; the memory follows the embeddings.
        embedded: Tensor = self.to_embedding(memory)
        return embedded.to(words.dtype)

    def memory_of(self, state: Tensor) -> Tensor:
        return state

    def recorded(self) -> AbstractContextManager[list[Tensor]]:
        return self.backbone.recorded()


class RMTEncoder(MemoryModel):
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
    ) -> None:
        beside_text = {"memory": memory_size, "special": self.NUM_SPECIAL_TOKENS}
        super().__init__(encoder, segment_length, memory_size, beside_text, update, bptt_depth, gradient_checkpointing)
        self.encoder = encoder

    @property
    def backbone(self) -> Encoder:
        return self.encoder

    def layout(self, length: int) -> Layout:
        blocks = (("[CLS]", 1), ("memory", self.memory_size), ("[SEP]", 1), ("text", length), ("[SEP]", 1))
        return Layout(blocks, written="memory")

    def tokens(self, segment: Segment) -> Tensor:
        """[CLS], [SEP], text and [SEP], with which padding follows: (B, 3 + S)."""
        ids, mask, _ = segment
        special = ids.new_tensor([self.encoder.cls_token_id, self.encoder.sep_token_id]).expand(len(ids), -1)
        if mask is None:
            text = nn.functional.pad(ids, (0, 1), value=self.encoder.sep_token_id)
        else:
            text = nn.functional.pad(ids, (0, 1)).scatter(1, mask.sum(dim=1, keepdim=True), self.encoder.sep_token_id)
        return torch.cat([special, text], dim=1)

    def read_segment(self, segment: Segment, memory: Tensor) -> tuple[Tensor, Tensor]:
        """`mem_τ+1` are the rows of `Transformer([mem_τ ∘ H_τ])` at the memory's places (section 3).

        Returns:
            Hidden states (B, 1 + M, D) of [CLS] and memory, which are all that is ever read; and the next memory
            (B, M, D).
        """
        layout, mask, words = self.layout(segment.input_ids.shape[1]), segment.attention_mask, self.words(segment)
        embeddings = torch.cat([words[:, :1], self._as_words(memory, words), words[:, 1:]], dim=1)
        if mask is not None:
            # All is seen up to the [SEP] after the text.
            mask = nn.functional.pad(mask, (layout.place("text").start + 1, 0), value=1)
        hidden = self.encoder(embeddings, mask, layout.place("memory"), rows=layout.place(layout.written).stop)
        return hidden, self.next_memory(hidden[:, layout.place(layout.written)], memory)

    def readout(self, hidden: Tensor, segment: Segment) -> Tensor:
        """The hidden state of [CLS]."""
        return hidden[:, 0]


class RMTDecoder(MemoryModel):
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

    Raises:
        UserError: if segment_length exceeds the backbone's positions or leaves no room for text.
    """

    def __init__(
        self,
        decoder: Decoder,
        segment_length: Annotated[int, Ge(1)],
        memory_size: Annotated[int, Ge(0)] = 10,
        memory_attention: Literal["free", "causal"] = "free",
        bptt_depth: Annotated[int, Ge(-1)] = -1,
        gradient_checkpointing: bool = False,
        update: Callable[[int], Update] = Replace,
    ) -> None:
        beside_text = {"read memory": memory_size, "write memory": memory_size}
        super().__init__(decoder, segment_length, memory_size, beside_text, update, bptt_depth, gradient_checkpointing)
        self.decoder = decoder
        self.memory_attention = memory_attention

    @property
    def backbone(self) -> Decoder:
        return self.decoder

    def layout(self, length: int) -> Layout:
        blocks = (("read memory", self.memory_size), ("text", length), ("write memory", self.memory_size))
        return Layout(blocks, written="write memory")

    def read_segment(self, segment: Segment, memory: Tensor) -> tuple[Tensor, Tensor]:
        """`mem_τ+1` are the last rows of `Transformer([mem_τ ∘ H_τ ∘ mem_τ])` (section 3.2).

        Returns:
            Hidden states of the text (B, S, D), and the next memory (B, M, D).
        """
        words = self.words(segment)
        read = self._as_words(memory, words)
        layout = self.layout(words.shape[1])
        embeddings = torch.cat([read, words, read], dim=1)
        hidden = self.decoder(embeddings, self._visible(segment), self._positions(segment), layout.place("text"))
        return hidden[:, layout.place("text")], self.next_memory(hidden[:, layout.place(layout.written)], memory)

    def _visible(self, segment: Segment) -> Tensor:
        """(B or 1, N, N) bool: what reads what, from 0 … N - 1 to 0 … N - 1."""
        ids, text_mask, _ = segment
        end_of_text = self.memory_size + ids.shape[1]
        length = end_of_text + self.memory_size
        visible = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
        if self.memory_attention == "free":
            visible[: self.memory_size, : self.memory_size] = True
            visible[end_of_text:, end_of_text:] = True
        visible = visible[None]
        if text_mask is not None:
            seen = nn.functional.pad(text_mask, (self.memory_size, self.memory_size), value=1).bool()
            # Padding sees itself: a softmax over nothing would be no number.
            visible = visible & seen[:, None] | torch.eye(length, dtype=torch.bool, device=ids.device)
        return visible

    def _positions(self, segment: Segment) -> Tensor:
        """(B or 1, N): the write memory stands right after the text, wherever the padding is."""
        ids, text_mask, _ = segment
        before = torch.arange(self.memory_size + ids.shape[1], device=ids.device)[None]
        length = before.new_tensor([[ids.shape[1]]]) if text_mask is None else text_mask.sum(dim=1, keepdim=True)
        after = self.memory_size + length + torch.arange(self.memory_size, device=ids.device)
        return torch.cat([before.expand(len(after), -1), after], dim=1)

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
        before, seen = self._memory_from(0, memory)
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
        places, seen = self._memory_from(self.memory_size + self.text_length, memory)
        return self.next_memory(self.decoder.go_on(embedded, places, seen, cache), memory)

    def _memory_from(self, first: int, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Where its tokens stand if the first one stands there, and how many tokens each of them sees: (B, M) both."""
        places = torch.arange(first, first + self.memory_size, device=memory.device).expand(len(memory), -1)
        free = self.memory_attention == "free"
        return places, torch.full_like(places, first + self.memory_size) if free else places + 1

    def readout(self, hidden: Tensor, segment: Segment) -> Tensor:
        # A classifier has no use for the weights that only words are read off with.
        return touch(super().readout(hidden, segment), self.decoder.untied)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the word that comes next, also over the border of a segment: (…, D) -> (…, V)."""
        return self.decoder.logits(hidden)
