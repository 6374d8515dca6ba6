"""What a model has learnt: how it answers a probe, beside two readers that know nothing but the names of places."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rmt_lightning.analysis.extrapolation import Reply
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


def score_probe(found: Iterable[Reply], placement: Placement) -> ProbeResult:
    """How samples that `placement` has made were answered, of a task whose answers are places."""
    seen: list[tuple[bool, bool, bool, bool]] = []
    questions = set()
    for reply in found:
        example = reply.example
        decoys = {*places_in(" ".join(example.facts))} - {example.answer}
        last, commonest = spot(placement, reply.key)
        spotted = (last == example.answer, commonest == example.answer)
        seen.append((reply.right, reply.said in decoys, *spotted))
        questions.add((example.facts, example.question))
    right, decoy, last_place, commonest_place = map(sum, zip(*seen, strict=True))
    return ProbeResult(
        right, len(seen), decoy, last_place, commonest_place, questions=len(questions), finite=placement.finite
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
