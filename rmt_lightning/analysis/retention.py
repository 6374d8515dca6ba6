"""The rate at which memory is lost: asked at many ages, without disturbing what is remembered.

Shapes: B batch, S text tokens of a segment.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor

from rmt_lightning.models.recurrence import Segment
from rmt_lightning.models.segment_model import SegmentModel
from rmt_lightning.tasks.datamodule import FactDataModule, FactDataset
from rmt_lightning.tasks.placement import Key


@dataclass(frozen=True)
class LossRate:
    """Memories lost on the way.

    Attributes:
        lost: how many were lost.
        exposure: segments read by memories that were not lost yet.
    """

    lost: int
    exposure: int

    @property
    def rate(self) -> float:
        """Memories lost for each that reads a segment; not a number if none has."""
        return self.lost / self.exposure if self.exposure else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """95% interval of the rate: the exact one of a Poisson count (Garwood 1936)."""
        if not self.exposure:
            return math.nan, math.nan
        # Imported here, for it takes a second.
        from scipy.stats import chi2

        low = chi2.ppf(0.025, 2 * self.lost) / 2 if self.lost else 0.0
        high = chi2.ppf(0.975, 2 * (self.lost + 1)) / 2
        return float(low) / self.exposure, float(high) / self.exposure

    def row(self) -> dict[str, float]:
        """The columns of a csv file."""
        low, high = self.interval
        return {"lost": self.lost, "exposure": self.exposure, "rate": self.rate, "rate_low": low, "rate_high": high}


@dataclass(frozen=True)
class Retention(LossRate):
    """What became of memories that were followed.

    Attributes:
        streams: how many were followed.
        written: how many of them gave the right answer at the start.
        right: right answers of all streams, by the number of segments read since.
    """

    streams: int
    written: int
    right: dict[int, int]


# Facts are told within this many segments, the last of which asks for the first time.
_LEAD = 4


@torch.inference_mode()
def follow(
    model: SegmentModel[Any],
    score: Callable[[Tensor], Tensor],
    data: FactDataModule,
    num_segments: int,
    every: int,
    streams: int,
    device: torch.device,
    known_answers: Sequence[str],
    on_segment: Callable[[], object] = lambda: None,
) -> Retention:
    """Tell facts to many streams, let them read noise, and ask each of them again and again.

    A question is put at the end of a copy of the segment, so the stream itself never reads one. A memory counts as lost
    at the first wrong answer, even if a later one is right.

    Args:
        model: reads segments.
        score: turns what a classifier reads (B, D) into scores (B, C).
        data: where facts and noise come from; its test split is used.
        num_segments: of noise.
        every: segments between two questions.
        streams: B, side by side.
        device: where segments are wanted.
        known_answers: what the C scores stand for.
        on_segment: called after each segment.
    """
    columns = torch.tensor([known_answers.index(answer) for answer in data.placement.task.answers])
    told, questions, answers = _beginnings(data, streams)
    answers = columns[answers]

    def ask(ids: Tensor, state: Any) -> Tensor:
        segment = Segment(torch.where(questions >= 0, questions, ids).to(device))
        hidden, _ = model.step(segment, state)
        return score(model.readout(hidden, segment)).argmax(dim=1).cpu() == answers

    *before, last = told.unbind(dim=1)
    state = model.initial_state(streams)
    for ids in before:
        _, state = model.step(Segment(ids.to(device)), state)
    alive = ask(last, state)
    written = int(alive.sum())
    lost = exposure = 0
    right: dict[int, int] = {}
    for age, ids in enumerate(data.noise("test", num_segments, range(streams)), start=1):
        if age % every == 0:
            answered = ask(ids, state)
            right[age] = int(answered.sum())
            exposure += every * int(alive.sum())
            lost += int((alive & ~answered).sum())
            alive &= answered
        _, state = model.step(Segment(ids.to(device)), state)
        on_segment()
    return Retention(lost, exposure, streams, written, right)


def _beginnings(data: FactDataModule, streams: int) -> tuple[Tensor, Tensor, Tensor]:
    """Test samples whose facts are all told before the last segment: ids (B, T, S), questions (B, S), answers (B,)."""
    samples = FactDataset(data.placement, "test")
    told: list[dict[str, Any]] = []
    for number in count():
        sample = samples[Key(_LEAD, number)]
        if sample["last_told"] < _LEAD - 1:
            told.append(sample)
        if len(told) == streams:
            break
    ids, spoken = (torch.stack([sample[name] for sample in told]) for name in ("input_ids", "told"))
    return ids, spoken[:, -1], torch.tensor([sample["label"] for sample in told])
