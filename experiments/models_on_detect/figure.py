"""Accuracy of every model against length."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from rmt_lightning.reporting.figures import lengths
from rmt_lightning.reporting.style import curve, looks


def models(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Accuracy against length, a line for each model; × marks where a model's positions end.

    Args:
        rows: model, trained_to (segments of its longest training inputs), segments and accuracy at each length that it
            can read.
    """
    names = list(dict.fromkeys(row["model"] for row in rows))
    curves = [
        curve(name, look, (row for row in rows if row["model"] == name))
        for name, look in zip(names, looks(names), strict=True)
    ]
    figure = lengths(curves, chances=[1 / 6], trained_to=max(int(row["trained_to"]) for row in rows))
    longest = max(place.x for one in curves for place in one.places)
    for one in curves:
        if (end := one.places[-1]).x < longest:
            figure.axes[0].plot(*end[:2], "x", color=one.look.color, markersize=8, markeredgewidth=1.5)
    return figure


def figures(rows: Callable[[str], list[dict[str, str]]]) -> dict[str, Figure]:
    return {"figure": models(rows("results"))}
