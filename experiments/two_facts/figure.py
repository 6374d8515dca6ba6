"""Accuracy against length of the runs of one command, each with the most questions that it was asked."""

from __future__ import annotations

from collections.abc import Callable

from matplotlib.figure import Figure

from rmt_lightning.reporting.figures import lengths
from rmt_lightning.reporting.style import curve, looks


def accuracy(rows: list[dict[str, str]]) -> Figure:
    """A line for each run, with 95% intervals."""
    names = list(dict.fromkeys(row["run"] for row in rows))
    curves = []
    for name, look in zip(names, looks(names), strict=True):
        # A length that was tested twice: the test of more questions. 4,096 segments stand in the table alone.
        own = sorted((row for row in rows if row["run"] == name), key=lambda row: int(row["samples"]))
        by_length = {row["segments"]: row for row in own if int(row["segments"]) <= 128}
        curves.append(curve(name, look, by_length.values()))
    return lengths(curves, lowest=0.75)


def figures(rows: Callable[[str], list[dict[str, str]]]) -> dict[str, Figure]:
    return {"figure": accuracy(rows("results"))}
