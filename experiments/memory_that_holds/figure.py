"""How many memories a run loses while it learns to hold them."""

from __future__ import annotations

from collections.abc import Callable

from matplotlib.figure import Figure

from rmt_lightning.core.statistics import LossRate
from rmt_lightning.reporting.style import Curve, Place, canvas, draw, looks, name

# Rows of hold.csv that make a point.
_TOGETHER = 4


def losses(rows: list[dict[str, str]], stages: list[dict[str, str]]) -> Figure:
    """The share of memories that is lost a segment, against steps of the phase; a line for each run."""
    runs = list(dict.fromkeys(row["run"] for row in rows))
    curves = []
    for run, look in zip(runs, looks(runs), strict=True):
        begun = sum(int(row["steps"]) for row in stages if row["run"] == run)
        own = [row for row in rows if row["run"] == run]
        places = []
        for at in range(0, len(own), _TOGETHER):
            of = own[at : at + _TOGETHER]
            found = LossRate(sum(int(row["lost"]) for row in of), sum(int(row["segments"]) for row in of))
            places.append(Place(int(of[-1]["step"]) - begun, found.rate, *found.interval))
        curves.append(Curve(run, look, places))
    figure, (axes,) = canvas()
    draw(axes, curves)
    axes.set_yscale("symlog", linthresh=1e-4)
    axes.set(
        xlabel="steps of the phase", ylabel="memories lost a segment,\nin training (95% interval)", ylim=(-5e-6, None)
    )
    name(figure, [axes], curves)
    return figure


def figures(rows: Callable[[str], list[dict[str, str]]]) -> dict[str, Figure]:
    return {"figure": losses(rows("hold"), rows("stages"))}
