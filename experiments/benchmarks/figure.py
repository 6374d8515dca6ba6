"""How many times as fast as the published way each case is."""

from __future__ import annotations

from collections.abc import Callable

from matplotlib.figure import Figure

from rmt_lightning.reporting.style import canvas, name

COLORS = {
    "ours": "#0072b2", "ours, compiled": "#cc79a7", "ours, graphs": "#d55e00", "ours, bf16": "#009e73",
    "ours, checkpointing": "#56b4e9", "published, eager": "#e69f00",
}  # fmt: skip


def speeds(rows: list[dict[str, str]]) -> Figure:
    """A group of bars for each case, one for each variant but the first, which is 1.

    Args:
        rows: case, variant and times_as_fast.
    """
    cases: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        cases.setdefault(row["case"], []).append(row)
    # Not what is compared with ourselves alone.
    compared = {name: v[1:] for name, v in cases.items() if len(v) > 1 and not v[0]["variant"].startswith("ours")}
    figure, (axes,) = canvas(1, 0.7 + 0.15 * sum(len(v) + 0.6 for v in compared.values()))
    place, ticks = 0.0, []
    for case, variants in compared.items():
        ticks.append((place + (len(variants) - 1) / 2, case))
        for row in variants:
            times = float(row["times_as_fast"])
            axes.barh(place, times, 0.9, color=COLORS[row["variant"]], label=row["variant"])
            axes.text(times, place, f" {times:.2f}", va="center", fontsize="x-small")
            place += 1
        place += 0.6
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(*zip(*ticks, strict=True))
    axes.invert_yaxis()
    axes.set(xlabel="times as fast as the first variant of the case")
    named = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    name(figure, [axes], [], [*named.values()])
    return figure


def figures(rows: Callable[[str], list[dict[str, str]]]) -> dict[str, Figure]:
    return {"figure": speeds(rows("results"))}
