"""Draws the figure of each experiment again from its results.csv: `make figures`."""

from __future__ import annotations

import csv
from pathlib import Path

from rmt_lightning.analysis import figures

# A folder, and the function that makes a figure of the rows of its results.csv.
FIGURES = {
    "attention_cost": figures.cost,
    "flops": figures.flops,
}

for name, draw in FIGURES.items():
    folder = Path(__file__).parent / name
    with (folder / "results.csv").open() as file:
        figures.save(draw(list(csv.DictReader(file))), folder / "figure")
