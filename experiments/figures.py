"""Draws the figure of each experiment again from its results.csv: `make figures`."""

from __future__ import annotations

import csv
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure

from rmt_lightning.analysis.attention import curve_from_rows
from rmt_lightning.reporting import figures


def rewriting(rows: list[dict[str, str]]) -> Figure:
    return figures.rewriting(curve_from_rows(rows), "How much of the memory a segment rewrites (16 texts)")


# A folder, and the function that makes a figure of the rows of its results.csv.
FIGURES = {
    "attention_cost": figures.cost,
    "attention_of_memory": rewriting,
    "attention_of_memory_reasoning": rewriting,
    "flops": figures.flops,
    "generalisation": partial(figures.generalisation, chance=1 / 6),
    "language_modeling": figures.language_models,
    "models_on_detect": figures.models,
    "two_million_tokens": figures.extrapolation,
}

for name, draw in FIGURES.items():
    folder = Path(__file__).parent / name
    with (folder / "results.csv").open() as file:
        figures.save(draw(list(csv.DictReader(file))), folder / "figure")
