"""Bars, and how long the rest of a job takes."""

from __future__ import annotations

import logging

import pytest

from rmt_lightning.core import progress
from rmt_lightning.core.progress import Pace, bar, in_time


@pytest.fixture()
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands still until it is set."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (10, "10 s"), (99, "99 s"), (100, "2 min"), (5999, "100 min"), (6000, "1.7 h")],
)
def test_times_as_people_say_them(seconds: float, told: str) -> None:
    assert in_time(seconds) == told


def test_the_pace_is_that_of_what_was_done_since_it_began(clock: list[float]) -> None:
    pace = Pace(done=100)
    assert pace.left(100, 200) is None
    clock[0] += 30
    assert pace.left(110, 200) == 270
    assert pace.left(200, 200) == 0


def test_a_log_tells_now_and_then(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "rmt_lightning"), bar("reading", 1000, streams=4) as advance:
        for _ in range(400):
            clock[0] += 1
            advance()
    assert caplog.messages == ["reading: 16 min left", "reading: 11 min left"]


def test_a_short_job_is_not_talked_about(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "rmt_lightning"), bar("reading", 10) as advance:
        for _ in range(10):
            clock[0] += 1
            advance()
    assert not caplog.messages
