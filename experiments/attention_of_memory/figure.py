"""What memory attends to, and how much of it each segment rewrites, with one fact and with two."""

from __future__ import annotations

from collections.abc import Callable

from matplotlib.figure import Figure

from rmt_lightning.analysis.attention import curve_from_rows, maps_from_rows
from rmt_lightning.reporting.figures import attention, rewriting

CURVES = {"figure": "results", "reasoning": "reasoning"}
TITLE = "How much of the memory a segment rewrites (16 texts)"
MAPS = {
    "attention": "Where is Mary? → hallway (right)   layer=mean, head=mean",
    "attention_reasoning": "What is the bathroom south of? → kitchen (right)   layer=mean, head=mean",
}


def figures(rows: Callable[[str], list[dict[str, str]]]) -> dict[str, Figure]:
    curves = {name: rewriting(curve_from_rows(rows(table)), TITLE) for name, table in CURVES.items()}
    return curves | {name: attention(maps_from_rows(rows(name)), title) for name, title in MAPS.items()}
