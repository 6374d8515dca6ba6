"""Accuracy of every model against length."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure


def models(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Accuracy against length, a line for each model; × marks where a model's positions end.

    Args:
        rows: model, trained_to (segments of its longest training inputs), segments and accuracy at each length that it
            can read.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.set_prop_cycle(color=[colormaps["tab20"](number) for number in (*range(0, 20, 2), *range(1, 20, 2))])
    numbers = sorted({int(row["segments"]) for row in rows})
    for name in dict.fromkeys(row["model"] for row in rows):
        points = [(int(row["segments"]), float(row["accuracy"])) for row in rows if row["model"] == name]
        (line,) = axes.plot(*zip(*points, strict=True), "o-", markersize=3, label=name)
        if points[-1][0] < numbers[-1]:
            axes.plot(*points[-1], "x", color=line.get_color(), markersize=10, markeredgewidth=2)
    axes.axvspan(numbers[0], max(int(row["trained_to"]) for row in rows), color="0.93", zorder=0)
    axes.axhline(1 / 6, color="0.6", linestyle=":", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_xticks(numbers, [str(number) for number in numbers], fontsize=8)
    axes.minorticks_off()
    axes.set(xlabel="segments of the input (gray: trained on)", ylabel="test accuracy", ylim=(0, 1.05))
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", fontsize=8, frameon=False)
    return figure


def figures(rows: Callable[[str], list[dict[str, str]]]) -> dict[str, Figure]:
    return {"figure": models(rows("results"))}
