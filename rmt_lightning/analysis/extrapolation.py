"""Accuracy on inputs longer than those of training.

Shapes: B batch, T segments, S text tokens of a segment, C answers, A tokens of the longest answer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Annotated, Any, NamedTuple, Protocol

import numpy as np
import torch
from annotated_types import Ge, Le
from torch import Tensor

from rmt_lightning.core.errors import UserError
from rmt_lightning.core.statistics import Proportion
from rmt_lightning.tasks.facts import Example
from rmt_lightning.tasks.placement import Key, Placement


@dataclass(frozen=True)
class LengthTest:
    """What to test at the end of a run.

    Attributes:
        segments: lengths of the inputs.
        samples: how many of each; None: all questions, or 256 where there is no end of them.
    """

    segments: list[Annotated[int, Ge(1)]]
    samples: Annotated[int, Ge(1), Le(10**6)] | None = None

    def __post_init__(self) -> None:
        if not self.segments:
            raise UserError("test.segments=[]: names no length; give some, such as [1,2,4]")


@dataclass(frozen=True)
class LengthResult(Proportion):
    """Accuracy on inputs of one length.

    Attributes:
        segments: their length.
        distances: accuracy by distance from fact to question; key k holds distances 2^(k-1) … 2^k - 1, key 0 holds 0.
        fits: the share of all questions that inputs of this length have room for, with their facts; the others are not
            asked. None if that is not known.
    """

    segments: int
    distances: dict[int, Proportion] = field(default_factory=dict)
    fits: float | None = None

    def row(self) -> dict[str, Any]:
        return super().row() | {"fits": self.fits}


class Answering(Protocol):
    """What can be asked."""

    def __call__(self, segments: Iterator[Tensor]) -> Tensor:
        """Scores (B, C or more) after an iterator of (B, S) segments, the largest of which stands for the answer."""

    def classes(self, answer: Tensor) -> Tensor:
        """Which of the scores stands for each answer, (B, A) token ids -> (B,)."""


class Reply(NamedTuple):
    """How a sample was answered.

    Attributes:
        key: of the sample.
        example: what is told and asked.
        distance: segments from the first fact that is needed to the question.
        said: what was answered; None if that is no answer of the task.
        right: whether that is the answer.
    """

    key: Key
    example: Example
    distance: int
    said: str | None
    right: bool


@torch.inference_mode()
def replies(
    module: Answering,
    placement: Placement,
    num_segments: int,
    samples: int | None,
    batch_size: int,
    device: torch.device,
    on_segment: Callable[[], object] = lambda: None,
) -> Iterator[Reply]:
    """The answers to test samples of `num_segments` segments, read one segment at a time in constant memory.

    Args:
        module: what answers, on `device` and in evaluation mode.
        placement: where the samples come from.
        num_segments: T.
        samples: how many, as `Placement.asked` takes it.
        batch_size: B.
        device: where segments are wanted.
        on_segment: called after each segment of each batch.

    Raises:
        UserError: if there is no question that such inputs have room for.
    """
    asked = placement.asked("test", samples, Key(num_segments, 0))
    answers = placement.task.answers
    ids = torch.from_numpy(np.stack([placement.answer_ids(answer) for answer in answers]))
    texts = dict(zip(module.classes(ids.to(device)).tolist(), answers, strict=True))
    for start in range(0, asked, batch_size):
        numbers = range(start, min(start + batch_size, asked))
        segments, answer, distances = placement.stream("test", num_segments, numbers)

        def fed(segments: Iterator[Tensor] = segments) -> Iterator[Tensor]:
            for segment in segments:
                yield segment.to(device)
                on_segment()

        said = module(fed()).argmax(dim=1)
        correct = said == module.classes(answer.to(device))
        keys = (Key(num_segments, number) for number in numbers)
        for key, *of, right in zip(keys, distances.tolist(), said.tolist(), correct.tolist(), strict=True):
            yield Reply(key, placement.example("test", key), of[0], texts.get(of[1]), right)


def score_length(found: Iterable[Reply], placement: Placement, num_segments: int) -> LengthResult:
    """Accuracy on samples of `num_segments` segments that `placement` has made, by the replies to them."""
    # Whether each answer was right, and what was asked, by distance.
    seen: dict[int, list[bool]] = defaultdict(list)
    told: dict[int, set[tuple[tuple[str, ...], str]]] = defaultdict(set)
    for reply in found:
        seen[reply.distance.bit_length()].append(reply.right)
        told[reply.distance.bit_length()].add((reply.example.facts, reply.example.question))

    def proportion(answers: Sequence[bool], questions: Collection[object]) -> dict[str, Any]:
        return {"right": sum(answers), "samples": len(answers), "questions": len(questions), "finite": placement.finite}

    by_distance = {key: Proportion(**proportion(seen[key], told[key])) for key in sorted(seen)}
    whole = proportion([*chain.from_iterable(seen.values())], set().union(*told.values()))
    fits = placement.fits("test", num_segments)
    return LengthResult(**whole, segments=num_segments, distances=by_distance, fits=fits)
