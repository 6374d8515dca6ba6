"""How far each stage of the curriculum generalizes, as a mean over seeds: figure 5 of RMT-2023; and how one learnt."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

from matplotlib.figure import Figure

from rmt_lightning.core.statistics import mean
from rmt_lightning.reporting.figures import curriculum_of, generalization


def figures(rows: Callable[[str], list[dict[str, str]]]) -> dict[str, Figure]:
    seeds: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in rows("generalization"):
        seeds[row["stage"], row["segments"]].append(float(row["accuracy"]))
    means = []
    for (stage, segments), found in seeds.items():
        low, high = mean(found).interval
        means.append({"stage": stage, "segments": segments, "accuracy": mean(found).value, "low": low, "high": high})
    of_one = ([r for r in rows(name) if r["run"] == "detect, seed 1"] for name in ("stages", "metrics", "results"))
    return {
        "figure": generalization(means, chance=1 / 6),
        "curriculum": curriculum_of(*of_one, 1 / 6, "task=detect", 512),
    }
