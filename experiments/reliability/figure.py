"""How many faults of each kind have been tried, and how many of them did harm."""

from __future__ import annotations

from collections.abc import Callable

from matplotlib.figure import Figure

from rmt_lightning.reporting.style import canvas, name


def faults(rows: list[dict[str, str]]) -> Figure:
    """Two bars for each area: trials whose outcome was what must follow, and the others.

    Args:
        rows: area, survived and lost of each fault.
    """
    areas = sorted({row["area"] for row in rows}, reverse=True)
    figure, (axes,) = canvas(1, 0.5 + 0.14 * len(areas))
    before = [0] * len(areas)
    for column, color in (("survived", "#0072b2"), ("lost", "#d55e00")):
        counts = [sum(int(row[column]) for row in rows if row["area"] == area) for area in areas]
        axes.barh(areas, counts, left=before, color=color, label=f"{column} ({sum(counts)})")
        before = [start + count for start, count in zip(before, counts, strict=True)]
    axes.set(xlabel="trials", ylabel="test file")
    name(figure, [axes], [], axes.get_legend_handles_labels()[0])
    return figure


def figures(rows: Callable[[str], list[dict[str, str]]]) -> dict[str, Figure]:
    return {"figure": faults(rows("results"))}
