"""The rate at which memory is lost: asked at many ages, without disturbing what is remembered.

Shapes: B batch, S text tokens of a segment.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from rmt_lightning.core.statistics import LossRate
from rmt_lightning.models.recurrence import Segment
from rmt_lightning.models.segment_model import Reading, SegmentModel
from rmt_lightning.tasks.datamodule import FactBatch, FactDataModule, FactDataset
from rmt_lightning.tasks.facts import Split
from rmt_lightning.tasks.placement import Key, Placement
from rmt_lightning.training.answering import FactModule

log = logging.getLogger(__name__)


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


# Facts are told within so many segments, the last of which asks for the first time.
LEAD = 4
# How many memories a measurement follows, the segments between two of its questions, and how many segments all of them
# read at most, for a bound of 1: as many as leave room for five lost ones.
_FOLLOWED = 64
_EVERY = 8
_MOST = 12
# How many samples are looked at for each stream to find one that tells its facts before the last segment.
_LOOKED_AT = 100


def follow(
    model: SegmentModel[Any],
    right: Callable[[Reading[Any], Tensor], Tensor],
    placement: Placement,
    split: Split,
    numbers: Sequence[int],
    num_segments: int,
    every: int,
    device: torch.device,
    first_noise: int = 0,
    late: bool = False,
) -> Iterator[Retention]:
    """Tell facts to many streams, let them read noise, and ask each of them again and again.

    A question is put at the end of a copy of the segment, so the stream itself never reads one. A memory counts as lost
    at the first wrong answer, even if a later one is right.

    Memories of nothing are lost too, where text looks like a fact: what is told to them then is not taken in.

    Args:
        model: reads segments; in eval mode.
        right: which inputs that end so are answered right (B,), given the answers (B, A).
        placement: where facts and noise come from.
        split: of which.
        numbers: of the B samples that are told, side by side: some of those that `early` names.
        num_segments: of noise.
        every: segments between two questions.
        device: where segments are wanted.
        first_noise: the number of the noise that the first stream reads; the others read those after it.
        late: whether streams know nothing: facts are told to copies alone, each time before they are asked.

    Yields:
        What has become of them so far, after each segment.
    """
    told, questions, answers = _beginnings(placement, split, numbers)

    def tell(state: Any) -> Any:
        for ids in before:
            _, state = model.step(Segment(ids.to(device)), state)
        return state

    def ask(ids: Tensor, state: Any) -> Tensor:
        if late:
            ids, state = last, tell(state)
        segment = Segment(torch.where(questions >= 0, questions, ids).to(device))
        return right(Reading(segment, *model.step(segment, state)), answers.to(device)).cpu()

    *before, last = told.unbind(dim=1)
    different = placement.different(split, (Key(LEAD, number) for number in numbers))
    noise = placement.noise(split, num_segments, range(first_noise, first_noise + len(numbers)))
    lost = exposure = 0
    found: dict[int, int] = {}
    # Entered anew for each segment: a generator that waits would leave its caller in it.
    with torch.inference_mode():
        first = model.initial_state(len(numbers))
        state = first if late else tell(first)
        alive = ask(last, state)
    written = int(alive.sum())
    for age, ids in enumerate(noise, start=1):
        with torch.inference_mode():
            if age % every == 0:
                answered = ask(ids, state)
                found[age] = int(answered.sum())
                exposure += every * int(alive.sum())
                lost += int((alive & ~answered).sum())
                alive &= answered
            _, state = model.step(Segment(ids.to(device)), state)
        yield Retention(lost, exposure, len(numbers), written, dict(found), different)


def measure(module: FactModule, data: FactDataModule, bound: float, total: Callable[[Tensor], Tensor]) -> LossRate:
    """Follow memories through validation text until the 95% interval of the rate lies below a bound, or above it.

    First those of facts, then those of nothing.

    Args:
        module: under a trainer; each device follows a share.
        data: where validation samples come from.
        bound: memories lost a segment.
        total: sums a tensor over all ranks.

    Returns:
        Memories of the kind that is lost more; with no exposure if fewer than half of the samples are answered at the
        start, as those are that are answered by chance. It has been looked at many times, so its interval is a little
        less sure than it says.
    """
    numbers = early(data.placement, "validation", _FOLLOWED)
    segments = _EVERY * math.ceil(_MOST / bound / len(numbers) / _EVERY)
    log.info("Following %d memories through validation text, at most %s segments each …", len(numbers), f"{segments:,}")
    share = numbers[data.rank :: data.world_size] or numbers
    training = module.training
    module.eval()
    worst = LossRate(0, 0)
    with module.trainer.precision_plugin.val_step_context():
        for late in (False, True):
            followed = follow(
                module.model, lambda end, answer: module.judge(end, answer).right, data.placement, "validation", share,
                segments, _EVERY, module.device, first_noise=data.rank * len(share), late=late,
            )  # fmt: skip
            rate = _judged(islice(followed, _EVERY - 1, None, _EVERY), bound, total)
            if not late or rate.interval[1] > worst.interval[1]:
                worst = rate
            if not worst.interval[1] <= bound:
                break
    module.train(training)
    return worst


def _judged(followed: Iterator[Retention], bound: float, total: Callable[[Tensor], Tensor]) -> LossRate:
    """The rate as soon as it is known on which side of the bound it lies."""
    rate = LossRate(0, 0)
    for found in followed:
        streams, written, *lost = total(
            torch.tensor([found.streams, found.written, found.lost, found.exposure])
        ).tolist()
        if 2 * written < streams:
            break
        rate = LossRate(*lost)
        if rate.interval[1] <= bound or rate.interval[0] > bound:
            break
    return rate


def early(placement: Placement, split: Split, streams: int) -> list[int]:
    """The numbers of at most so many samples whose facts are all told before the last of `LEAD` segments.

    Fewer where there is an end of the task's questions, for each is asked once; none where no sample is such.
    """
    if not placement.fits(split, Key(LEAD, 0)):
        return []
    numbers = range(placement.asked(split, _LOOKED_AT * streams, Key(LEAD, 0)))
    homes = ((number, placement.sample(split, Key(LEAD, number)).homes) for number in numbers)
    return list(islice((number for number, stand in homes if max(stand) < LEAD - 1), streams))


def _beginnings(placement: Placement, split: Split, numbers: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """The samples of these numbers: ids (B, T, S), questions (B, S), answers (B, A)."""
    samples = FactDataset(placement, split)
    told = FactBatch(*map(torch.stack, zip(*(samples[Key(LEAD, number)] for number in numbers), strict=True)))
    return told.input_ids, told.questions[:, 0], told.answer
