"""Data in, matplotlib Figure out."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from rmt_lightning.core.files import write_atomically

if TYPE_CHECKING:
    from rmt_lightning.analysis.attention import AttentionMap, Rewriting
    from rmt_lightning.analysis.extrapolation import LengthResult
    from rmt_lightning.reporting.sweeps import Sweep

CHANCE = "0.6"
# Of Okabe and Ito's palette, which color-blind people can tell apart.
PART_COLORS = {"[CLS]": "black", "memory": "#0072b2", "fact": "#d55e00", "question": "#008060"}
OTHER_COLOR = "0.55"


def curriculum(
    history: Sequence[tuple[int, int, float]],
    lengths: Sequence[LengthResult],
    trained_to: int,
    chance: float,
    title: str,
    grown: str = "segments",
) -> Figure:
    """How a run learnt, stage by stage, and what it can do afterwards.

    Args:
        history: (step, stage, accuracy) of every validation.
        lengths: accuracy at each length of the final test.
        trained_to: segments of the last stage.
        chance: accuracy of guessing.
        title: names the run.
        grown: what the numbers of stages count.
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
        xlabel="optimizer step", ylabel="validation accuracy", ylim=(0, 1.1), title=f"Curriculum (numbers: {grown})"
    )

    # Those that were asked for in tokens stand among the others.
    lengths = sorted(lengths, key=lambda result: result.segments)
    numbers = [result.segments for result in lengths]
    accuracy = [result.accuracy for result in lengths]
    below = [result.accuracy - result.interval[0] for result in lengths]
    above = [result.interval[1] - result.accuracy for result in lengths]
    right.errorbar(numbers, accuracy, yerr=(below, above), fmt="o-", color="tab:orange", capsize=3, markersize=4)
    right.axvspan(min(numbers), trained_to, color="0.93", zorder=0)
    right.set_xscale("log", base=2)
    right.set_xticks(numbers, [str(number) for number in numbers])
    right.set(
        xlabel="segments of the input", ylabel="test accuracy", ylim=(0, 1.1), title="Test (gray: lengths trained on)"
    )
    for axes in (left, right):
        axes.axhline(chance, color=CHANCE, linestyle=":", linewidth=1)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def flops(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """What a longer input costs: full attention against RMT (RMT-2023, figure 3).

    Args:
        rows: of flops.csv: model, tokens, the FLOPs of full_attention and of rmt, and their ratio.
    """
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    lengths = list(dict.fromkeys(int(row["tokens"]) for row in rows))
    models = list(dict.fromkeys(row["model"] for row in rows))
    starts, ends = [], []
    for number, model in enumerate(models):
        own = [row for row in rows if row["model"] == model]
        full, rmt, ratio = ([float(row[column]) for row in own] for column in ("full_attention", "rmt", "ratio"))
        color = colormaps["viridis"](0.8 - 0.8 * (number + 1) / len(models))
        look: Any = {"color": color, "marker": "o", "markersize": 3, "markevery": [0, -1]}
        left.plot(lengths, full, "-", **look)
        left.plot(lengths, rmt, "--", linewidth=1, **look)
        right.plot(lengths, ratio, "-", **look)
        starts.append((model, lengths[0], full[0], color))
        ends.append((f"{model}  {times(ratio[-1])}", lengths[-1], ratio[-1], color))
    ticks = lengths[:: max(1, len(lengths) // 4)]
    for axes in (left, right):
        axes.set(xlabel="tokens of the input", xscale="log", yscale="log")
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], fontsize=9)
        axes.minorticks_off()
        axes.grid(color="0.93")
        axes.spines[["top", "right"]].set_visible(False)
    left.set(ylabel="FLOPs of a forward pass", title="Full attention (solid) and RMT (dashed)")
    left.set_xlim(lengths[0] / 12)
    right.set(ylabel="FLOPs of full attention / FLOPs of RMT", title="What RMT saves")
    right.yaxis.set_major_formatter("×{x:g}")
    _label(left, starts, "right")
    _label(right, ends, "left")
    return figure


def generalization(rows: Sequence[Mapping[str, Any]], chance: float) -> Figure:
    """How far each stage of a curriculum generalizes (RMT-2023, figure 5).

    Args:
        rows: stage, segments and accuracy of each stage's checkpoint on inputs of each length.
        chance: accuracy of guessing.
    """
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    stages = sorted({int(row["stage"]) for row in rows})
    for stage in stages:
        own = sorted((int(row["segments"]), float(row["accuracy"])) for row in rows if int(row["stage"]) == stage)
        color = colormaps["viridis"](0.9 * (1 - stage / max(stages)))
        axes.plot(*zip(*own, strict=True), "o-", color=color, markersize=4, label=str(stage))
    lengths = sorted({int(row["segments"]) for row in rows})
    axes.axhline(chance, color=CHANCE, linestyle=":", linewidth=1)
    axes.set(xlabel="segments of the input", ylabel="test accuracy", ylim=(0, 1.04), xticks=lengths)
    axes.legend(title="trained on", loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def perplexity(history: Sequence[tuple[int, float]], test: float, title: str) -> Figure:
    """How a language model learnt.

    Args:
        history: (step, perplexity) of every validation.
        test: perplexity of the final test.
        title: names the run.
    """
    figure = Figure(figsize=(5, 3.6), layout="constrained")
    axes = figure.subplots()
    steps, values = [step for step, _ in history], [value for _, value in history]
    axes.plot(steps, values, "o-", color="tab:blue", markersize=3.5, label="validation")
    axes.axhline(test, color="tab:orange", linestyle="--", linewidth=1, label=f"test: {test:.2f}")
    axes.set(xlabel="optimizer step", ylabel="perplexity", title=title)
    axes.set_yscale("log")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def times(ratio: float) -> str:
    """How a ratio is written: ×295, ×1.4."""
    return f"×{ratio:,.{0 if ratio >= 10 else 1}f}"


def _label(axes: Axes, points: Iterable[tuple[str, float, float, Any]], align: Literal["left", "right"]) -> None:
    """Write a text beside each point (text, x, y, color), pushed down where it would overlap the one above."""
    low, high = np.log10(axes.get_ylim())
    place = math.inf
    for text, x, y, color in sorted(points, key=lambda point: -point[2]):
        place = min(math.log10(y), place - 0.04 * (high - low))
        offset = 6 if align == "left" else -6
        axes.annotate(
            text, (x, 10**place), xytext=(offset, 0), textcoords="offset points", ha=align, va="center",
            color=color, fontsize=8, annotation_clip=False,
        )  # fmt: skip


def save(figure: Figure, path: Path) -> None:
    """Write `<path>.png` and `<path>.pdf`, each whole or not at all. The same figure gives the same bytes."""
    for kind in ("png", "pdf"):
        write_atomically(path.with_name(f"{path.name}.{kind}"), rendered(figure, kind))


def rendered(figure: Figure, kind: Literal["png", "pdf"] = "png") -> bytes:
    """A figure as a picture."""
    content = io.BytesIO()
    figure.savefig(content, format=kind, dpi=150, metadata={"CreationDate": None} if kind == "pdf" else {})
    return content.getvalue()


def sweep(sweep: Sweep) -> Figure:
    """What came of a sweep: curves along one axis, a heat map over two, else points along each axis.

    Args:
        sweep: with at least one result.
    """
    panels = len(sweep.axes or sweep.values) if sweep.form == "slices" else 1
    figure = Figure(figsize=(1.5 + 4.5 * panels, 4.2), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False, sharey=True)[0]
    figure.suptitle(sweep.name, fontsize=10)
    if sweep.form == "map":
        _sweep_map(axes[0], sweep)
        return figure
    if sweep.form == "capacity":
        _sweep_capacity(axes[0], sweep)
        return figure
    if sweep.form == "curves":
        _sweep_curves(axes[0], sweep)
    else:
        _sweep_slices(axes, sweep)
    for part in axes:
        part.spines[["top", "right"]].set_visible(False)
        if sweep.of_accuracy:
            part.set_ylim(0, 1.04)
    axes[0].set_ylabel("test accuracy" if sweep.of_accuracy else sweep.drawn[-1])
    return figure


def _sweep_curves(axes: Axes, sweep: Sweep) -> None:
    """A line through the means over seeds for each measure, with 95% intervals, and a dot for each seed."""
    from rmt_lightning.reporting.sweeps import in_words  # brings pandas

    (axis,) = sweep.axes
    places = {str(value): place for place, value in enumerate(sweep.tried(axis))}
    for number, name in enumerate(sweep.drawn):
        color = colormaps["viridis"](0.9 - 0.9 * number / max(1, len(sweep.drawn) - 1))
        means = [
            (places[str(group.values[axis])], found) for group in sweep.groups if (found := group.scores.get(name))
        ]
        axes.errorbar(
            [place for place, _ in means], [found.value for _, found in means],
            yerr=[found.half or 0 for _, found in means], fmt="-", color=color, capsize=3, label=in_words(name),
        )  # fmt: skip
        dots = [(places[str(job.values[axis])], job.scores[name]) for job in sweep.jobs if name in job.scores]
        axes.plot(*zip(*dots, strict=True), "o", color=color, markersize=4, alpha=0.6)
    axes.set_xticks(range(len(places)), list(places))
    axes.set(xlabel=axis)
    if len(sweep.drawn) > 1:
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8)


def _sweep_capacity(axes: Axes, sweep: Sweep) -> None:
    """How many pairs are held, of how many that were told: means over seeds with 95% intervals, a dot for each seed."""
    from rmt_lightning.reporting.sweeps import CAPACITY, PAIRS  # brings pandas

    (other,) = (axis for axis in sweep.axes if axis != PAIRS)
    told = sorted(sweep.tried(PAIRS))
    axes.plot(told, told, ":", color="0.6", label="all")
    for number, value in enumerate(sweep.tried(other)):
        means = sorted(
            (group.values[PAIRS], found.value, found.half or 0)
            for group in sweep.groups
            if group.values[other] == value and (found := group.scores.get(CAPACITY))
        )
        if not means:
            continue
        pairs, held, half = zip(*means, strict=True)
        style: Any = {"color": f"C{number % 10}", "marker": _MARKERS[number % len(_MARKERS)], "markersize": 5}
        axes.errorbar(pairs, held, yerr=half, capsize=3, label=str(value), **style)
        dots = [job for job in sweep.jobs if job.values.get(other) == value and CAPACITY in job.scores]
        axes.plot(
            [job.values[PAIRS] for job in dots], [job.scores[CAPACITY] for job in dots], ls="", alpha=0.4, **style
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(told, [str(count) for count in told])
    axes.set(xlabel="pairs told", ylabel="pairs held")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(title=other, frameon=False, fontsize=8)


def _sweep_map(axes: Axes, sweep: Sweep) -> None:
    """Means over seeds of the measure that counts, in a cell for each pair of values."""
    from rmt_lightning.reporting.sweeps import in_words, with_interval  # brings pandas

    (across, up), name = sweep.axes, sweep.drawn[-1]
    columns, rows = ([str(value) for value in sweep.tried(axis)] for axis in (across, up))
    values = np.full((len(rows), len(columns)), np.nan)
    for group in sweep.groups:
        if found := group.scores.get(name):
            row, column = rows.index(str(group.values[up])), columns.index(str(group.values[across]))
            values[row, column] = found.value
            text = with_interval(name, found).replace(" ± ", "\n± ")
            axes.text(column, row, text, ha="center", va="center", fontsize=8, bbox=_ON_CELL)
    limits: Any = {"vmin": 0, "vmax": 1} if sweep.of_accuracy else {}
    image = axes.imshow(
        values, cmap="viridis" if sweep.of_accuracy else "viridis_r", origin="lower", aspect="auto", **limits
    )
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.set(xlabel=across, ylabel=up)
    assert axes.figure is not None
    axes.figure.colorbar(image, label=f"test accuracy {in_words(name)}" if sweep.of_accuracy else name)


_MARKERS = "osD^vP"
_ON_CELL = {"boxstyle": "round", "facecolor": "white", "edgecolor": "none", "alpha": 0.7}


def _sweep_slices(panels: Iterable[Axes], sweep: Sweep) -> None:
    """The measure that counts along each axis, a dot for each job."""
    from rmt_lightning.reporting.sweeps import in_words  # brings pandas

    name = sweep.drawn[-1]
    done = [job for job in sweep.jobs if name in job.scores]
    for axes, axis in zip(panels, sweep.axes or sweep.values, strict=True):
        scale = sweep.scale(axis)
        values = [job.values[axis] if scale else str(job.values[axis]) for job in done]
        axes.plot(values, [job.scores[name] for job in done], "o", alpha=0.6)
        if scale:
            axes.set_xscale(scale)
        axes.set(xlabel=axis, title=in_words(name) if sweep.of_accuracy else "")


def attention(maps: Sequence[AttentionMap], title: str) -> Figure:
    """What [CLS], memory, facts and question attend to in each segment of an input (RMT-2023, figure 6).

    Framed is the operation with memory that the segment is for. All cells have the same size.

    Args:
        maps: of the segments, in order.
        title: names the run, the layer and the head.
    """
    widest = max(len(one.tokens) for one in maps)
    columns = 1 if widest > 40 else min(2, len(maps))
    readers = [
        [place for place, part in enumerate(one.parts) if part not in ("noise", "cache", "[SEP]")] for one in maps
    ]
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
    """Name the tokens on both axes in the colors of their parts, and frame the operation."""
    parts = [one.parts[place] for place in shown]
    names = [token if len(token) <= 14 else f"{token[:13]}…" for token in one.tokens]
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=8, parse_math=False)
    axes.set_yticks(range(len(shown)), [names[place] for place in shown], fontsize=8, parse_math=False)
    axes.tick_params(length=1.5, pad=1.5)
    for label, part in zip([*axes.get_xticklabels(), *axes.get_yticklabels()], [*one.parts, *parts], strict=True):
        label.set_color(_color(part))
    reader, sources = one.operation
    for top, bottom in _runs(parts, (reader,)):
        for left, right in _runs(one.parts, sources):
            corner = (left - 0.5, top - 0.5)
            color = _color(sources[0])
            axes.add_patch(Rectangle(corner, right - left, bottom - top, fill=False, edgecolor=color, linewidth=1.5))


def _color(part: str) -> str:
    """Of "fact 2" that of a fact, and of "read memory" that of memory."""
    return next((PART_COLORS[word] for word in part.split(" ") if word in PART_COLORS), OTHER_COLOR)


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
        color = PART_COLORS["memory"]
        axes.plot(segments, mean, "-", color=color, linewidth=1.5, label="noise passes")
        axes.fill_between(segments, low, high, color=color, alpha=0.2, linewidth=0, label="10% to 90%")
    for part, marker, label in (("fact", "o", "a fact is written"), ("question", "s", "the question is asked")):
        points = [(point.segment, point.rewritten) for point in curve if point.part == part]
        if points:
            axes.plot(*zip(*points, strict=True), marker, color=PART_COLORS[part], markersize=4.5, label=label)
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
