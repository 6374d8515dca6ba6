"""Transformer-XL, and the same with memory tokens.

Transformer-XL: Dai et al. 2019, arXiv 1901.02860. RMT-2022: Bulatov, Kuratov, Burtsev, "Recurrent Memory Transformer",
NeurIPS 2022, arXiv 2207.06881.

Shapes: B batch, S text tokens of a segment, M memory tokens, C cached tokens, L layers, H heads, D width, V vocabulary,
Q queries (M + S + M), K keys (M + C + S + M), R distances between a query and a key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, NamedTuple, cast

import torch
from annotated_types import Ge, Le, Lt
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rmt_lightning.core.errors import UserError
from rmt_lightning.models.layered import LayeredModel, Schedule, refuse_schedule
from rmt_lightning.models.machine import check_weights
from rmt_lightning.models.memory import Layout, MemoryTokens
from rmt_lightning.models.recurrence import Segment
from rmt_lightning.models.update import Replace, Update


class XLState(NamedTuple):
    """What Transformer-XL carries from one segment to the next.

    Attributes:
        layers: L of (B, C, D), what each layer was given of the last C text tokens, the newest last; carry no gradient.
        cached: (B,) how many of the C there have been so far; they are the last ones.
        memory: (B, M, D); carries gradient.
    """

    layers: tuple[Tensor, ...]
    cached: Tensor
    memory: Tensor


class Relations(NamedTuple):
    """How queries stand to keys, the same for all layers.

    Attributes:
        u, v: (H, 1, D/H) trained queries of no token in particular, for content and for distance.
        encoding: (R, D) the R of the paper, a row for each distance.
        distance: (Q, K) rows of `encoding`.
        visible: (B, 1, Q, K).
    """

    u: Tensor
    v: Tensor
    encoding: Tensor
    distance: Tensor
    visible: Tensor


class Shared(NamedTuple):
    """What all layers are told of a segment.

    Attributes:
        layout: what stands where among the queries.
        mask: (B, S), 1 for text; None if there is no padding.
        relations: how queries stand to keys.
    """

    layout: Layout
    mask: Tensor | None
    relations: Relations


class TransformerXL(MemoryTokens[XLState], LayeredModel[XLState]):
    """A causal transformer with relative positions, whose layers also see what they saw of earlier segments.

    ```
    read mem | cache | text | write mem      what a token sees: all to its left; memory tokens also see each other
    └ mem_τ ┘                 └ mem_τ+1 ┘    the hidden states of the write memory are the next memory
    ```

    With a cache and no memory this is Transformer-XL (section 3.2), with memory and no cache the RMT of 2022
    (section 3.2), with both the hybrid of that paper, and with neither segments know nothing of each other. Distances
    between text tokens are the true ones, across segments too; memory stands before the cache and after the text.
    Sums are normalized after each layer, as in both papers. Input and output embeddings are tied.

    Args:
        tokenizer: gives V.
        segment_length: how many tokens a segment has, both blocks of memory included, the cache not.
        width: D.
        layers: L.
        heads: H.
        cache_length: C.
        memory_size: M.
        dropout: of embeddings and of what each layer adds.
        bptt_depth: over how many borders between segments gradients flow back through memory; -1 for all of them. None
            flow back through the cache.
        gradient_checkpointing: compute activations again in the backward pass instead of keeping them.
        update: how the next memory comes about: a class such as `Replace` or `Gated`, or a partial of one.
        schedule: in what order the layers of the segments are run; see `LayeredModel`. Without memory only.

    Raises:
        UserError: if width does not suit heads, or segment_length leaves no room for text.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        segment_length: Annotated[int, Ge(1)],
        width: Annotated[int, Ge(2)] = 128,
        layers: Annotated[int, Ge(1), Le(1000)] = 4,
        heads: Annotated[int, Ge(1)] = 4,
        cache_length: Annotated[int, Ge(0), Le(16_384)] = 64,
        memory_size: Annotated[int, Ge(0)] = 0,
        dropout: Annotated[float, Ge(0), Lt(1)] = 0.0,
        bptt_depth: Annotated[int, Ge(-1)] = -1,
        gradient_checkpointing: bool = False,
        update: Callable[[int], Update] = Replace,
        schedule: Schedule = "vertical",
    ) -> None:
        if width % heads or width % 2:
            raise UserError(f"model.width={width}: must be even and a multiple of model.heads={heads}")
        text_length = segment_length - 2 * memory_size
        if text_length < 1:
            raise UserError(
                f"data.segment_length={segment_length}: {memory_size} memory tokens at each end leave no room for "
                f"text; give more than {2 * memory_size}"
            )
        check_weights("model", width * (13 * width * layers + len(tokenizer)))
        super().__init__(text_length, width, bptt_depth, gradient_checkpointing)
        self.tokenizer = tokenizer
        self.cache_length = cache_length
        self.embedding = nn.Embedding(len(tokenizer), width)
        self.layers = nn.ModuleList(Layer(width, heads, dropout) for _ in range(layers))
        self.u = nn.Parameter(torch.zeros(heads, 1, width // heads))
        self.v = nn.Parameter(torch.zeros(heads, 1, width // heads))
        self.dropout = nn.Dropout(dropout)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        # The first memory stands among word embeddings, so it starts at their scale.
        self.memory = nn.Parameter(torch.randn(memory_size, width) * 0.02 * width**0.5)
        self.update = self.make_update(update, width)
        if memory_size:
            refuse_schedule(schedule)
        self.choose(schedule)

    def layout(self, length: int) -> Layout:
        memory, cache = self.memory_size, self.cache_length
        blocks = (("read memory", memory), ("cache", cache), ("text", length), ("write memory", memory))
        return Layout(blocks, written="write memory", unread="cache")

    def embed(self, input_ids: Tensor) -> Tensor:
        embedded: Tensor = self.embedding(input_ids)
        return embedded

    def memory_of(self, state: XLState) -> Tensor:
        return state.memory

    @contextmanager
    def recorded(self) -> Iterator[list[Tensor]]:
        found: list[Tensor] = []  # of each layer of each segment, (B, H, Q, K)
        segments: list[Tensor] = []

        def keep(_module: nn.Module, _scores: object, weights: Tensor) -> None:
            found.append(weights.detach().cpu())
            if len(found) == len(self.layers):
                kept = torch.stack(found)
                kept = kept.to(torch.promote_types(kept.dtype, torch.float32))
                # What is cached reads nothing any more: (L, B, H, K, K).
                before, after = kept.tensor_split([self.memory_size], dim=-2)
                unread = kept.new_zeros(*kept.shape[:-2], self.cache_length, kept.shape[-1])
                segments.append(torch.cat([before, unread, after], dim=-2))
                found.clear()

        hooks = [cast(Layer, layer).attention.register_forward_hook(keep) for layer in self.layers]
        # All layers of a segment, one after the other, make its map.
        schedule, self.schedule = self.schedule, "vertical"
        try:
            yield segments
        finally:
            self.schedule = schedule
            for hook in hooks:
                hook.remove()

    def initial_state(self, batch_size: int) -> XLState:
        """An empty cache, and the trained memory, the same for all."""
        return XLState(
            (self.memory.new_zeros(batch_size, self.cache_length, self.width),) * len(self.layers),
            torch.zeros(batch_size, dtype=torch.long, device=self.memory.device),
            self.memory.expand(batch_size, -1, -1),
        )

    def enter(self, segment: Segment, state: XLState) -> tuple[Tensor, Shared]:
        layout = self.layout(segment.input_ids.shape[1]).readers
        words = self.words(segment) * self.width**0.5
        memory = state.memory.to(words.dtype)
        hidden = self.dropout(torch.cat([memory, words, memory], dim=1))  # (B, Q, D)
        return hidden, Shared(layout, segment.attention_mask, self._relations(segment, state.cached, words.dtype))

    def cell(self, number: int, shared: Shared) -> CachingLayer:
        layer = cast(Layer, self.layers[number])
        return CachingLayer(layer, shared.layout.place("text"), shared.mask, shared.relations)

    def ahead(self, state: XLState, shared: Shared) -> XLState:
        text = shared.layout.place("text")
        read = text.stop - text.start if shared.mask is None else shared.mask.sum(dim=1)
        return state._replace(cached=(state.cached + read).clamp(max=self.cache_length))

    def leave(
        self, hidden: Tensor, layers: tuple[Tensor, ...], state: XLState, shared: Shared
    ) -> tuple[Tensor, XLState]:
        """RMT-2022, section 3.2: hidden states of the text (B, S, D), and the next state."""
        text, written = (hidden[:, shared.layout.place(name)] for name in ("text", shared.layout.written))
        cached = self.ahead(state, shared).cached
        return text, XLState(layers, cached, self.next_memory(written, state.memory))

    def _relations(self, segment: Segment, cached: Tensor, dtype: torch.dtype) -> Relations:
        size, cache, length = self.memory_size, self.cache_length, segment.input_ids.shape[1]
        # The first text token stands at 0; the write memory stands after a full text, also if this one is shorter.
        keys = torch.arange(-size - cache, length + size, device=cached.device)
        keys[size + cache + length :] += self.text_length - length
        queries = torch.cat([keys[:size], keys[size + cache :]])[:, None]
        # Memory tokens see each other in both directions; text never sees a token at a negative distance.
        nearest, farthest = min(0, 1 - size), cache + self.text_length + 2 * size
        encoding = sinusoids(torch.arange(nearest, farthest, device=keys.device), self.width, dtype)
        distance = (queries - keys - nearest).clamp(min=0)
        # What stands to the left is seen; a block of memory counts as one place, so that its tokens see each other.
        left = keys.clamp(-cache - 1, self.text_length) <= queries.clamp(-cache - 1, self.text_length)
        exists = (keys < -cache) | (keys >= -cached[:, None])  # (B, K)
        if segment.attention_mask is not None:
            exists[:, size + cache : size + cache + length] = segment.attention_mask.bool()
        return Relations(self.u, self.v, encoding, distance, (left & exists[:, None])[:, None])

    def saved_state(self, leaves: list[Tensor]) -> list[Tensor]:
        if leaves[0].dim() == 4:  # the caches of all layers were one tensor (B, L, C, D)
            return [*leaves[0].unbind(dim=1), *leaves[1:]]
        return leaves

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the token that follows each one of the text: (B, S, D) -> (B, S, V)."""
        return nn.functional.linear(hidden, self.embedding.weight)


class CachingLayer(NamedTuple):
    """A layer that has been told of a segment: where its text stands, (B, S) what of that is no padding, and distances.

    Transformer-XL, section 3.3.
    """

    layer: Layer
    text: slice
    mask: Tensor | None
    relations: Relations

    def __call__(self, hidden: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        """(B, Q, D) and the layer's cache (B, C, D) -> the same after it."""
        seen = torch.cat([hidden[:, : self.text.start], before, hidden[:, self.text.start :]], dim=1)  # (B, K, D)
        return self.layer(hidden, seen, self.relations), self._cache(before, hidden[:, self.text])

    def _cache(self, cache: Tensor, read: Tensor) -> Tensor:
        """The last C of what was cached (B, C, D) and has been read (B, S, D), without its padding or gradient."""
        both = torch.cat([cache, read.detach().to(cache.dtype)], dim=1)
        if self.mask is None:
            return both[:, read.shape[1] :]
        last = self.mask.sum(dim=1, keepdim=True) + torch.arange(cache.shape[1], device=cache.device)  # (B, C)
        return both.gather(1, last[:, :, None].expand(-1, -1, both.shape[2]))


class Layer(nn.Module):
    """Relative attention and a feed-forward network, each added to what it was given and normalized.

    Args:
        width: D.
        heads: H.
        dropout: of what is added.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.position = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.attention_norm = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, 4 * width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(4 * width, width)
        )
        self.feed_forward_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.attention = nn.Softmax(dim=-1)

    def forward(self, hidden: Tensor, seen: Tensor, relations: Relations) -> Tensor:
        """(B, Q, D) and what they may look at (B, K, D) -> (B, Q, D)."""
        hidden = self.attention_norm(hidden + self.dropout(self._attend(hidden, seen, relations)))
        return self.feed_forward_norm(hidden + self.dropout(self.feed_forward(hidden)))

    def _attend(self, hidden: Tensor, seen: Tensor, relations: Relations) -> Tensor:
        """The four terms of Transformer-XL, section 3.3; those with R once for each distance (appendix B)."""
        u, v, encoding, distance, visible = relations
        query = self._split(self.query(hidden))  # (B, H, Q, D/H)
        key, value = self._split(self.key(seen)), self._split(self.value(seen))  # (B, H, K, D/H)
        by_content = (query + u) @ key.mT  # (B, H, Q, K)
        by_distance = (query + v) @ self._split(self.position(encoding)).mT  # (B, H, Q, R)
        scores = by_content + by_distance.gather(-1, distance.expand(by_content.shape))
        # Not minus infinity: padding may see nothing, and must not become NaN.
        scores = (scores / query.shape[-1] ** 0.5).masked_fill(~visible, torch.finfo(scores.dtype).min)
        return self.output((self.attention(scores) @ value).transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        """(…, N, D) -> (…, H, N, D/H)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(-3, -2)


def sinusoids(distance: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """R of Transformer-XL: sines, then cosines (Vaswani et al. 2017, section 3.5): (R,) -> (R, D)."""
    frequency = 10_000 ** (-torch.arange(0, width, 2, device=distance.device, dtype=dtype) / width)
    angle = distance[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=-1)
