"""Data in, matplotlib Figure out."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from rmt_lightning.analysis.attention import AttentionMap, Rewriting
from rmt_lightning.analysis.extrapolation import LengthResult

CHANCE = "0.6"
# Of Okabe and Ito's palette, which colour-blind people can tell apart.
PART_COLOURS = {"[CLS]": "black", "memory": "#0072b2", "fact": "#d55e00", "question": "#008060"}
OTHER_COLOUR = "0.55"


def curriculum(
    history: Sequence[tuple[int, int, float]],
    lengths: Sequence[LengthResult],
    trained_to: int,
    chance: float,
    title: str,
) -> Figure:
    """How a run learnt, stage by stage, and what it can do afterwards.

    Args:
        history: (step, stage, accuracy) of every validation.
        lengths: accuracy at each length of the final test.
        trained_to: segments of the last stage.
        chance: accuracy of guessing.
        title: names the run.
    """
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    figure.suptitle(title)

    stages = sorted({stage for _, stage, _ in history})
    for stage in stages:
        points = [(step, accuracy) for step, of, accuracy in history if of == stage]
        shade = 0.25 + 0.75 * stage / max(stages)
        left.plot(*zip(*points, strict=True), "o-", color=(0.1, 0.3, 0.6, shade), markersize=3.5)
        left.annotate(str(stage), points[-1], textcoords="offset points", xytext=(0, 5), ha="center", fontsize=8)
    left.set(
        xlabel="optimizer step", ylabel="validation accuracy", ylim=(0, 1.1), title="Curriculum (numbers: segments)"
    )

    numbers = [result.segments for result in lengths]
    accuracy = [result.accuracy for result in lengths]
    below = [result.accuracy - result.interval[0] for result in lengths]
    above = [result.interval[1] - result.accuracy for result in lengths]
    right.errorbar(numbers, accuracy, yerr=(below, above), fmt="o-", color="tab:orange", capsize=3, markersize=4)
    right.axvspan(min(numbers), trained_to, color="0.93", zorder=0)
    right.set_xscale("log", base=2)
    right.set_xticks(numbers, [str(number) for number in numbers])
    right.set(
        xlabel="segments of the input", ylabel="test accuracy", ylim=(0, 1.1), title="Test (grey: lengths trained on)"
    )
    for axes in (left, right):
        axes.axhline(chance, color=CHANCE, linestyle=":", linewidth=1)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def attention(maps: Sequence[AttentionMap], title: str) -> Figure:
    """What [CLS], memory, facts and question attend to in each segment of an input (RMT-2023, figure 6).

    Framed is the operation with memory that the segment is for. All cells have the same size.

    Args:
        maps: of the segments, in order.
        title: names the run, the layer and the head.
    """
    widest = max(len(one.tokens) for one in maps)
    columns = 1 if widest > 40 else min(2, len(maps))
    readers = [[place for place, part in enumerate(one.parts) if part not in ("noise", "[SEP]")] for one in maps]
    # Inches: a cell, and what names of tokens and titles take around a panel.
    cell, left, below, above, right = 0.16, 0.85, 0.95, 0.45, 0.9
    rows = [max(map(len, readers[first : first + columns])) for first in range(0, len(maps), columns)]
    width = columns * (left + cell * widest) + right
    height = sum(above + cell * row + below for row in rows) + above
    figure = Figure(figsize=(width, height))
    figure.suptitle(title, x=left / width, y=1 - 0.15 / height, ha="left", parse_math=False)
    # The root lets small weights be seen: among 64 tokens an even share is 1.6%.
    norm = PowerNorm(0.5, vmin=0, vmax=max(one.weights[shown].max() for one, shown in zip(maps, readers, strict=True)))
    for number, (one, shown) in enumerate(zip(maps, readers, strict=True)):
        row, column = divmod(number, columns)
        x = left + column * (left + cell * widest)
        top = height - above - sum(above + cell * size + below for size in rows[:row]) - above
        box = (x, top - cell * len(shown), cell * len(one.tokens), cell * len(shown))
        axes = figure.add_axes((box[0] / width, box[1] / height, box[2] / width, box[3] / height))
        image = axes.imshow(one.weights[shown], cmap="Greys", norm=norm, aspect="auto")
        _annotate(axes, one, shown)
        reader, sources = one.operation
        share = f"{reader} attends to {', '.join(sources)} with {one.share:.0%}"
        axes.set_title(f"segment {number + 1}: {one.event}\n{share}", fontsize=9, loc="left")
    bar = figure.add_axes((1 - 0.75 / width, 1 - (2 * above + 2) / height, 0.12 / width, 2 / height))
    figure.colorbar(image, cax=bar, label="attention")
    return figure


def _annotate(axes: Axes, one: AttentionMap, shown: Sequence[int]) -> None:
    """Name the tokens on both axes in the colours of their parts, and frame the operation."""
    parts = [one.parts[place] for place in shown]
    names = [token if len(token) <= 14 else f"{token[:13]}…" for token in one.tokens]
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=8, parse_math=False)
    axes.set_yticks(range(len(shown)), [names[place] for place in shown], fontsize=8, parse_math=False)
    axes.tick_params(length=1.5, pad=1.5)
    for label, part in zip([*axes.get_xticklabels(), *axes.get_yticklabels()], [*one.parts, *parts], strict=True):
        label.set_color(_colour(part))
    reader, sources = one.operation
    for top, bottom in _runs(parts, (reader,)):
        for left, right in _runs(one.parts, sources):
            corner = (left - 0.5, top - 0.5)
            colour = _colour(sources[0])
            axes.add_patch(Rectangle(corner, right - left, bottom - top, fill=False, edgecolor=colour, linewidth=1.5))


def _colour(part: str) -> str:
    return PART_COLOURS.get(part.split(" ")[0], OTHER_COLOUR)


def _runs(parts: Sequence[str], wanted: Sequence[str]) -> list[tuple[int, int]]:
    """Where neighbours that belong to `wanted` begin and end."""
    runs = [list(run) for _, run in groupby(range(len(parts)), lambda place: parts[place] in wanted)]
    return [(run[0], run[-1] + 1) for run in runs if parts[run[0]] in wanted]


def rewriting(curve: Sequence[Rewriting], title: str) -> Figure:
    """How much of its memory a model rewrites in each segment, and where facts stand.

    Args:
        curve: of segments in order; a segment in which texts differ comes once for each part.
        title: names the run.
    """
    figure = Figure(figsize=(7, 3.8), layout="constrained")
    axes = figure.subplots()
    longest = max(point.segment for point in curve)
    noise = [point for point in curve if point.part == "noise"]
    if noise:
        segments, mean, low, high = _binned([(p.segment, p.rewritten, p.low, p.high) for p in noise])
        colour = PART_COLOURS["memory"]
        axes.plot(segments, mean, "-", color=colour, linewidth=1.5, label="noise passes")
        axes.fill_between(segments, low, high, color=colour, alpha=0.2, linewidth=0, label="10% to 90%")
    for part, marker, label in (("fact", "o", "a fact is written"), ("question", "s", "the question is asked")):
        points = [(point.segment, point.rewritten) for point in curve if point.part == part]
        if points:
            axes.plot(*zip(*points, strict=True), marker, color=PART_COLOURS[part], markersize=4.5, label=label)
    axes.axhline(2**0.5, color=CHANCE, linestyle=":", linewidth=1)
    axes.annotate("√2: unrelated to what it was", (1, 2**0.5), textcoords="offset points", xytext=(0, 3), fontsize=8)
    axes.set_xscale("log", base=2)
    ticks = [2**power for power in range((longest - 1).bit_length() + 1)]
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.set(xlabel="segment", ylabel="rewritten  ‖m′ − m‖ / ‖m′‖", xlim=(0.9, 1.15 * longest), ylim=(0, None))
    axes.set_title(title, fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure


def _binned(points: Sequence[tuple[float, ...]], bins: int = 96) -> np.ndarray:
    """Means over neighbours that would stand on top of each other on a logarithmic axis; first column: where."""
    table = np.array(points)
    edges = np.geomspace(1, table[:, 0].max() + 1, bins + 1)
    _, inverse = np.unique(np.digitize(table[:, 0], edges), return_inverse=True)
    counts = np.bincount(inverse)
    return np.stack([np.bincount(inverse, weights=column) / counts for column in table.T])
