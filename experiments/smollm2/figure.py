"""Perplexity of a language model and of untrained memories round it; and how one of them learnt a task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from rmt_lightning.reporting.figures import curriculum_of
from rmt_lightning.reporting.style import canvas, looks, name

NAMES = {"plain": "the model alone", "RMTDecoder": "RMT", "ARMT": "ARMT"}
TITLE = "BABILong QA1, SmolLM2-135M with LoRA"


def untrained(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """One mark for each precision, by what stands round the model.

    Args:
        rows: model, memory_size, dtype and perplexity.
    """
    kinds = list(dict.fromkeys((row["model"], row["memory_size"]) for row in rows))
    precisions = list(dict.fromkeys(row["dtype"] for row in rows))
    figure, (axes,) = canvas(1, 0.5 + 0.3 * len(kinds))
    for precision, look in zip(precisions, looks(precisions), strict=True):
        found = {(r["model"], r["memory_size"]): float(r["perplexity"]) for r in rows if r["dtype"] == precision}
        places = [kinds.index(kind) for kind in found]
        label = precision.removeprefix("torch.")
        axes.plot([*found.values()], places, look.marker, color=look.color, label=label, alpha=0.7)
    axes.set(xlabel="perplexity of one segment of text", yticks=range(len(kinds)), ylim=(len(kinds) - 0.5, -0.5))
    axes.set_yticklabels([NAMES[model] + f", memory of {size}" * (size != "0") for model, size in kinds])
    axes.grid(axis="y", color="0.93")
    name(figure, [axes], [], axes.get_legend_handles_labels()[0])
    return figure


def figures(rows: Callable[[str], list[dict[str, str]]]) -> dict[str, Figure]:
    learnt = curriculum_of(rows("stages"), rows("metrics"), rows("test"), 1 / 6, TITLE, 64)
    return {"figure": untrained(rows("results")), "training": learnt}
