"""How many memories a run loses while it learns to hold them."""

from __future__ import annotations

from collections.abc import Callable

from matplotlib.figure import Figure


def losses(rows: list[dict[str, str]], stages: list[dict[str, str]]) -> Figure:
    """The share of memories that is lost a segment, against steps of the phase; a line for each run."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    for run in dict.fromkeys(row["run"] for row in rows):
        own = [row for row in rows if row["run"] == run]
        steps = [int(row["step"]) for row in own]
        begun = sum(int(row["steps"]) for row in stages if row["run"] == run)
        rates = [int(row["lost"]) / int(row["segments"]) for row in own]
        axes.plot([step - begun for step in steps], rates, "o-", markersize=2.5, linewidth=1, label=run)
    axes.set_yscale("symlog", linthresh=1e-4)
    axes.set(xlabel="steps of the phase", ylabel="memories lost a segment, in training", ylim=(-5e-6, None))
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", fontsize=8, frameon=False)
    return figure


def figures(rows: Callable[[str], list[dict[str, str]]]) -> dict[str, Figure]:
    return {"figure": losses(rows("hold"), rows("stages"))}
