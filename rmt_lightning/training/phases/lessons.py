"""How a stage is cut into lessons: the task's easier forms first, then more and more noise."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from rmt_lightning.tasks.placement import Placement

# In how many lessons noise grows to what a segment holds.
NOISY_LESSONS = 5


class Form(NamedTuple):
    """What is asked, and amid how much noise.

    Attributes:
        easier: which of the task's easier forms, if it is not the task itself.
        text_length: S, if segments are shorter than they could be.
    """

    easier: int | None = None
    text_length: int | None = None


def lessons_of(placement: Placement, stage: int) -> int:
    """How many lessons a stage may have.

    In stage 1 the easier forms and the task without noise, then more and more noise; in later stages those of the
    easier forms that are repeated, if there are any, and the task, all amid full noise.
    """
    if stage == 1:
        return len(placement.easier) + 1 + NOISY_LESSONS
    return placement.repeated + 1 if placement.repeated else 0


def form_of(placement: Placement, stage: int, lesson: int | None) -> Form:
    """What a lesson of a stage, counted from 1, is on; None is the whole stage."""
    if lesson is None:
        return Form()
    if stage > 1:
        first = len(placement.easier) - placement.repeated
        return Form(first + lesson - 1 if lesson <= placement.repeated else None)
    tightest, full = placement.tightest, placement.text_length
    noisy = lesson - len(tightest)
    if noisy < 0:
        return Form(lesson - 1, tightest[lesson - 1])
    return Form(None, tightest[-1] + (full - tightest[-1]) * noisy // NOISY_LESSONS)


def draw_form(placement: Placement, stage: int, lesson: int | None, batch: int) -> Form:
    """The same for training batch number `batch`, which may have less noise than that."""
    form = form_of(placement, stage, lesson)
    if form.easier is not None or form.text_length is None:
        return form
    rng = np.random.Generator(np.random.Philox(key=[placement.seed, 2**33], counter=[0, 0, 0, batch]))
    return Form(None, int(rng.integers(placement.tightest[-1], form.text_length + 1)))
