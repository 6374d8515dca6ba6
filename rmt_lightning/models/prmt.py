"""The Parallel Memory RMT: memory tokens in every layer that no other layer sees.

Rodkin, Kuratov, Bulatov, Burtsev 2024, "Associative Recurrent Memory Transformer", arXiv 2407.04841, section 3.

Shapes: B batch, M memory tokens, N tokens that the backbone sees, L layers, E width of the embeddings, D width of the
layers.
"""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

import torch
from annotated_types import Ge
from torch import Tensor, nn

from rmt_lightning.models.backbone import Step
from rmt_lightning.models.decoder import Decoder
from rmt_lightning.models.encoder import Encoder
from rmt_lightning.models.frame import DecoderFrame
from rmt_lightning.models.layer_memory import LayerMemory, LayerState, Shared
from rmt_lightning.models.layered import Schedule


class ParallelLayer(NamedTuple):
    """A layer that has been told of a segment, where memory stands there, and which rows are the next one."""

    step: Step
    memory: tuple[slice, ...]
    written: slice

    def __call__(self, hidden: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        made = self.step(_with_memory(hidden, before.to(hidden.dtype), self.memory))
        # A copy: what is cut out of the hidden states would keep all of them in memory.
        return made, made[:, self.written].to(before.dtype, copy=True)


class PRMT(LayerMemory):
    """A transformer each of whose layers has memory tokens of its own.

    They stand where those of `RMTDecoder` and `RMTEncoder` do. But what a layer is given there is its own memory, not
    what the layer below makes of its: layer l of segment τ reads mem_(τ, l), and what it makes of the write memory is
    mem_(τ+1, l). The state is L of (B, M, D); at first M trained vectors a layer. A causal model's answer is read at
    the last token of the text, an encoder's at [CLS].

    Args:
        backbone: an encoder, or a causal language model.
        segment_length: how many tokens the backbone sees of each segment, memory and special tokens included.
        memory_size: M.
        memory_attention: whether the tokens of a memory see each other freely, or only those before them ("causal").
            In an encoder all tokens see each other.
        bptt_depth: over how many borders between segments gradients flow back; -1 for all of them.
        gradient_checkpointing: compute activations again in the backward pass instead of keeping them.
        schedule: in what order the layers of the segments are run; see `LayeredModel`.

    Raises:
        UserError: if segment_length exceeds the backbone's positions or leaves no room for text, or if the backbone's
            layers cannot be run one by one.
    """

    def __init__(
        self,
        backbone: Encoder | Decoder,
        segment_length: Annotated[int, Ge(1)],
        memory_size: Annotated[int, Ge(1)] = 10,
        memory_attention: Literal["free", "causal"] = "free",
        bptt_depth: Annotated[int, Ge(-1)] = -1,
        gradient_checkpointing: bool = False,
        schedule: Schedule = "vertical",
    ) -> None:
        frame = DecoderFrame(memory_size, memory_size, free=memory_attention == "free")
        super().__init__(backbone, segment_length, frame, bptt_depth, gradient_checkpointing)
        # They stand among what each layer is given, so they start at its scale.
        scales = torch.tensor(self.scales)[:, None, None]
        self.memory = nn.Parameter(torch.randn(len(scales), memory_size, backbone.layer_width) * scales)
        self.choose(schedule)

    def initial_state(self, batch_size: int) -> LayerState:
        """The trained vectors of each layer, the same for all."""
        return LayerState(tuple(memory.expand(batch_size, -1, -1) for memory in self.memory))

    def memory_tokens(self, words: Tensor) -> Tensor:
        """What stands there is no layer given."""
        return words.new_zeros(len(words), self.memory_size, self.backbone.embedding_width)

    def cell(self, number: int, shared: Shared) -> ParallelLayer:
        return ParallelLayer(shared.parts.steps[number], shared.memory, shared.written)

    def trained_state(self) -> list[nn.Parameter]:
        return [self.memory]


def _with_memory(hidden: Tensor, memory: Tensor, places: tuple[slice, ...]) -> Tensor:
    """(B, N, D), and (B, M, D) in its stead at some places -> (B, N, D)."""
    parts, end = [], 0
    for place in places:
        parts += [hidden[:, end : place.start], memory[:, : place.stop - place.start]]
        end = place.stop
    return torch.cat([*parts, hidden[:, end:]], dim=1)
