"""How far each stage of the curriculum generalizes, as a mean over seeds: figure 5 of RMT-2023."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from statistics import fmean

from matplotlib.figure import Figure

from rmt_lightning.reporting.figures import generalization


def figures(rows: Callable[[str], list[dict[str, str]]]) -> dict[str, Figure]:
    seeds: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in rows("generalization"):
        seeds[row["stage"], row["segments"]].append(float(row["accuracy"]))
    means = [{"stage": stage, "segments": n, "accuracy": fmean(found)} for (stage, n), found in seeds.items()]
    return {"figure": generalization(means, chance=1 / 6)}
