"""Perplexity of each variant."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure


def language_models(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Variants of a language model side by side, a dot in the color of each seed and a line at their mean.

    Args:
        rows: text, variant, seed and perplexity of each run.
    """
    texts, variants, seeds = (
        list(dict.fromkeys(row[column] for row in rows)) for column in ("text", "variant", "seed")
    )
    figure = Figure(figsize=(3 + 3.5 * len(texts), 0.8 + 0.36 * len(variants)), layout="constrained")
    panels = figure.subplots(1, len(texts), squeeze=False)[0]
    for axes, text in zip(panels, texts, strict=True):
        for place, variant in enumerate(variants):
            runs = [row for row in rows if (row["text"], row["variant"]) == (text, variant)]
            values = [float(row["perplexity"]) for row in runs]
            for row, value in zip(runs, values, strict=True):
                color, label = f"C{seeds.index(row['seed'])}", "_" if place else f"seed {row['seed']}"
                axes.plot([value], [place], "o", color=color, markersize=5, label=label)
            axes.plot([sum(values) / len(values)], [place], "|", color="black", markersize=14)
        axes.set(xlabel="test perplexity", title=text, yticks=range(len(variants)), ylim=(len(variants) - 0.5, -0.5))
        axes.set_yticklabels(variants if axes.get_subplotspec().is_first_col() else [])
        axes.grid(axis="y", color="0.93")
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*panels[-1].get_legend_handles_labels(), loc="outside lower right", ncols=len(seeds), frameon=False)
    return figure


def figures(rows: Callable[[str], list[dict[str, str]]]) -> dict[str, Figure]:
    return {"figure": language_models(rows("results"))}
