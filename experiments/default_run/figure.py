"""How far each stage of the curriculum generalizes: figure 5 of RMT-2023."""

from __future__ import annotations

from collections.abc import Callable

from matplotlib.figure import Figure

from rmt_lightning.reporting.figures import generalization


def figures(rows: Callable[[str], list[dict[str, str]]]) -> dict[str, Figure]:
    return {"figure": generalization(rows("generalization"), chance=1 / 6)}
