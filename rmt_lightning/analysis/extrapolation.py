"""Accuracy on inputs longer than those of training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor

from rmt_lightning.errors import UserError
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
class LengthResult:
    """Accuracy on inputs of one length.

    Attributes:
        segments: their length.
        right: right answers.
        samples: answers in all.
    """

    segments: int
    right: int
    samples: int

    @property
    def accuracy(self) -> float:
        return self.right / self.samples

    @property
    def interval(self) -> tuple[float, float]:
        """95% Wilson score interval of the accuracy (Wilson 1927)."""
        z, n, p = 1.959964, self.samples, self.accuracy
        centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
        half = z * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5 / (1 + z**2 / n)
        # Rounding must not leave the accuracy outside of its interval.
        return max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half))


@torch.inference_mode()
def evaluate_length(
    classify: Callable[[Iterator[Tensor]], Tensor],
    data: FactDataModule,
    num_segments: int,
    samples: int,
    batch_size: int,
    device: torch.device,
) -> LengthResult:
    """Accuracy on test samples of `num_segments` segments, read one segment at a time.

    Args:
        classify: takes an iterator of (B, S) segments, returns scores (B, C).
    """
    right = 0
    for start in range(0, samples, batch_size):
        indices = range(start, min(start + batch_size, samples))
        segments, labels, _ = data.stream("test", num_segments, indices)
        scores = classify(segment.to(device) for segment in segments)
        right += int((scores.argmax(dim=1).cpu() == labels).sum())
    return LengthResult(num_segments, right, samples)
