"""The Recurrent Memory Transformer: one segment and a memory in, hidden states and the next memory out.

RMT-2023: Bulatov, Kuratov, Burtsev, "Scaling Transformer to 1M tokens and beyond with RMT", arXiv 2304.11062.

Shapes: B batch, T segments, S text tokens of a segment, M memory tokens, D width of the hidden states.
"""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor, nn
from transformers import PretrainedConfig

from rmt_lightning.errors import UserError
from rmt_lightning.models.backbone import Encoder
from rmt_lightning.models.recurrence import Segment
from rmt_lightning.models.segment_model import SegmentModel


class RMTEncoder(SegmentModel[Tensor]):
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

    Raises:
        UserError: if segment_length exceeds the backbone's positions or leaves no room for text.
    """

    # [CLS] before the memory, [SEP] behind it and behind the text.
    NUM_SPECIAL_TOKENS = 3

    def __init__(
        self,
        encoder: Encoder,
        segment_length: Annotated[int, Ge(1)],
        memory_size: Annotated[int, Ge(0)] = 10,
        bptt_depth: Annotated[int, Ge(-1)] = -1,
        gradient_checkpointing: bool = False,
    ) -> None:
        if segment_length > encoder.max_positions:
            raise UserError(
                f"data.segment_length={segment_length}: the backbone sees at most {encoder.max_positions} tokens; "
                f"give {encoder.max_positions} or less"
            )
        text_length = segment_length - memory_size - self.NUM_SPECIAL_TOKENS
        if text_length < 1:
            raise UserError(
                f"data.segment_length={segment_length}: {memory_size} memory and {self.NUM_SPECIAL_TOKENS} special "
                f"tokens leave no room for text; give more than {memory_size + self.NUM_SPECIAL_TOKENS}"
            )
        super().__init__(text_length, encoder.width, bptt_depth, gradient_checkpointing)
        self.encoder = encoder
        self.segment_length = segment_length
        # The first memory stands among word embeddings, so it starts at their scale.
        self.memory = nn.Parameter(torch.randn(memory_size, encoder.width) * encoder.embedding_scale)
        self.to_embedding: nn.Module = nn.Identity()
        if encoder.embedding_width != encoder.width:
            self.to_embedding = nn.Linear(encoder.width, encoder.embedding_width)

    @property
    def architecture(self) -> PretrainedConfig:
        return self.encoder.model.config

    @property
    def memory_size(self) -> int:
        return self.memory.shape[0]

    def initial_state(self, batch_size: int) -> Tensor:
        """The memory before the first segment, (B, M, D): the trained vectors, the same for all."""
        return self.memory.expand(batch_size, -1, -1)

    def step(self, segment: Segment, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Read one segment: `mem_τ+1` are the rows of `Transformer([mem_τ ∘ H_τ])` at the memory's places (section 3).

        Args:
            segment: at most `text_length` tokens a row. A row without text leaves its memory as it is.
            memory: (B, M, D).

        Returns:
            Hidden states (B, 1 + M + 1 + S + 1, D), [CLS] first, and the next memory (B, M, D).
        """
        text, mask = self._append_separator(segment)
        special = text.new_tensor([[self.encoder.cls_token_id, self.encoder.sep_token_id]]).expand(len(text), -1)
        cls, sep = self.encoder.embed(special).split(1, dim=1)
        # Under autocast hidden states are bf16 while embeddings stay fp32; the memory follows the embeddings.
        read = self.to_embedding(memory).to(cls.dtype)
        embeddings = torch.cat([cls, read, sep, self.encoder.embed(text)], dim=1)
        if mask is not None:
            mask = nn.functional.pad(mask, (2 + self.memory_size, 0), value=1)
        hidden = self.encoder(embeddings, mask)
        written = hidden[:, 1 : 1 + self.memory_size].to(memory.dtype)
        if segment.attention_mask is not None:
            has_text = segment.attention_mask.any(dim=1)
            written = torch.where(has_text[:, None, None], written, memory)
        return hidden, written

    def _append_separator(self, segment: Segment) -> tuple[Tensor, Tensor | None]:
        """Put [SEP] behind each row's text: (B, S) -> ids and mask (B, S + 1)."""
        ids, mask = segment
        if mask is None:
            return nn.functional.pad(ids, (0, 1), value=self.encoder.sep_token_id), None
        length = mask.sum(dim=1, keepdim=True)
        ids = nn.functional.pad(ids, (0, 1)).scatter(1, length, self.encoder.sep_token_id)
        return ids, (torch.arange(ids.shape[1], device=ids.device) <= length).long()

    def readout(self, hidden: Tensor, segment: Segment) -> Tensor:
        """The hidden state of [CLS]."""
        return hidden[:, 0]

    def trained_state(self) -> list[nn.Parameter]:
        return [self.memory]
