"""The Associative Recurrent Memory Transformer: a matrix in every layer that keys write to and queries read from.

Rodkin, Kuratov, Bulatov, Burtsev 2024, "Associative Recurrent Memory Transformer", arXiv 2407.04841. Keys: Schlag,
Irie, Schmidhuber 2021, arXiv 2102.11174, section 3.3.

Shapes: B batch, M memory tokens, N tokens that the backbone sees, L layers, H heads, D width of the layers, E width of
the embeddings, K = 6 key_size / H numbers of a key.
"""

from __future__ import annotations

from typing import Annotated, NamedTuple

import torch
from annotated_types import Ge, Le
from torch import Tensor, nn

from rmt_lightning.core.errors import UserError
from rmt_lightning.models.backbone import Step
from rmt_lightning.models.decoder import Decoder
from rmt_lightning.models.encoder import Encoder
from rmt_lightning.models.frame import DecoderFrame
from rmt_lightning.models.layer_memory import LayerMemory, LayerState, Shared
from rmt_lightning.models.layered import Schedule

# What keeps divisors from 0, as in the code that made the paper's numbers.
EPSILON = 1e-5


class Association(NamedTuple):
    """What a layer remembers. In fp32 or more, whatever hidden states are.

    Had it been kept in bf16, what is read would have been off by 0.1% after 1 segment, 0.5% after 100, and 1.4% after
    10,000 and 100,000 (10 tokens a segment near one of 50 patterns, against fp64; in fp32 never more than 3e-7): each
    segment rounds all that is there anew, and what is added below 1/256 of a number is dropped.

    Attributes:
        values: (B, H, K, D/H) the A of the paper: what each number of a key stands for.
        weights: (B, H, K) its z: how often each has been written; None if reads are not divided by it.
    """

    values: Tensor
    weights: Tensor | None


