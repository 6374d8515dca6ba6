"""How a run learns to hold memories amid real stories and fragments of facts."""

from __future__ import annotations

from collections.abc import Callable

from matplotlib.figure import Figure

# Rows of hold.csv, each of 25 steps, that make a point.
_TOGETHER = 10


def losses(rows: list[dict[str, str]]) -> Figure:
    """Left: memories lost a segment, amid fragments; right: facts missed that were told late. A line for each seed."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, seed in enumerate(dict.fromkeys(row["seed"] for row in rows)):
        own = [row for row in rows if row["seed"] == seed]
        points = [own[at : at + _TOGETHER] for at in range(0, len(own), _TOGETHER)]
        steps = [25 * _TOGETHER * (place + 1) for place in range(len(points))]
        for axes, part, whole in ((left, "lost", "segments"), (right, "missed", "told")):
            shares = [sum(int(row[part]) for row in of) / sum(int(row[whole]) for row in of) for of in points]
            axes.plot(steps, shares, "osD^v"[number] + "-", markersize=3.5, linewidth=1, label=f"seed {seed}")
    left.set(ylabel="memories lost a segment, in training", yscale="log")
    right.set(ylabel="facts missed that were told late", yscale="log")
    for axes in (left, right):
        axes.set(xlabel="steps of the phase")
        axes.spines[["top", "right"]].set_visible(False)
    right.legend(fontsize=8, frameon=False)
    return figure


def figures(rows: Callable[[str], list[dict[str, str]]]) -> dict[str, Figure]:
    return {"figure": losses(rows("hold"))}
