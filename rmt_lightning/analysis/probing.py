"""What a model has learnt: how it answers a probe, beside two readers that know nothing but the names of places."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rmt_lightning.analysis.extrapolation import Answering, replies
from rmt_lightning.core.statistics import Proportion
from rmt_lightning.tasks.facts import PLACES
from rmt_lightning.tasks.placement import Key, Placement
from rmt_lightning.tasks.probes import places_in


@dataclass(frozen=True)
class ProbeResult(Proportion):
    """Answers to one probe (see tasks/probes.py), or to the task itself.

    Attributes:
        decoy: how many of them are another place that the facts name.
        last_place: right answers of who says the place that was named last, wherever in the input that was.
        commonest_place: right answers of who says the place that was named most often, as a bag of words tells it.
    """

    decoy: int
    last_place: int
    commonest_place: int

    def row(self) -> dict[str, Any]:
        counts = {"decoy": self.decoy, "last_place": self.last_place, "commonest_place": self.commonest_place}
        return super().row() | counts


def evaluate_probe(
    module: Answering,
    placement: Placement,
    num_segments: int,
    samples: int | None,
    batch_size: int,
    device: torch.device,
    on_segment: Callable[[], object] = lambda: None,
) -> ProbeResult:
    """Ask test samples of a task whose answers are places; arguments, and what is raised, as of `replies`."""
    places = [answer for answer in placement.task.answers if answer in PLACES]
    ids = torch.from_numpy(np.stack([placement.answer_ids(place) for place in places]))
    said = dict(zip(module.classes(ids.to(device)).tolist(), places, strict=True))
    found: list[tuple[bool, bool, bool, bool]] = []
    questions = set()
    for reply in replies(module, placement, num_segments, samples, batch_size, device, on_segment):
        example = reply.example
        decoys = {*places_in(" ".join(example.facts))} - {example.answer}
        last, commonest = spot(placement, Key(num_segments, reply.number))
        spotted = (last == example.answer, commonest == example.answer)
        found.append((reply.right, said.get(reply.said) in decoys, *spotted))
        questions.add((example.facts, example.question))
    right, decoy, last_place, commonest_place = map(sum, zip(*found, strict=True))
    return ProbeResult(
        right, len(found), decoy, last_place, commonest_place, questions=len(questions), finite=placement.finite
    )


def spot(placement: Placement, key: Key) -> tuple[str | None, str | None]:
    """The places that a test sample names last and most often, but for those in its question, which ask and don't tell.

    Of places that are named equally often a bag of words cannot tell which, and takes the first one of `PLACES`. A word
    that the border of two segments cuts is none.
    """
    sample = placement.sample("test", key)
    assert sample.example is not None, "only mere noise has none"
    asked = places_in(sample.example.question)
    named: list[str] = []
    for ids in sample.segments:
        text = str(placement.tokenizer.decode(ids))
        named += (place for place in places_in(text) if place not in asked)
    commonest = max(PLACES, key=named.count) if named else None
    return (named[-1] if named else None), commonest
