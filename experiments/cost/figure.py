"""FLOPs of full attention against RMT (figure 3 of RMT-2023), and what was measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from rmt_lightning.reporting.figures import flops


def cost(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """What reading costs, against length.

    Args:
        rows: model, segments, seconds and megabytes of each measurement.
    """
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    panels = figure.subplots(1, 2)
    for name in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == name]
        segments = [int(row["segments"]) for row in own]
        costs = [[float(row[column]) for row in own] for column in ("seconds", "megabytes")]
        for axes, values in zip(panels, costs, strict=True):
            axes.plot(segments, values, "o-", markersize=3.5, label=name)
            axes.set_xscale("log", base=2)
            axes.set_xticks(segments, [str(number) for number in segments])
            axes.set_yscale("log")
            axes.minorticks_off()
            axes.set_xlabel("segments of the input")
            axes.spines[["top", "right"]].set_visible(False)
    panels[0].set(ylabel="seconds of one core", title="Time")
    panels[1].set(ylabel="MB beyond program and weights", title="Peak memory")
    panels[0].legend(fontsize=8, frameon=False)
    return figure


def figures(rows: Callable[[str], list[dict[str, str]]]) -> dict[str, Figure]:
    return {"figure": flops(rows("results")), "measured": cost(rows("measured"))}
