"""How a run learns to hold memories amid real stories and fragments of facts."""

from __future__ import annotations

from collections.abc import Callable

from matplotlib.figure import Figure

from rmt_lightning.core.statistics import LossRate, Proportion
from rmt_lightning.reporting.style import Curve, Place, canvas, draw, looks, name

# Rows of hold.csv, each of 25 steps, that make a point.
_TOGETHER = 10


def losses(rows: list[dict[str, str]]) -> Figure:
    """Memories lost a segment, amid fragments, and facts missed that were told late. A line for each seed."""
    seeds = list(dict.fromkeys(row["seed"] for row in rows))
    lost, missed = list[Curve](), list[Curve]()
    for seed, look in zip(seeds, looks([f"seed {seed}" for seed in seeds]), strict=True):
        own = [row for row in rows if row["seed"] == seed]
        rates, shares = [], []
        for at in range(0, len(own), _TOGETHER):
            of = {
                key: sum(int(row[key]) for row in own[at : at + _TOGETHER])
                for key in ("lost", "segments", "missed", "told")
            }
            rate, share = LossRate(of["lost"], of["segments"]), Proportion(of["missed"], of["told"])
            rates.append(Place(25 * (at + _TOGETHER), rate.rate, *rate.interval))
            shares.append(Place(25 * (at + _TOGETHER), share.accuracy, *share.interval))
        lost.append(Curve(f"seed {seed}", look, rates))
        missed.append(Curve(f"seed {seed}", look, shares))
    figure, panels = canvas(2)
    titles = ("memories lost a segment", "share of facts told late, missed")
    for axes, curves, title in zip(panels, (lost, missed), titles, strict=True):
        draw(axes, curves)
        axes.set(xlabel="steps of the phase", ylabel=f"{title}\n(95% interval)", yscale="log")
    name(figure, panels, lost)
    return figure


def figures(rows: Callable[[str], list[dict[str, str]]]) -> dict[str, Figure]:
    return {"figure": losses(rows("hold"))}
