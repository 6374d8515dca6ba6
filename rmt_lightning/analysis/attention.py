"""What the memory does in each segment: whom it attends to, and how much of it is rewritten (RMT-2023, figure 6).

Shapes: B batch, T segments, S text tokens of a segment, M memory tokens, N tokens that the backbone sees of a segment,
L layers, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rmt_lightning.core.errors import UserError
from rmt_lightning.models.memory import Layout, MemoryTokens
from rmt_lightning.models.recurrence import Segment, unroll
from rmt_lightning.tasks.placement import Key, Piece, Placement, Sample, side_by_side

Part = Literal["noise", "fact", "question"]

# In a figure, the names of more tokens cannot be read.
MOST_TOKENS = 64


@dataclass(frozen=True)
class AttentionMap:
    """Who attends to whom in one segment.

    Attributes:
        tokens: N names.
        parts: what each token belongs to: "[CLS]", "memory", "[SEP]", "noise", "fact 1", "fact 2", … or "question". In
            causal models memory is "read memory" before the text and "write memory" after it, the token at which the
            answer is read is the "question end", and there may be a "cache" of earlier text.
        weights: (N, N); row i is how token i distributes its attention, and sums to 1. Those of a cache are zero.
    """

    tokens: tuple[str, ...]
    parts: tuple[str, ...]
    weights: np.ndarray

    @property
    def facts(self) -> tuple[str, ...]:
        """The facts that stand here, in order."""
        return tuple(dict.fromkeys(part for part in self.parts if part.startswith("fact")))

    @property
    def event(self) -> str:
        """What happens in the segment."""
        events = []
        if self.facts:
            numbers = ", ".join(fact.removeprefix("fact ") for fact in self.facts)
            events.append(f"fact {numbers} is written" if len(self.facts) == 1 else f"facts {numbers} are written")
        if self.asks:
            events.append(f"{self.answered_at} reads")
        return ", ".join(events) or "noise passes"

    @property
    def memories(self) -> tuple[str, ...]:
        """The parts that are memory, in order: the first is read, and the last is written."""
        return tuple(dict.fromkeys(part for part in self.parts if part.endswith("memory")))

    @property
    def asks(self) -> bool:
        return any(part.startswith("question") for part in self.parts)

    @property
    def answered_at(self) -> str:
        """The part at which an answer would be read."""
        return "[CLS]" if "[CLS]" in self.parts else "question end"

    @property
    def operation(self) -> tuple[str, tuple[str, ...]]:
        """Which part should attend to which: memory to facts, memory to itself, or the reader to memory and facts."""
        if self.asks:
            return self.answered_at, (self.memories[0], *self.facts)
        return self.memories[-1], self.facts or self.memories

    @property
    def share(self) -> float:
        """How much of its attention goes there."""
        reader, sources = self.operation
        rows, columns = np.isin(self.parts, [reader]), np.isin(self.parts, sources)
        return float(self.weights[rows][:, columns].sum(axis=1).mean())

    def folded(self) -> AttentionMap:
        """The same with each run of noise, and the cache, as one token: attention to it is summed, its own averaged."""
        runs = [list(run) for _, run in groupby(range(len(self.parts)), self._unit)]
        summed = np.stack([self.weights[:, run].sum(axis=1) for run in runs], axis=1)
        weights = np.stack([summed[run].mean(axis=0) for run in runs])
        tokens = tuple(self.tokens[run[0]] if len(run) == 1 else f"{len(run)} tokens" for run in runs)
        return AttentionMap(tokens, tuple(self.parts[run[0]] for run in runs), weights)

    def _unit(self, position: int) -> int:
        """Equal for neighbors that are folded together."""
        return {"noise": -1, "cache": -2}.get(self.parts[position], position)


def name_tokens(
    pieces: Iterable[Piece], tokenizer: PreTrainedTokenizerBase, layout: Layout
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The N tokens that a layer sees of a segment, and the part each belongs to (see `AttentionMap`)."""
    text = []
    for source, ids in pieces:
        part = source if isinstance(source, str) else f"fact {source + 1}"
        words = (cast(str, tokenizer.decode([token])) for token in ids.tolist())
        text += [(word.strip() or "␣", part) for word in words]
    named = []
    for block, size in layout.blocks:
        short = "mem" if block.endswith("memory") else block
        own = [(block if block.startswith("[") else f"[{short} {i + 1}]", block) for i in range(size)]
        named += text if block == "text" else own
    if "[CLS]" not in dict(layout.blocks) and text[-1][1] == "question":
        last = layout.place("text").stop - 1
        named[last] = (named[last][0], "question end")
    tokens, parts = zip(*named, strict=True)
    return tokens, parts


