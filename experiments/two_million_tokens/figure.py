"""Accuracy out to millions of tokens, and the memory it takes: figure 1 of RMT-2023."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

# Accuracy of models trained on at most 7 segments, on 4,096: read off figure 1 of RMT-2023 (arXiv 2304.11062).
PUBLISHED = {"detect": 0.96, "memorize": 0.905, "reasoning": 0.82}
PUBLISHED_TOKENS = 4096 * 499
# A color for each task (Okabe and Ito 2008: told apart by the color-blind, too).
TASK_COLORS = {"memorize": "#0072B2", "detect": "#E69F00", "reasoning": "#009E73", "carried": "#CC79A7"}
CONTEXTS = {32_768: "32K", 65_536: "64K"}


def extrapolation(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Accuracy out to millions of tokens, and the memory it takes (RMT-2023, figure 1).

    Args:
        rows: of evaluation.csv of one or more runs, with a column `run` that names the run and one `task`.
    """
    figure = Figure(figsize=(9, 4.8), layout="constrained")
    axes = figure.subplots()
    memory_axes = axes.twinx()
    for run in dict.fromkeys(row["run"] for row in rows):
        own = sorted((row for row in rows if row["run"] == run), key=lambda row: int(row["text_tokens"]))
        tokens = [int(row["text_tokens"]) for row in own]
        accuracy, low, high, device, host = (
            np.array([float(row[column]) for row in own])
            for column in ("accuracy", "low", "high", "device_memory_mb", "host_memory_mb")
        )
        color = TASK_COLORS.get(own[0]["task"], "black")
        axes.plot(tokens, accuracy, "o-", color=color, markersize=4, label=run)
        axes.fill_between(tokens, low, high, color=color, alpha=0.15, linewidth=0)
        memory_axes.plot(tokens, np.where(device > 0, device, host), ":", color=color, linewidth=1)
    for task, published in PUBLISHED.items():
        if task in {row["task"] for row in rows}:
            axes.plot(
                PUBLISHED_TOKENS, published, "*", color=TASK_COLORS[task], markersize=11, markeredgecolor="black",
                markeredgewidth=0.5, label=f"{task}, published",
            )  # fmt: skip
    for length, name in CONTEXTS.items():
        axes.axvline(length, color="0.8", linewidth=1, zorder=0)
        axes.annotate(name, (length, 0.02), xytext=(3, 0), textcoords="offset points", fontsize=8, color="0.5")
    axes.axhline(1 / 6, color="0.6", linestyle=":", linewidth=1)
    axes.annotate("guessing", (1, 1 / 6), xycoords=("axes fraction", "data"), xytext=(-4, 3), ha="right",
                  textcoords="offset points", fontsize=8, color="0.4")  # fmt: skip
    axes.set(xscale="log", xlabel="tokens of text", ylabel="test accuracy (bands: 95% interval)", ylim=(0, 1.04))
    memory_axes.set(ylabel="peak memory in MB (dotted)", ylim=(0, None))
    axes.legend(loc="lower left", fontsize=9, frameon=False)
    for part in (axes, memory_axes):
        part.spines["top"].set_visible(False)
    return figure


def figures(rows: Callable[[str], list[dict[str, str]]]) -> dict[str, Figure]:
    return {"figure": extrapolation(rows("results"))}
