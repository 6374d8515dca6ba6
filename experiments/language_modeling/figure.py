"""Perplexity of each variant."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from rmt_lightning.core.statistics import mean
from rmt_lightning.reporting.style import canvas, looks, name


def language_models(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Variants of a language model side by side, a mark for each seed, and their mean with its 95% interval, which may
    leave the panel: two seeds say little.

    Args:
        rows: text, variant, seed and perplexity of each run.
    """
    texts, variants, seeds = (
        list(dict.fromkeys(row[column] for row in rows)) for column in ("text", "variant", "seed")
    )
    look_of = dict(zip(seeds, looks([f"seed {seed}" for seed in seeds]), strict=True))
    figure, panels = canvas(len(texts), 0.5 + 0.24 * len(variants))
    for axes, text in zip(panels, texts, strict=True):
        for place, variant in enumerate(variants):
            runs = {r["seed"]: float(r["perplexity"]) for r in rows if (r["text"], r["variant"]) == (text, variant)}
            for seed, value in runs.items():
                label = "_" if place else f"seed {seed}"
                axes.plot([value], [place], look_of[seed].marker, color=look_of[seed].color, label=label)
            if runs:
                middle = mean([*runs.values()])
                bar = {"color": "black", "elinewidth": 0.8, "zorder": 1}
                axes.errorbar([middle.value], [place], xerr=middle.half or 0, fmt="|", markersize=10, **bar)
        values = [float(row["perplexity"]) for row in rows if row["text"] == text]
        around = (max(values) - min(values)) / 2
        axes.set_xlim(min(values) - around, max(values) + around)
        axes.set(xlabel="test perplexity", title=text, yticks=range(len(variants)), ylim=(len(variants) - 0.5, -0.5))
        axes.set_yticklabels(variants if axes is panels[0] else [])
        axes.grid(axis="y", color="0.93")
    name(figure, panels, [], panels[-1].get_legend_handles_labels()[0])
    return figure


def figures(rows: Callable[[str], list[dict[str, str]]]) -> dict[str, Figure]:
    return {"figure": language_models(rows("results"))}
