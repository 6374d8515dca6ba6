"""How much of the memory each segment rewrites, with one fact and with two."""

from __future__ import annotations

from collections.abc import Callable

from matplotlib.figure import Figure

from rmt_lightning.analysis.attention import curve_from_rows
from rmt_lightning.reporting.figures import rewriting

TITLE = "How much of the memory a segment rewrites (16 texts)"


def figures(rows: Callable[[str], list[dict[str, str]]]) -> dict[str, Figure]:
    tables = {"figure": "results", "reasoning": "reasoning"}
    return {name: rewriting(curve_from_rows(rows(table)), TITLE) for name, table in tables.items()}
