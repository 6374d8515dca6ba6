"""What the published implementations do, as plain loops: what the benchmarks compare with.

The whole backbone reads each segment, with a mask that shows everything; memory is cut out of its last hidden states,
all of which are kept until the end.

Shapes: B batch, T segments, S text tokens of a segment, M memory tokens, D width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class PublishedEncoder(nn.Module):
    """[CLS] mem [SEP] text [SEP], segment by segment (RMT-2023, section 3)."""

    def __init__(self, model: PreTrainedModel, memory_size: int) -> None:
        super().__init__()
        self.model = model
        self.memory = nn.Parameter(torch.randn(memory_size, model.config.hidden_size) * 0.02)
        self.cls, self.sep = 1, 2

    def forward(self, input_ids: Tensor) -> Tensor:
        """(B, T, S) -> (B, D) at [CLS] of the last segment."""
        batch, size = len(input_ids), len(self.memory)
        memory, kept = self.memory.expand(batch, -1, -1), []
        cls, sep = (torch.full((batch, 1), token, device=input_ids.device) for token in (self.cls, self.sep))
        room = torch.zeros(batch, size, dtype=torch.long, device=input_ids.device)
        for segment in input_ids.unbind(dim=1):
            words = self.model.get_input_embeddings()(torch.cat([cls, room, sep, segment, sep], dim=1))
            embeddings = torch.cat([words[:, :1], memory, words[:, 1 + size :]], dim=1)
            mask = torch.ones(embeddings.shape[:2], dtype=torch.long, device=input_ids.device)
            hidden = self.model(inputs_embeds=embeddings, attention_mask=mask).last_hidden_state
            memory = hidden[:, 1 : 1 + size]
            kept.append(hidden)
        return kept[-1][:, 0]


class PublishedDecoder(nn.Module):
    """mem text mem under the backbone's own causal mask, segment by segment, with scores of all tokens (RMT-2022)."""

    def __init__(self, model: PreTrainedModel, memory_size: int) -> None:
        super().__init__()
        self.model = model
        self.memory = nn.Parameter(torch.randn(memory_size, model.config.hidden_size) * 0.02)

    def forward(self, input_ids: Tensor) -> Tensor:
        """(B, T, S) -> (B, T, S, V), scores of the words that come next."""
        batch, size = len(input_ids), len(self.memory)
        memory, kept = self.memory.expand(batch, -1, -1), []
        for segment in input_ids.unbind(dim=1):
            words = self.model.get_input_embeddings()(segment)
            embeddings = torch.cat([memory, words, memory], dim=1)
            mask = torch.ones(embeddings.shape[:2], dtype=torch.long, device=input_ids.device)
            read = self.model(inputs_embeds=embeddings, attention_mask=mask, output_hidden_states=True, use_cache=False)
            memory = read.hidden_states[-1][:, -size:]
            kept.append(read.logits[:, size:-size])
        return torch.stack(kept, dim=1)
