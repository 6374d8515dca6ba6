"""Accuracy on inputs longer than those of training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor

from rmt_lightning.core.errors import UserError
from rmt_lightning.tasks.datamodule import FactDataModule


@dataclass(frozen=True)
class LengthTest:
    """What to test at the end of a run.

    Attributes:
        segments: lengths of the inputs.
        samples: how many of each.
    """

    segments: list[Annotated[int, Ge(1)]]
    samples: Annotated[int, Ge(1)]

    def __post_init__(self) -> None:
        if not self.segments:
            raise UserError("test.segments=[]: names no length; give some, such as [1,2,4]")


@dataclass(frozen=True)
class Proportion:
    """Right answers among all.

    Attributes:
        right: right answers.
        samples: answers in all, at least 1.
    """

    right: int
    samples: int

    @property
    def accuracy(self) -> float:
        return self.right / self.samples

    @property
    def interval(self) -> tuple[float, float]:
        """95% Wilson score interval of the accuracy (Wilson 1927)."""
        # Imported here, for it takes a second.
        from scipy.stats import binomtest

        low, high = binomtest(self.right, self.samples).proportion_ci(0.95, method="wilson")
        return float(low), float(high)

    def row(self) -> dict[str, float]:
        """The columns of a csv file."""
        low, high = self.interval
        return {"right": self.right, "samples": self.samples, "accuracy": self.accuracy, "low": low, "high": high}


@dataclass(frozen=True)
class LengthResult(Proportion):
    """Accuracy on inputs of one length.

    Attributes:
        segments: their length.
        distances: accuracy by distance from fact to question; key k holds distances 2^(k-1) … 2^k - 1, key 0 holds 0.
    """

    segments: int
    distances: dict[int, Proportion] = field(default_factory=dict)


@torch.inference_mode()
def evaluate_length(
    classify: Callable[[Iterator[Tensor]], Tensor],
    data: FactDataModule,
    num_segments: int,
    samples: int,
    batch_size: int,
    device: torch.device,
    known_answers: Sequence[str],
    on_segment: Callable[[], object] = lambda: None,
) -> LengthResult:
    """Accuracy on test samples of `num_segments` segments, read one segment at a time in constant memory.

    Args:
        classify: takes an iterator of (B, S) segments, returns scores (B, C).
        data: where the samples come from.
        num_segments: T.
        samples: how many.
        batch_size: B.
        device: where segments are wanted.
        known_answers: what the C scores stand for; the task may name its answers in another order.
        on_segment: called after each segment of each batch.
    """
    # (answers of the task,) the column of the scores that stands for each
    columns = torch.tensor([known_answers.index(answer) for answer in data.placement.task.answers])
    right: Counter[int] = Counter()
    seen: Counter[int] = Counter()
    for start in range(0, samples, batch_size):
        numbers = range(start, min(start + batch_size, samples))
        segments, labels, distances = data.stream("test", num_segments, numbers)

        def fed(segments: Iterator[Tensor] = segments) -> Iterator[Tensor]:
            for segment in segments:
                yield segment.to(device)
                on_segment()

        correct = classify(fed()).argmax(dim=1).cpu() == columns[labels]
        for distance, is_right in zip(distances.tolist(), correct.tolist(), strict=True):
            seen[distance.bit_length()] += 1
            right[distance.bit_length()] += is_right
    by_distance = {key: Proportion(right[key], seen[key]) for key in sorted(seen)}
    return LengthResult(right.total(), seen.total(), num_segments, by_distance)