class AssociativeMemory(nn.Module):
    """Reads and writes the memory of a layer.

    Args:
        width: D.
        key_size: of all heads together, before it becomes a key.
        heads: H.
        normalizer: whether there are `Association.weights`.
    """

    def __init__(self, width: int, key_size: int, heads: int, normalizer: bool) -> None:
        super().__init__()
        self.heads = heads
        self.normalizer = normalizer
        self.query = nn.Linear(width, key_size, bias=False)
        self.key = nn.Linear(width, key_size, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.strength = nn.Linear(width, heads)
        # Before it is trained nothing is remembered, and the model is its backbone.
        nn.init.zeros_(self.value.weight)

    def first(self, batch_size: int) -> Association:
        """Nothing."""
        weight, heads = self.value.weight, self.heads
        size = 6 * self.key.out_features // heads
        dtype = torch.promote_types(weight.dtype, torch.float32)
        values = weight.new_zeros(batch_size, heads, size, len(weight) // heads, dtype=dtype)
        return Association(values, values[..., 0] if self.normalizer else None)

    def read(self, hidden: Tensor, memory: Association) -> Tensor:
        """What is associated with each row: (B, N, D) -> (B, N, D). In the first segment 0."""
        query = self._keys(self.query(hidden), memory)
        with torch.autocast(hidden.device.type, enabled=False):
            return self._found(query, memory).transpose(1, 2).flatten(2).to(hidden.dtype)

    def write(self, rows: Tensor, memory: Association) -> Association:
        """Associate each row's value with its key (B, M, D), in place of what has been found there.

        All rows find what was there before any of them writes.
        """
        dtype = memory.values.dtype
        key = self._keys(self.key(rows), memory)
        value = self._split(self.value(rows)).to(dtype)
        strength = self.strength(rows).mT[..., None].to(dtype).sigmoid()  # (B, H, M, 1)
        with torch.autocast(rows.device.type, enabled=False):
            change = strength * (value - self._found(key, memory))
            if memory.weights is None:
                # Keys that are alike share a step; so no number of rows can overshoot.
                change = change / (key @ key.sum(dim=-2)[..., None] + EPSILON)
                return Association(memory.values + key.mT @ change, None)
            weights = memory.weights + (self._new(key, memory.weights) * key).sum(dim=-2)
            return Association(memory.values + key.mT @ change, weights)

    def _found(self, keys: Tensor, memory: Association) -> Tensor:
        """(B, H, N, K) -> (B, H, N, D/H)."""
        found = keys @ memory.values
        return found if memory.weights is None else found / (keys @ memory.weights[..., None] + EPSILON)

    def _new(self, key: Tensor, weights: Tensor) -> Tensor:
        """How much of each key is not in the weights yet: (B, H, M, K) -> (B, H, M, 1), from 0 to 1, no gradient."""
        key, weights = key.detach(), weights.detach()
        known = (key @ weights[..., None] + EPSILON) / (key.square().sum(dim=-1, keepdim=True) + EPSILON)
        # In the first segment all is.
        return torch.where(weights.any(dim=-1)[..., None, None], (1 - known).clamp(0, 1), 1)

    def _keys(self, projected: Tensor, memory: Association) -> Tensor:
        """(B, N, key_size) -> (B, H, N, K)."""
        keys = dpfp(self._split(projected).to(memory.values.dtype))
        return keys if memory.weights is not None else nn.functional.normalize(keys, dim=-1)

    def _split(self, projected: Tensor) -> Tensor:
        """(B, N, …) -> (B, H, N, … / H)."""
        return projected.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def dpfp(x: Tensor) -> Tensor:
    """DPFP-3: products of neighbors, few of which are not 0, and none below: (…, k) -> (…, 6 k)."""
    parts = torch.cat([x.relu(), (-x).relu()], dim=-1)
    return torch.cat([parts * parts.roll(by, dims=-1) for by in (1, 2, 3)], dim=-1)


class AssociativeLayer(NamedTuple):
    """A layer that has been told of a segment, its memory, and which rows are written there."""

    step: Step
    memory: AssociativeMemory
    written: slice

    def __call__(self, hidden: Tensor, before: Association) -> tuple[Tensor, Association]:
        made = self.step(hidden + self.memory.read(hidden, before))
        return made, self.memory.write(made[:, self.written], before)


class ARMT(LayerMemory):
    """A transformer each of whose layers has an associative memory (ARMT, section 3).

    ```
    text … text mem … mem             what a causal backbone sees of each segment; text sees no memory token
    [CLS] mem … mem [SEP] text … text [SEP]       what an encoder sees
    ```

    The memory tokens are the same M trained vectors in each segment. Before a layer, all tokens read its memory A, z,
    and what they find is added to them; what the layer then makes of the memory tokens is written there:

    ```
    read     κ = φ(W_Q h)    h ← h + κA / (κ·z + ε)
    write    k = φ(W_K o)    v = W_V o    β = σ(W_β o)    v̄ = kA / (k·z + ε)    γ = 1 - (k·z + ε) / (|k|² + ε)
             A ← A + Σ β k ⊗ (v - v̄)    z ← z + Σ γ k        sums over the memory tokens
    ```

    γ is kept between 0 and 1, has no gradient, and is 1 in the first segment.

    φ is DPFP-3. With H heads W_Q h and W_K o are split into H parts of key_size / H, W_V o into H of D / H, W_β o has H
    numbers, and each head has an A and a z of its own; what they find is put side by side. So the state, (B, H, K, D/H)
    and (B, H, K) a layer, is 1/H as large. Without the normalizer there is no z: queries and keys have length 1, and
    β is divided by the sum of a key's products with those of all memory tokens, for otherwise A would grow beyond all
    bounds where they are alike.

    W_V is 0 at first, so the model begins as its backbone. A causal model's answer is read at the last token of the
    text, an encoder's at [CLS].

    Args:
        backbone: an encoder, or a causal language model.
        segment_length: how many tokens the backbone sees of each segment, memory and special tokens included.
        memory_size: M.
        key_size: what W_Q and W_K make of a token.
        heads: H.
        normalizer: whether there is a z.
        bptt_depth: over how many borders between segments gradients flow back; -1 for all of them.
        gradient_checkpointing: compute activations again in the backward pass instead of keeping them.
        schedule: in what order the layers of the segments are run; see `LayeredModel`.

    Raises:
        UserError: if segment_length exceeds the backbone's positions or leaves no room for text, if heads do not divide
            key_size and D, or if the backbone's layers cannot be run one by one.
    """

    def __init__(
        self,
        backbone: Encoder | Decoder,
        segment_length: Annotated[int, Ge(1)],
        memory_size: Annotated[int, Ge(1)] = 10,
        key_size: Annotated[int, Ge(2), Le(2**15)] = 64,
        heads: Annotated[int, Ge(1)] = 1,
        normalizer: bool = True,
        bptt_depth: Annotated[int, Ge(-1)] = -1,
        gradient_checkpointing: bool = False,
        schedule: Schedule = "vertical",
    ) -> None:
        width = backbone.layer_width
        if width % heads or key_size % heads or key_size < 2 * heads:
            raise UserError(
                f"model.heads={heads}: must divide the backbone's width {width}, and model.key_size={key_size} into "
                "parts of 2 or more"
            )
        frame = DecoderFrame(read=0, written=memory_size, free=False)
        super().__init__(backbone, segment_length, frame, bptt_depth, gradient_checkpointing)
        # They stand among word embeddings, so they start at their scale.
        self.memory = nn.Parameter(torch.randn(memory_size, backbone.embedding_width) * backbone.embedding_scale)
        self.memories = nn.ModuleList(AssociativeMemory(width, key_size, heads, normalizer) for _ in self.scales)
        self.choose(schedule)

    def initial_state(self, batch_size: int) -> LayerState:
        """Of each layer an `Association` of nothing."""
        return LayerState(tuple(self._of(number).first(batch_size) for number in range(len(self.memories))))

    def memory_tokens(self, words: Tensor) -> Tensor:
        return self.memory.to(words.dtype).expand(len(words), -1, -1)

    def cell(self, number: int, shared: Shared) -> AssociativeLayer:
        return AssociativeLayer(shared.parts.steps[number], self._of(number), shared.written)

    def _of(self, number: int) -> AssociativeMemory:
        memory = self.memories[number]
        assert isinstance(memory, AssociativeMemory)
        return memory

    def trained_state(self) -> list[nn.Parameter]:
        return [self.memory, *self.memories.parameters()]
