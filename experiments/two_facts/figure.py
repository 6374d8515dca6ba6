"""Accuracy against length of the runs of one command, each with the most questions that it was asked."""

from __future__ import annotations

from collections.abc import Callable

from matplotlib.figure import Figure


def accuracy(rows: list[dict[str, str]]) -> Figure:
    """A line for each run, with 95% intervals."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    for run in dict.fromkeys(row["run"] for row in rows):
        # A length that was tested twice: the test of more questions. 4,096 segments stand in the table alone.
        own = sorted((row for row in rows if row["run"] == run), key=lambda row: int(row["samples"]))
        by_length = {int(row["segments"]): row for row in own if int(row["segments"]) <= 128}
        lengths = sorted(by_length)
        values, low, high = (
            [float(by_length[length][column]) for length in lengths] for column in ("accuracy", "low", "high")
        )
        (line,) = axes.plot(lengths, values, "o-", markersize=3.5, label=run)
        axes.fill_between(lengths, low, high, color=line.get_color(), alpha=0.12, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_xticks([1, 2, 4, 8, 16, 32, 64, 128], ["1", "2", "4", "8", "16", "32", "64", "128"])
    axes.minorticks_off()
    axes.set(xlabel="segments of the input", ylabel="test accuracy (bands: 95% interval)", ylim=(0.75, 1.01))
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", fontsize=8, frameon=False)
    return figure


def figures(rows: Callable[[str], list[dict[str, str]]]) -> dict[str, Figure]:
    return {"figure": accuracy(rows("results"))}
