"""The curriculum, and the test of longer and longer inputs."""

from __future__ import annotations

from collections.abc import Callable

from matplotlib.figure import Figure

from rmt_lightning.reporting.figures import curriculum_of

TITLE = "task=detect, all-MiniLM-L6-v2 on real stories"


def figures(rows: Callable[[str], list[dict[str, str]]]) -> dict[str, Figure]:
    return {"figure": curriculum_of(rows("stages"), rows("metrics"), rows("results"), 1 / 6, TITLE, 512)}