def select(weights: Tensor, layer: int | Literal["mean"], head: int | Literal["mean"]) -> np.ndarray:
    """One layer and head, counted from 1, of attention weights (L, H, N, N), or the mean over them: (N, N).

    Raises:
        UserError: if there is no such layer or head.
    """
    for name, wanted, size in (("layer", layer, len(weights)), ("head", head, weights.shape[1])):
        if wanted != "mean" and wanted > size:
            raise UserError(f"{name}={wanted}: the backbone has {name}s 1 to {size}; give one of them, or mean")
    of_layer = weights.mean(dim=0) if layer == "mean" else weights[layer - 1]  # (H, N, N)
    of_head = of_layer.mean(dim=0) if head == "mean" else of_layer[head - 1]
    return np.asarray(of_head)


@torch.inference_mode()
def watch(
    classify: Callable[[Tensor], Tensor],
    model: MemoryTokens[Any],
    tokenizer: PreTrainedTokenizerBase,
    sample: Sample,
    device: torch.device,
    layer: int | Literal["mean"] = "mean",
    head: int | Literal["mean"] = "mean",
) -> tuple[Tensor, list[AttentionMap]]:
    """Read a sample: the scores (C,) of its answers and the attention in its T segments, folded if they are long.

    Args:
        classify: takes segments (1, T, S), returns scores (1, C).
        model: what `classify` reads them with, on `device`, in evaluation mode.
        tokenizer: of the backbone.
        sample: not yet read.
        device: where segments are wanted.
        layer: counted from 1, or the mean over all of them.
        head: likewise.

    Raises:
        UserError: if there is no such layer or head.
    """
    woven = list(sample.pieces)
    segments = np.stack([np.concatenate([piece.ids for piece in pieces]) for pieces in woven])
    with model.recorded() as weights:
        scores = classify(torch.from_numpy(segments)[None].to(device))
    layout = model.layout(segments.shape[1])
    # One that writes its answer reads on after the last segment.
    maps = [
        AttentionMap(*name_tokens(pieces, tokenizer, layout), select(of_segment[:, 0], layer, head))
        for pieces, of_segment in zip(woven, weights[: len(woven)], strict=True)
    ]
    return scores[0], [one.folded() if len(one.tokens) > MOST_TOKENS else one for one in maps]


def choose_sample(placement: Placement, num_segments: int, among: int = 1000) -> int:
    """The number of the test sample in which the operations with memory are easiest to tell apart.

    In order of weight: the question stands alone, no facts share a segment, noise passes before the question, and some
    of it between the facts. Four segments with two facts are then fact 1, noise, fact 2, question.
    """

    def clarity(number: int) -> tuple[int, ...]:
        homes = placement.sample("test", Key(num_segments, number)).homes
        stated = set(homes)
        noise = set(range(min(homes), num_segments - 1)) - stated
        between = [segment for segment in noise if segment < max(homes)]
        return num_segments - 1 not in stated, len(stated) - len(homes), len(noise), len(between)

    return max(range(among), key=clarity)


def maps_to_rows(maps: Sequence[AttentionMap]) -> list[dict[str, Any]]:
    """Maps as the rows of a csv file: one for each token, with its attention to each token of its segment in order."""
    longest = max(len(attention.tokens) for attention in maps)
    return [
        {"segment": segment, "part": part, "token": token}
        | {str(n + 1): round(float(weights[n]), 6) if n < len(weights) else "" for n in range(longest)}
        for segment, attention in enumerate(maps, start=1)
        for part, token, weights in zip(attention.parts, attention.tokens, attention.weights, strict=True)
    ]


