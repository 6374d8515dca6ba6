"""FLOPs of full attention against RMT (figure 3 of RMT-2023), and what was measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from rmt_lightning.reporting import style
from rmt_lightning.reporting.figures import flops


def cost(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """What reading costs, against length.

    Args:
        rows: model, segments, seconds and megabytes of each measurement.
    """
    figure, panels = style.canvas(2)
    names = list(dict.fromkeys(row["model"] for row in rows))
    curves: list[style.Curve] = []
    for axes, column in zip(panels, ("seconds", "megabytes"), strict=True):
        curves = [
            style.curve(name, look, (row for row in rows if row["model"] == name), ("segments", column))
            for name, look in zip(names, style.looks(names), strict=True)
        ]
        style.draw(axes, curves)
        style.lengths(axes, {int(row["segments"]) for row in rows})
        axes.set_yscale("log")
    panels[0].set(ylabel="seconds of one core", title="Time")
    panels[1].set(ylabel="MB beyond program and weights", title="Peak memory")
    style.name(figure, panels, curves)
    return figure


def figures(rows: Callable[[str], list[dict[str, str]]]) -> dict[str, Figure]:
    return {"figure": flops(rows("results")), "measured": cost(rows("measured"))}
