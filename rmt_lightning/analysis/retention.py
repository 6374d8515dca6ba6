"""The rate at which memory is lost: asked at many ages, without disturbing what is remembered.

Shapes: B batch, S text tokens of a segment.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from rmt_lightning.core.statistics import LossRate
from rmt_lightning.models.recurrence import Segment
from rmt_lightning.models.segment_model import Reading, SegmentModel
from rmt_lightning.tasks.datamodule import FactBatch, FactDataset
from rmt_lightning.tasks.placement import Key, Placement


@dataclass(frozen=True)
class Retention(LossRate):
    """What became of memories that were followed.

    Attributes:
        streams: how many were followed.
        written: how many of them gave the right answer at the start.
        right: right answers of all streams, by the number of segments read since.
        questions: how many different questions the streams were asked.
    """

    streams: int
    written: int
    right: dict[int, int]
    questions: int


# Facts are told within this many segments, the last of which asks for the first time.
_LEAD = 4
# How many samples are looked at for each stream to find one that tells its facts before the last segment.
_LOOKED_AT = 100


@torch.inference_mode()
def follow(
    model: SegmentModel[Any],
    right: Callable[[Reading[Any], Tensor], Tensor],
    placement: Placement,
    num_segments: int,
    every: int,
    streams: int,
    device: torch.device,
    on_segment: Callable[[], object] = lambda: None,
) -> Retention | None:
    """Tell facts to many streams, let them read noise, and ask each of them again and again.

    A question is put at the end of a copy of the segment, so the stream itself never reads one. A memory counts as lost
    at the first wrong answer, even if a later one is right.

    Args:
        model: reads segments.
        right: which inputs that end so are answered right (B,), given the answers (B, A).
        placement: where facts and noise come from; its test split is used.
        num_segments: of noise.
        every: segments between two questions.
        streams: B, side by side; fewer if there is an end of the task's questions, for each is asked once.
        device: where segments are wanted.
        on_segment: called after each segment.

    Returns:
        What became of them; None if no sample tells all its facts before it asks.
    """
    numbers = _early(placement, streams)
    if not numbers:
        return None
    streams = len(numbers)
    told, questions, answers = _beginnings(placement, numbers)

    def ask(ids: Tensor, state: Any) -> Tensor:
        segment = Segment(torch.where(questions >= 0, questions, ids).to(device))
        return right(Reading(segment, *model.step(segment, state)), answers.to(device)).cpu()

    *before, last = told.unbind(dim=1)
    state = model.initial_state(streams)
    for ids in before:
        _, state = model.step(Segment(ids.to(device)), state)
    alive = ask(last, state)
    written = int(alive.sum())
    lost = exposure = 0
    found: dict[int, int] = {}
    for age, ids in enumerate(placement.noise("test", num_segments, range(streams)), start=1):
        if age % every == 0:
            answered = ask(ids, state)
            found[age] = int(answered.sum())
            exposure += every * int(alive.sum())
            lost += int((alive & ~answered).sum())
            alive &= answered
        _, state = model.step(Segment(ids.to(device)), state)
        on_segment()
    different = placement.different("test", (Key(_LEAD, number) for number in numbers))
    return Retention(lost, exposure, streams, written, found, different)


def _early(placement: Placement, streams: int) -> list[int]:
    """The numbers of at most so many samples whose facts are all told before the last segment."""
    if not placement.fits("test", _LEAD):
        return []
    numbers = range(placement.asked("test", _LOOKED_AT * streams, Key(_LEAD, 0)))
    homes = ((number, placement.sample("test", Key(_LEAD, number)).homes) for number in numbers)
    return list(islice((number for number, stand in homes if max(stand) < _LEAD - 1), streams))


def _beginnings(placement: Placement, numbers: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """The samples of these numbers: ids (B, T, S), questions (B, S), answers (B, A)."""
    samples = FactDataset(placement, "test")
    told = FactBatch(*map(torch.stack, zip(*(samples[Key(_LEAD, number)] for number in numbers), strict=True)))
    return told.input_ids, told.questions[:, 0], told.answer