def maps_from_rows(rows: Iterable[Mapping[str, str]]) -> list[AttentionMap]:
    """The maps whose `maps_to_rows` a csv file holds."""
    maps = []
    for _, lines in groupby(rows, lambda row: row["segment"]):
        _, parts, tokens, *weights = zip(*(row.values() for row in lines), strict=True)
        maps.append(AttentionMap(tokens, parts, np.array(weights[: len(tokens)], dtype=float).T))
    return maps


@dataclass(frozen=True)
class Rewriting:
    """How much of its memory a model rewrites in one segment, over several texts.

    A memory token m that a segment turns into m' is rewritten by ‖m' - m‖ / ‖m'‖: 0 if it is kept, about √2 if what it
    held has nothing to do with what it holds now. (The divisor is the new norm because the first memory, a trained
    parameter, is much shorter than hidden states are; it is rewritten by about 1.)

    Attributes:
        segment: counted from 1.
        part: what the texts hold here besides noise: "fact", "question" (last segment), or nothing ("noise").
        texts: how many of them do.
        rewritten: mean over these texts and their memory tokens.
        low: 10% quantile over texts and memory tokens.
        high: 90% quantile.
        cosine: mean cosine of m and m'.
    """

    segment: int
    part: Part
    texts: int
    rewritten: float
    low: float
    high: float
    cosine: float


def rewriting(model: MemoryTokens[Any], segments: Iterable[Tensor], batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Read segments (B, S) one after the other in constant memory.

    Yields:
        For each, ‖m' - m‖ / ‖m'‖ and the cosine of m and m' for each memory token, (B, M) both.
    """
    state = model.initial_state(batch_size)
    before = model.memory_of(state)
    for _, left in unroll(model.step, map(Segment, segments), state):
        after = model.memory_of(left)
        rewritten = (after - before).norm(dim=-1) / after.norm(dim=-1)
        yield rewritten, torch.cosine_similarity(before, after, dim=-1)
        before = after


@torch.inference_mode()
def rewriting_curve(
    model: MemoryTokens[Any],
    placement: Placement,
    num_segments: int,
    texts: int,
    device: torch.device,
) -> Iterator[list[Rewriting]]:
    """Read test samples side by side and yield how much of the memory each segment rewrites, for each part it holds.

    Args:
        model: on `device`, in evaluation mode.
        placement: where the samples come from.
        num_segments: T.
        texts: B.
        device: where segments are wanted.
    """
    samples = [placement.sample("test", Key(num_segments, number)) for number in range(texts)]
    segments = side_by_side([(num_segments, sample.segments) for sample in samples])
    read = rewriting(model, (ids.to(device) for ids, _ in segments), texts)
    for segment, (rewritten, cosine) in enumerate(read):
        parts = np.array(["fact" if segment in sample.homes else "noise" for sample in samples], dtype=object)
        if segment == num_segments - 1:
            parts[:] = "question"
        yield [
            _summary(segment + 1, part, rewritten.cpu().numpy()[parts == part], cosine.cpu().numpy()[parts == part])
            for part in dict.fromkeys(parts)
        ]


def _summary(segment: int, part: Part, rewritten: np.ndarray, cosine: np.ndarray) -> Rewriting:
    numbers = (rewritten.mean(), *np.quantile(rewritten, (0.1, 0.9)), cosine.mean())
    return Rewriting(segment, part, len(rewritten), *(round(float(number), 6) for number in numbers))


def curve_from_rows(rows: Iterable[Mapping[str, str]]) -> list[Rewriting]:
    """The curve whose fields a csv file holds."""
    kinds: dict[str, Any] = {"segment": int, "part": str, "texts": int}
    return [Rewriting(**{key: kinds.get(key, float)(value) for key, value in row.items()}) for row in rows]
