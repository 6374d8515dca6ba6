"""Data in, matplotlib Figure out."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rmt_lightning.run_folder import write_atomically

if TYPE_CHECKING:
    from rmt_lightning.analysis.extrapolation import LengthResult

CHANCE = "0.6"


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
    for kind, metadata in (("png", {}), ("pdf", {"CreationDate": None})):
        content = io.BytesIO()
        figure.savefig(content, format=kind, dpi=150, metadata=metadata)
        write_atomically(path.with_name(f"{path.name}.{kind}"), content.getvalue())
