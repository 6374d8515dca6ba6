"""Whether facts and a question find room in the segments of a sample, and which segment each fact stands in.

Shapes: T segments, S text tokens of a segment.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from copy import copy
from typing import NamedTuple

import numpy as np

from rmt_lightning.tasks.facts import Where


class Needs(NamedTuple):
    """The tokens of an example: of each fact, and of the question."""

    facts: list[int]
    question: int

    @property
    def tokens(self) -> int:
        return sum(self.facts) + self.question


class Room(NamedTuple):
    """How much text there is room for in the segments of a sample.

    Attributes:
        tokens: of the whole sample; all its segments are full, but perhaps the first, or where facts stand alone.
        length: S.
        left: what the question leaves of each of the T segments, for facts and noise.
    """

    num_segments: int
    tokens: int
    length: int
    left: dict[int, int]


def segments_needed(needs: Needs, length: int) -> float:
    """How many segments have room for an example, filled from the last one on; infinite if none have."""
    spare = length - needs.question
    if spare < 0 or max(needs.facts, default=0) > length:
        return math.inf
    return len(_packed(needs.facts, spare, length))


def room_in_segments(needs: Needs, num_segments: int, length: int) -> Room | None:
    """The room in a number of full segments; None if that is too little for the example."""
    if segments_needed(needs, length) > num_segments:
        return None
    left = defaultdict(lambda: length, {num_segments - 1: length - needs.question})
    return Room(num_segments, num_segments * length, length, left)


def room_in_tokens(needs: Needs, tokens: int, length: int) -> Room | None:
    """The room in a number of tokens before the question, or, if it is 0, in the facts alone; None if too little."""
    needed = segments_needed(needs, length)
    if needed == math.inf:
        return None
    if tokens == 0:
        packed = _packed(needs.facts, length - needs.question, length)
        return Room(int(needed), needs.tokens, length, dict(enumerate(packed)))
    total = tokens + needs.question
    num_segments = -(-total // length)
    left = defaultdict(lambda: length, {num_segments - 1: length - needs.question})
    left[0] -= num_segments * length - total
    room = Room(num_segments, total, length, left)
    return None if _latest(needs.facts, room) is None else room


def choose_homes(
    rng: np.random.Generator, facts: Sequence[int], room: Room, where: Where, by_tokens: bool
) -> list[int]:
    """The segment of each fact, in order, if they fit.

    Segments are drawn and sorted, those of facts that stand apart each only once while there are enough.
    Where facts crowd, a fact moves on to the next segment with room, but never past the last one from which those
    that follow still find theirs.

    Args:
        rng: draws them.
        facts: tokens of each.
        room: what there is.
        where: facts stand at the start, apart, or anywhere.
        by_tokens: each token is as likely as any other, not each segment, of which the first may be shorter.
    """
    latest = _latest(facts, room)
    assert latest is not None, "there is room"
    if by_tokens:
        missing = room.num_segments * room.length - room.tokens
        wanted = (np.sort(rng.integers(room.tokens, size=len(facts))) + missing) // room.length
    else:
        wanted = np.sort(rng.integers(room.num_segments, size=len(facts)))
    if where == "start":
        wanted[:] = 0
    elif where == "apart":
        places = max(room.num_segments, len(facts))
        wanted = np.sort(rng.choice(places, size=len(facts), replace=False)) * room.num_segments // places
    homes: list[int] = []
    segment, left = 0, copy(room.left)
    for size, preferred, last in zip(facts, wanted, latest, strict=True):
        segment = max(segment, min(int(preferred), last))
        while left[segment] < size:
            segment += 1
        left[segment] -= size
        homes.append(segment)
    return homes


def _packed(sizes: Sequence[int], last: int, others: int) -> list[int]:
    """How much is in each of as few segments as hold facts, filled from the last one on, by what there is room for."""
    filled = [0]
    for size in reversed(sizes):
        if filled[-1] + size > (last if len(filled) == 1 else others):
            filled.append(0)
        filled[-1] += size
    return filled[::-1]


def _latest(facts: Sequence[int], room: Room) -> list[int] | None:
    """The last segment in which each fact may stand so that those after it find room; None if there is too little."""
    latest, spare, segment = [0] * len(facts), copy(room.left), room.num_segments - 1
    for fact in reversed(range(len(facts))):
        while segment >= 0 and spare[segment] < facts[fact]:
            segment -= 1
        if segment < 0:
            return None
        spare[segment] -= facts[fact]
        latest[fact] = segment
    return latest
