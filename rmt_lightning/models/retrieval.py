"""RMT with retrieval: memory that looks back at all that it has been.

Kuratov et al. 2024, "In Search of Needles in a 11M Haystack: Recurrent Memory Finds What LLMs Miss", arXiv 2402.10790,
section 4 (RMT-R).

Shapes: B batch, M memory tokens, R memory tokens of all earlier segments, D width of the hidden states.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal, NamedTuple

import torch
from annotated_types import Ge
from torch import Tensor, nn

from rmt_lightning.models.backbone import Transformer
from rmt_lightning.models.decoder import Decoder
from rmt_lightning.models.encoder import Encoder
from rmt_lightning.models.frame import DecoderFrame, frame_for
from rmt_lightning.models.layered import Schedule
from rmt_lightning.models.recurrence import Segment
from rmt_lightning.models.rmt import MemoryModel
from rmt_lightning.models.update import Replace, Update


class Remembered(NamedTuple):
    """What is carried on; it grows by M rows with each segment.

    Attributes:
        memory: (B, M, D) what the last segment has written.
        earlier: (B, R, D) what those before have, the first memory first.
        known: (B, R) bool, whether there is such a row; others fill up texts that have had fewer segments.
    """

    memory: Tensor
    earlier: Tensor
    known: Tensor


class RMTRetrieval(MemoryModel[Remembered]):
    """An RMT whose read memory also attends to all earlier memories.

    ```
    read = mem_τ + W_O softmax(W_Q mem_τ · W_K [mem_0 ∘ … ∘ mem_τ] / √D) W_V [mem_0 ∘ … ∘ mem_τ]
    ```

    This stands where `RMTEncoder` and `RMTDecoder` have their memory, and what the segment writes is mem_τ+1. W_O is 0
    at first, so the model begins as such an RMT. Its state, and the time that it takes to look back, grow by M rows
    with each segment: it is no model of constant memory, and no pool can hold its states.

    Args:
        backbone: an encoder, or a causal language model.
        segment_length: how many tokens the backbone sees of each segment, memory and special tokens included.
        memory_size: M.
        memory_attention: whether the tokens of a memory see each other freely, or only those before them ("causal"), as
            the backbone reads them. In an encoder all tokens see each other.
        bptt_depth: over how many borders between segments gradients flow back; -1 for all of them.
        gradient_checkpointing: compute activations again in the backward pass instead of keeping them.
        update: how the next memory comes about: a class such as `Replace` or `Gated`, or a partial of one.
        schedule: segments are read one after the other: their memory is made by the last layer of the one before.

    Raises:
        UserError: if segment_length exceeds the backbone's positions or leaves no room for text.
    """

    grows = True

    def __init__(
        self,
        backbone: Encoder | Decoder,
        segment_length: Annotated[int, Ge(1)],
        memory_size: Annotated[int, Ge(1)] = 10,
        memory_attention: Literal["free", "causal"] = "free",
        bptt_depth: Annotated[int, Ge(-1)] = -1,
        gradient_checkpointing: bool = False,
        update: Callable[[int], Update] = Replace,
        schedule: Schedule = "vertical",
    ) -> None:
        frame = frame_for(backbone, DecoderFrame(memory_size, memory_size, free=memory_attention == "free"))
        super().__init__(
            backbone, frame, segment_length, memory_size, update, bptt_depth, gradient_checkpointing, schedule
        )
        self.transformer = backbone
        self.query, self.key, self.value, self.output = (
            nn.Linear(backbone.width, backbone.width, bias=False) for _ in range(4)
        )
        nn.init.zeros_(self.output.weight)

    @property
    def backbone(self) -> Transformer:
        return self.transformer

    def initial_state(self, batch_size: int) -> Remembered:
        """The trained vectors, the same for all, and nothing before them."""
        memory = self.memory.expand(batch_size, -1, -1)
        return Remembered(memory, memory[:, :0], torch.zeros(batch_size, 0, dtype=torch.bool, device=memory.device))

    def memory_of(self, state: Remembered) -> Tensor:
        return state.memory

    def read_segment(self, segment: Segment, state: Remembered) -> tuple[Tensor, Remembered]:
        """What is kept of the hidden states, (B, …, D), and the next state."""
        memory, words = state.memory, self.words(segment)
        rows = torch.cat([state.earlier, memory], dim=1)
        known = nn.functional.pad(state.known, (0, self.memory_size), value=True)
        read = self._as_words(memory + self._found(memory, rows, known), words)
        length = segment.input_ids.shape[1]
        hidden = self.backbone(*self.frame.inputs(segment, words, read))
        layout = self.layout(length)
        written = self.next_memory(hidden[:, layout.place(layout.written)], memory)
        return hidden[:, self.frame.kept(length)], Remembered(written, rows, known)

    def _found(self, memory: Tensor, rows: Tensor, known: Tensor) -> Tensor:
        """What the tokens of a memory (B, M, D) find in those rows (B, R + M, D) that are known: (B, M, D)."""
        scores = self.query(memory) @ self.key(rows).mT / self.width**0.5  # (B, M, R + M)
        weights = scores.masked_fill(~known[:, None], -torch.inf).softmax(dim=-1)
        found: Tensor = self.output(weights.to(rows.dtype) @ self.value(rows).to(rows.dtype))
        return found.to(memory.dtype)
