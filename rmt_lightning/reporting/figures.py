"""Data in, matplotlib Figure out, in the style that is on (see style.py)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, cycle, groupby
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from rmt_lightning.core.statistics import wilson
from rmt_lightning.reporting import style
from rmt_lightning.reporting.style import CHANCE, Curve, Look, Place, canvas, looks, shade, styled

if TYPE_CHECKING:
    from rmt_lightning.analysis.attention import AttentionMap, Rewriting
    from rmt_lightning.reporting.sweeps import Sweep

# Of Okabe and Ito's palette, which color-blind people can tell apart.
PART_COLORS = {"[CLS]": "black", "memory": "#0072b2", "fact": "#d55e00", "question": "#008060"}
OTHER_COLOR = "0.55"
_ACCURACY = "test accuracy\n(95% interval)"


@styled()
def lengths(
    curves: Sequence[Curve],
    memory: Sequence[Curve] = (),
    chances: Iterable[float] = (),
    trained_to: float | None = None,
    axis: str = "segments of the input",
    lowest: float = 0,
) -> Figure:
    """Accuracy against the length of the input, and in a panel of its own the memory that it takes.

    Args:
        curves: of accuracy.
        memory: of megabytes; there may be none.
        chances: accuracies of guessing.
        trained_to: the longest inputs of training, if they are the same for all curves.
        axis: what lengths are counted in.
        lowest: accuracy that is drawn.
    """
    figure, panels = canvas(1 + bool(memory))
    style.draw(panels[0], curves)
    named = style.accuracy(panels[0], _ACCURACY, chances, lowest)
    for axes, drawn in zip(panels, (curves, memory), strict=False):
        numbers = [place.x for curve in drawn for place in curve.places]
        style.lengths(axes, numbers, axis)
        if trained_to:
            axes.axvspan(min(numbers), trained_to, color="0.94", zorder=0)
    if memory:
        style.draw(panels[1], memory)
        panels[1].set(ylabel="peak memory (MB)", ylim=(0, 1.05 * panels[1].get_ylim()[1]))
    style.name(figure, panels, curves, named)
    return figure


@styled()
def retention(curves: Sequence[Curve], chances: Iterable[float] = ()) -> Figure:
    """Which share of memories still answers, by the number of segments they have read."""
    figure, (axes,) = canvas()
    style.draw(axes, curves)
    named = style.accuracy(axes, "memories that answer\n(95% interval)", chances)
    axes.set(xlabel="segments read since", xlim=(0, None))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    style.name(figure, [axes], curves, named)
    return figure


@styled()
def stages(steps: Sequence[Curve], accuracies: Sequence[Curve], chances: Iterable[float] = ()) -> Figure:
    """How long each stage of a curriculum took to be passed, and how right the answers were at its end."""
    figure, panels = canvas(2)
    style.draw(panels[0], steps)
    style.draw(panels[1], accuracies)
    panels[0].set(ylabel="optimizer steps\nuntil it is passed", ylim=(0, None))
    panels[0].yaxis.set_major_formatter("{x:,.0f}")
    named = style.accuracy(panels[1], "accuracy at its end\n(95% interval)", chances)
    numbers = [place.x for curve in accuracies for place in curve.places]
    for axes in panels:
        axes.set(xlabel="stage", xlim=(min(numbers) - 0.2, max(numbers) + 0.2))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if not any(curve.places for curve in steps):
        panels[0].set_yticks([])
        panels[0].text(0.5, 0.5, "no stage was passed", ha="center", transform=panels[0].transAxes)
    style.name(figure, panels, steps, named)
    return figure


@styled()
def capacity(curves: Sequence[Curve], title: str = "", dots: Sequence[Curve] = ()) -> Figure:
    """How many pairs are held, of how many that were told.

    Args:
        title: what the names of curves are values of.
        dots: single results behind means.
    """
    figure, (axes,) = canvas()
    told = sorted({place.x for curve in curves for place in curve.places})
    (all_of_them,) = axes.plot(told, told, ":", color=CHANCE, linewidth=1, label="all")
    style.draw(axes, curves)
    for curve in dots:
        x, y, *_ = zip(*curve.places, strict=True)
        axes.plot(x, y, curve.look.marker, color=curve.look.color, alpha=0.4)
    style.lengths(axes, told, "pairs told")
    axes.set_ylabel("pairs held\n(95% interval)")
    style.name(figure, [axes], curves, [all_of_them], title)
    return figure


@styled()
def curriculum(
    history: Sequence[tuple[int, int, float]],
    tests: Sequence[Place],
    trained_to: int,
    chance: float | None,
    title: str,
    grown: str = "segments",
    samples: int | None = None,
) -> Figure:
    """How a run learnt, stage by stage, and what it can do afterwards.

    Args:
        history: (step, stage, accuracy) of every validation.
        tests: accuracy at each length of the final test.
        trained_to: segments of the last stage.
        chance: accuracy of guessing.
        title: names the run.
        grown: what the numbers of stages count.
        samples: of a validation; None if that is not known.
    """
    figure, (left, right) = canvas(2)
    figure.suptitle(title, x=0.01, ha="left", parse_math=False)
    chances = [] if chance is None else [chance]

    numbers = sorted({stage for _, stage, _ in history})
    for stage in numbers:
        own = [(step, accuracy) for step, of, accuracy in history if of == stage]
        places = [Place(step, accuracy, *wilson(accuracy, samples)) for step, accuracy in own]
        style.draw(left, [Curve("", Look(shade(stage / max(numbers))), places)])
        left.annotate(str(stage), own[-1], xytext=(0, 5), textcoords="offset points", ha="center", fontsize="small")
    style.accuracy(left, "validation accuracy\n(95% interval)", chances)
    left.set(xlabel="optimizer step", ylim=(0, 1.1), title=f"Curriculum (numbers: {grown})")

    style.draw(right, [Curve("", looks([""])[0], sorted(tests))])
    style.accuracy(right, _ACCURACY, chances)
    style.lengths(right, [place.x for place in tests])
    right.axvspan(min(place.x for place in tests), trained_to, color="0.94", zorder=0)
    right.set(ylim=(0, 1.1), title="Test (gray: lengths trained on)")
    return figure


def curriculum_of(
    stages: Sequence[Mapping[str, str]], logged: Sequence[Mapping[str, str]], tests: Sequence[Mapping[str, str]],
    chance: float, title: str, samples: int,
) -> Figure:  # fmt: skip
    """The same from csv files: stages.csv, metrics.csv and evaluation.csv of a run."""
    ends = list(accumulate(int(row["steps"]) for row in stages))
    validations = [(int(row["step"]), float(row["val/accuracy"])) for row in logged if row["val/accuracy"]]
    # Steps are counted from 0 there.
    history = [(step + 1, 1 + sum(step >= end for end in ends), accuracy) for step, accuracy in validations]
    places = style.curve("", looks([""])[0], tests).places
    return curriculum(history, places, len(stages), chance, title, samples=samples)


@styled()
def flops(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """What a longer input costs: full attention against RMT (RMT-2023, figure 3).

    Args:
        rows: of flops.csv: model, tokens, the FLOPs of full_attention and of rmt, and their ratio.
    """
    figure, (left, right) = canvas(2, 3.2)
    tokens = list(dict.fromkeys(int(row["tokens"]) for row in rows))
    models = list(dict.fromkeys(row["model"] for row in rows))
    starts, ends = [], []
    for number, model in enumerate(models):
        own = [row for row in rows if row["model"] == model]
        full, rmt, ratio = ([float(row[column]) for row in own] for column in ("full_attention", "rmt", "ratio"))
        color = shade((number + 1) / len(models))
        look: Any = {"color": color, "marker": "o", "markevery": [0, -1]}
        left.plot(tokens, full, "-", **look)
        left.plot(tokens, rmt, "--", **look)
        right.plot(tokens, ratio, "-", **look)
        starts.append((model, (tokens[0], full[0]), color))
        ends.append((f"{model}  {times(ratio[-1])}", (tokens[-1], ratio[-1]), color))
    ticks = tokens[:: max(1, len(tokens) // 3)]
    for axes in (left, right):
        axes.set(xlabel="tokens of the input", xscale="log", yscale="log")
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.minorticks_off()
        axes.grid(color="0.93")
    left.set(ylabel="FLOPs of a forward pass", title="Full attention (solid) and RMT (dashed)")
    left.set_xlim(tokens[0] / 40)
    right.set(ylabel="FLOPs of full attention\nover those of RMT", title="What RMT saves")
    right.yaxis.set_major_formatter("×{x:g}")
    style.label(figure, right, ends)
    style.label(figure, left, starts, left=True)
    return figure


@styled()
def generalization(rows: Sequence[Mapping[str, Any]], chance: float) -> Figure:
    """How far each stage of a curriculum generalizes (RMT-2023, figure 5).

    Args:
        rows: stage, segments and accuracy of each stage's checkpoint on inputs of each length, and the ends of its 95%
            interval, low and high.
        chance: accuracy of guessing.
    """
    figure, (axes,) = canvas()
    numbers = sorted({int(row["stage"]) for row in rows})
    curves = [
        style.curve(
            str(stage), Look(shade(stage / max(numbers)), marker), (r for r in rows if int(r["stage"]) == stage)
        )
        for stage, marker in zip(numbers, cycle(style.MARKERS), strict=False)
    ]
    style.draw(axes, curves)
    named = style.accuracy(axes, _ACCURACY, [chance])
    axes.set(xlabel="segments of the input", xticks=sorted({int(row["segments"]) for row in rows}))
    style.name(figure, [axes], curves, named, "trained on")
    return figure


@styled()
def perplexity(history: Sequence[tuple[int, float]], test: float, title: str) -> Figure:
    """How a language model learnt.

    Args:
        history: (step, perplexity) of every validation.
        test: perplexity of the final test.
        title: names the run.
    """
    figure, (axes,) = canvas()
    (line,) = axes.plot(*zip(*history, strict=True), "o-", color=looks([""])[0].color, label="validation")
    end = axes.axhline(test, color=CHANCE, linestyle="--", linewidth=1, label=f"test: {test:.2f}")
    axes.set(xlabel="optimizer step", ylabel="perplexity", yscale="log")
    axes.set_title(title, parse_math=False)
    style.name(figure, [axes], [], [line, end])
    return figure


def times(ratio: float) -> str:
    """How a ratio is written: ×295, ×1.4."""
    return f"×{ratio:,.{0 if ratio >= 10 else 1}f}"


@styled()
def sweep(sweep: Sweep) -> Figure:
    """What came of a sweep with at least one result: curves along one axis, a heat map over two, else points."""
    if sweep.form == "capacity":
        return _sweep_capacity(sweep)
    if sweep.form == "map":
        return _sweep_map(sweep)
    return _sweep_curves(sweep) if sweep.form == "curves" else _sweep_slices(sweep)


def _sweep_curves(sweep: Sweep) -> Figure:
    """A line through the means over seeds for each measure, with 95% intervals, and a dot for each seed."""
    from rmt_lightning.reporting.sweeps import in_words  # brings pandas

    (axis,) = sweep.axes
    where = {str(value): place for place, value in enumerate(sweep.tried(axis))}
    figure, (axes,) = canvas()
    curves = []
    for number, name in enumerate(sweep.drawn):
        look = Look(shade(number / max(1, len(sweep.drawn) - 1)), style.MARKERS[number % len(style.MARKERS)])
        places = [
            Place(where[str(group.values[axis])], found.value, *group.interval(name))
            for group in sweep.groups
            if (found := group.scores.get(name))
        ]
        curves.append(Curve(in_words(name), look, sorted(places)))
        dots = [(where[str(job.values[axis])], job.scores[name]) for job in sweep.jobs if name in job.scores]
        axes.plot(*zip(*dots, strict=True), look.marker, color=look.color, alpha=0.4)
    style.draw(axes, curves)
    axes.set_xticks(range(len(where)), list(where))
    axes.set_xlabel(axis)
    named = _sweep_scale(axes, sweep)
    style.name(figure, [axes], curves, named)
    return figure


def _sweep_scale(axes: Axes, sweep: Sweep) -> list[Any]:
    if sweep.of_accuracy:
        return list(style.accuracy(axes, _ACCURACY, sweep.chances))
    axes.set_ylabel(f"{sweep.drawn[-1]}\n(95% interval)")
    return []


def _sweep_capacity(sweep: Sweep) -> Figure:
    """How many pairs are held, of how many that were told: means over seeds with 95% intervals, a dot for each seed."""
    from rmt_lightning.reporting.sweeps import CAPACITY, PAIRS  # brings pandas

    (other,) = (axis for axis in sweep.axes if axis != PAIRS)
    tried = sweep.tried(other)
    curves, dots = [], []
    for value, look in zip(tried, looks([str(value) for value in tried]), strict=True):
        places = [
            Place(group.values[PAIRS], found.value, *group.interval(CAPACITY))
            for group in sweep.groups
            if group.values[other] == value and (found := group.scores.get(CAPACITY))
        ]
        if places:
            curves.append(Curve(str(value), look, sorted(places)))
            done = [job for job in sweep.jobs if job.values.get(other) == value and CAPACITY in job.scores]
            dots.append(Curve("", look, [Place(job.values[PAIRS], job.scores[CAPACITY]) for job in done]))
    return capacity(curves, other, dots)


def _sweep_map(sweep: Sweep) -> Figure:
    """Means over seeds of the measure that counts, in a cell for each pair of values."""
    from rmt_lightning.reporting.sweeps import in_words, written  # brings pandas

    (across, up), name = sweep.axes, sweep.drawn[-1]
    columns, rows = ([str(value) for value in sweep.tried(axis)] for axis in (across, up))
    figure, (axes,) = canvas()
    values = np.full((len(rows), len(columns)), np.nan)
    for group in sweep.groups:
        if found := group.scores.get(name):
            row, column = rows.index(str(group.values[up])), columns.index(str(group.values[across]))
            values[row, column] = found.value
            text = written(name, found.value)
            if found.half is not None:
                text += f"\n± {written(name, found.half)}"
            elif not np.isnan(group.interval(name)[0]):
                text += "\n" + " – ".join(written(name, end) for end in group.interval(name))
            axes.text(column, row, text, ha="center", va="center", fontsize="small", bbox=_ON_CELL)
    limits: Any = {"vmin": 0, "vmax": 1} if sweep.of_accuracy else {}
    axes.spines[:].set_visible(True)
    image = axes.imshow(
        values, cmap="viridis" if sweep.of_accuracy else "viridis_r", origin="lower", aspect="auto", **limits
    )
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.set(xlabel=across, ylabel=up)
    figure.colorbar(image, label=f"test accuracy {in_words(name)}" if sweep.of_accuracy else name)
    return figure


_ON_CELL = {"boxstyle": "round", "facecolor": "white", "edgecolor": "none", "alpha": 0.7}


def _sweep_slices(sweep: Sweep) -> Figure:
    """The measure that counts along each axis, a dot with its interval for each job."""
    from rmt_lightning.reporting.sweeps import in_words  # brings pandas

    name = sweep.drawn[-1]
    done = [job for job in sweep.jobs if name in job.scores]
    swept = sweep.axes or sweep.values
    figure, panels = canvas(len(swept))
    for axes, axis in zip(panels, swept, strict=True):
        scale = sweep.scale(axis)
        values = [job.values[axis] if scale else str(job.values[axis]) for job in done]
        scores = np.array([job.scores[name] for job in done])
        ends = np.array([job.interval(name) for job in done]).T
        color = looks([""])[0].color
        axes.errorbar(values, scores, abs(ends - scores), fmt="o", color=color, alpha=0.6, elinewidth=0.6)
        if scale:
            axes.set_xscale(scale)
        axes.set(xlabel=axis, title=in_words(name) if sweep.of_accuracy else "")
        named = _sweep_scale(axes, sweep)
    style.name(figure, panels, [], named)
    return figure


@styled()
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
    figure = style.Drawing(figsize=(width, height))
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
        axes.spines[:].set_visible(True)
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


@styled()
def rewriting(curve: Sequence[Rewriting], title: str) -> Figure:
    """How much of its memory a model rewrites in each segment, and where facts stand.

    Args:
        curve: of segments in order; a segment in which texts differ comes once for each part.
        title: names the run.
    """
    figure, (axes,) = canvas()
    longest = max(point.segment for point in curve)
    noise = [point for point in curve if point.part == "noise"]
    if noise:
        segments, mean, low, high = _binned([(p.segment, p.rewritten, p.low, p.high) for p in noise])
        color = PART_COLORS["memory"]
        axes.plot(segments, mean, "-", color=color, label="noise passes")
        axes.fill_between(segments, low, high, color=color, alpha=0.2, linewidth=0, label="10% to 90%")
    for part, marker, label in (("fact", "o", "a fact is written"), ("question", "s", "the question is asked")):
        points = [(point.segment, point.rewritten) for point in curve if point.part == part]
        if points:
            axes.plot(*zip(*points, strict=True), marker, color=PART_COLORS[part], label=label)
    axes.axhline(2**0.5, color=CHANCE, linestyle=":", linewidth=1)
    axes.annotate("√2: unrelated to what it was", (1, 2**0.5), (0, 3), textcoords="offset points", fontsize="small")
    style.lengths(axes, [1, longest], "segment")
    axes.set(ylabel="rewritten  ‖m′ − m‖ / ‖m′‖", xlim=(0.9, 1.15 * longest), ylim=(0, None))
    axes.set_title(title, parse_math=False)
    style.name(figure, [axes], [], axes.get_legend_handles_labels()[0])
    return figure


def _binned(points: Sequence[tuple[float, ...]], bins: int = 96) -> np.ndarray:
    """Means over neighbours that would stand on top of each other on a logarithmic axis; first column: where."""
    table = np.array(points)
    edges = np.geomspace(1, table[:, 0].max() + 1, bins + 1)
    _, inverse = np.unique(np.digitize(table[:, 0], edges), return_inverse=True)
    counts = np.bincount(inverse)
    return np.stack([np.bincount(inverse, weights=column) / counts for column in table.T])
