"""The curriculum, and the test of longer and longer inputs."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from types import SimpleNamespace

from matplotlib.figure import Figure

from rmt_lightning.reporting.figures import curriculum


def figures(rows: Callable[[str], list[dict[str, str]]]) -> dict[str, Figure]:
    stages = rows("stages")
    ends = list(accumulate(int(row["steps"]) for row in stages))
    steps = [(int(row["step"]), float(row["val/accuracy"])) for row in rows("metrics") if row["val/accuracy"]]
    history = [(step, 1 + sum(step >= end for end in ends), accuracy) for step, accuracy in steps]
    lengths = [
        SimpleNamespace(
            segments=int(row["segments"]), accuracy=float(row["accuracy"]),
            interval=(float(row["low"]), float(row["high"])),
        )
        for row in rows("results")
    ]  # fmt: skip
    return {"figure": curriculum(history, lengths, len(stages), 1 / 6, "task=detect, all-MiniLM-L6-v2 on real stories")}
