"""How far a job has come, and how long the rest of it takes."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich import get_console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

log = logging.getLogger(__name__)

# Seconds until a log tells of it for the first time, and from then on.
_FIRST, _NEXT = 20.0, 300.0


def in_time(seconds: float) -> str:
    """So many seconds as people say them: 0.5 s, 40 s, 3 min, 2.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


class Pace:
    """How long the rest of a job takes, if it goes on as it has so far.

    Args:
        done: how much of it was done before.
    """

    def __init__(self, done: float = 0) -> None:
        self._began, self._before = time.monotonic(), done
        self._due = self._began + _FIRST

    def left(self, done: float, total: float) -> float | None:
        """Seconds from now on, with so much of `total` done; None if nothing has been."""
        took = time.monotonic() - self._began
        return (total - done) * took / (done - self._before) if done > self._before else None

    @property
    def due(self) -> bool:
        """Whether a log should tell of it: soon after it has begun, then seldom. Asking counts as telling."""
        now = time.monotonic()
        due = now >= self._due
        self._due = now + _NEXT if due else self._due
        return due


@contextmanager
def bar(what: str, total: int, streams: int = 1, unit: str = "segments") -> Iterator[Callable[[], None]]:
    """A live bar with speed and the time that is left; yields what is to be called after each of `total` steps.

    Where nobody would see it, a line tells of it now and then, if it takes long.

    Args:
        what: is being done.
        total: steps.
        streams: how many of its `unit` a step does.
    """
    seen = get_console().is_terminal
    shown = Progress(
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(),
        TextColumn(f"{{task.fields[speed]:,.0f}} {unit}/s ·"), TimeRemainingColumn(),
        console=get_console(), transient=True, disable=not seen,
    )  # fmt: skip
    task, pace = shown.add_task(what, total=total, speed=0.0), Pace()

    def advance() -> None:
        shown.update(task, advance=1, speed=(shown.tasks[0].speed or 0.0) * streams)
        if not seen and pace.due and (left := pace.left(shown.tasks[0].completed, total)):
            log.info("%s: %s left", what, in_time(left))

    with shown:
        yield advance
