"""Accuracy on inputs longer than those of training.

Shapes: B batch, T segments, S text tokens of a segment, C answers, A tokens of the longest answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Protocol

import torch
from annotated_types import Ge
from torch import Tensor

from rmt_lightning.core.errors import UserError
from rmt_lightning.core.statistics import Proportion
from rmt_lightning.tasks.placement import Placement


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
class LengthResult(Proportion):
    """Accuracy on inputs of one length.

    Attributes:
        segments: their length.
        distances: accuracy by distance from fact to question; key k holds distances 2^(k-1) … 2^k - 1, key 0 holds 0.
    """

    segments: int
    distances: dict[int, Proportion] = field(default_factory=dict)


class Answering(Protocol):
    """What can be asked."""

    def __call__(self, segments: Iterator[Tensor]) -> Tensor:
        """Scores (B, C or more) after an iterator of (B, S) segments, the largest of which stands for the answer."""

    def classes(self, answer: Tensor) -> Tensor:
        """Which of the scores stands for each answer, (B, A) token ids -> (B,)."""


@torch.inference_mode()
def evaluate_length(
    module: Answering,
    placement: Placement,
    num_segments: int,
    samples: int,
    batch_size: int,
    device: torch.device,
    on_segment: Callable[[], object] = lambda: None,
) -> LengthResult:
    """Accuracy on test samples of `num_segments` segments, read one segment at a time in constant memory.

    Args:
        module: what answers, on `device` and in evaluation mode.
        placement: where the samples come from.
        num_segments: T.
        samples: how many.
        batch_size: B.
        device: where segments are wanted.
        on_segment: called after each segment of each batch.
    """
    right: Counter[int] = Counter()
    seen: Counter[int] = Counter()
    for start in range(0, samples, batch_size):
        numbers = range(start, min(start + batch_size, samples))
        segments, answers, distances = placement.stream("test", num_segments, numbers)

        def fed(segments: Iterator[Tensor] = segments) -> Iterator[Tensor]:
            for segment in segments:
                yield segment.to(device)
                on_segment()

        correct = module(fed()).argmax(dim=1) == module.classes(answers.to(device))
        for distance, is_right in zip(distances.tolist(), correct.tolist(), strict=True):
            seen[distance.bit_length()] += 1
            right[distance.bit_length()] += is_right
    by_distance = {key: Proportion(right[key], seen[key]) for key in sorted(seen)}
    return LengthResult(right.total(), seen.total(), num_segments, by_distance)
