"""Draws the figures of the experiments again from their csv files: `make figures`.

Each folder has a figure.py, whose `figures(rows)` returns them by name; `rows("results")` reads results.csv beside it.
"""

from __future__ import annotations

import runpy
from pathlib import Path

from rmt_lightning.core.files import read_csv
from rmt_lightning.reporting.style import save, styled

for script in sorted(Path(__file__).parent.glob("*/figure.py")):
    folder = script.parent
    with styled():
        drawn = runpy.run_path(str(script))["figures"](lambda table, folder=folder: read_csv(folder / f"{table}.csv"))
        for name, figure in drawn.items():
            save(figure, folder / name)
