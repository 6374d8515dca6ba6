"""What each fault took to bring about and to survive."""

from __future__ import annotations

from collections.abc import Callable

from matplotlib.figure import Figure


def faults(rows: list[dict[str, str]]) -> Figure:
    """A bar for each fault: blue if what must follow did."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    colors = ["#0072b2" if row["outcome"] == "passed" else "#d55e00" for row in rows]
    axes.barh(range(len(rows)), [float(row["seconds"]) for row in rows], color=colors)
    axes.set_yticks(range(len(rows)), [row["fault"] for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="seconds of the test, other work beside it (blue: passed)")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def figures(rows: Callable[[str], list[dict[str, str]]]) -> dict[str, Figure]:
    return {"figure": faults(rows("results"))}
