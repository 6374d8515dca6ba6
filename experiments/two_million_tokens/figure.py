"""Accuracy out to millions of tokens, and the memory it takes: figure 1 of RMT-2023."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from rmt_lightning.reporting.figures import lengths
from rmt_lightning.reporting.style import curve, looks

# Accuracy of models trained on at most 7 segments, on 4,096: read off figure 1 of RMT-2023 (arXiv 2304.11062).
PUBLISHED = {"detect": 0.96, "memorize": 0.905, "reasoning": 0.82}
PUBLISHED_TOKENS = 4096 * 499
# Contexts of language models at that time, and on which side of their lines they are named.
CONTEXTS = {32_768: ("32K", -3, "right"), 65_536: ("64K", 3, "left")}


def extrapolation(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Accuracy out to millions of tokens, and the memory it takes (RMT-2023, figure 1); stars are published.

    Args:
        rows: of evaluation.csv of one or more runs, with a column `run` that names the run and one `task`.
    """
    runs = {row["run"]: row["task"] for row in rows}
    curves, memory = [], []
    for (run, task), look in zip(runs.items(), looks([*runs.values()]), strict=True):
        own = [row for row in rows if row["run"] == run]
        used = [row | {"mb": float(row["device_memory_mb"]) or row["host_memory_mb"]} for row in own]
        label = f"{run} (star: published)" if task in PUBLISHED else run
        curves.append(curve(label, look, own, ("text_tokens", "accuracy", "low", "high")))
        memory.append(curve("", look, used, ("text_tokens", "mb")))
    figure = lengths(curves, memory, [1 / 6], axis="tokens of text")
    axes = figure.axes[0]
    for one, task in zip(curves, runs.values(), strict=True):
        if task in PUBLISHED:
            star = {"color": one.look.color, "markersize": 8, "markeredgecolor": "black", "markeredgewidth": 0.4}
            axes.plot(PUBLISHED_TOKENS, PUBLISHED[task], "*", **star, zorder=3)
    for length, (name, offset, side) in CONTEXTS.items():
        axes.axvline(length, color="0.8", linewidth=1, zorder=0)
        beside = {"textcoords": "offset points", "fontsize": "small", "color": "0.45", "ha": side}
        axes.annotate(name, (length, 0.02), (offset, 0), **beside)
    return figure


def figures(rows: Callable[[str], list[dict[str, str]]]) -> dict[str, Figure]:
    return {"figure": extrapolation(rows("results"))}
