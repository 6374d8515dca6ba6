"""What a model has learnt, keyword spotting or who is where: small worlds that tell these apart.

Each is a `Task` that states facts and asks. It is never trained on, and its sentences are of the split that is asked.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from rmt_lightning.core.tokens import token_ids
from rmt_lightning.tasks.facts import PEOPLE, PLACES, VERBS, Detect, Example, Finite, Split, Task, Where, pick
from rmt_lightning.tasks.noise import split_of
from rmt_lightning.tasks.prose import WORDS, written

NOWHERE = "nowhere"
# Verbs that no task tells a move with.
OTHER_VERBS = ("walked", "hurried", "ran", "headed", "strolled")
# They name a place, and tell of nobody where they are.
MENTIONS = ("There was a {adjective} {thing} in the {room}.", "{somebody} dreamed of the {adjective} {room}.")

_PLACE = re.compile(rf"\b(?:{'|'.join(PLACES)})\b", re.IGNORECASE)


def places_in(text: str) -> list[str]:
    """The places that a text names, in its order, each as often as it does."""
    return [found[0].lower() for found in _PLACE.finditer(text)]


class Move(NamedTuple):
    """Somebody goes somewhere."""

    person: str
    place: str
    text: str


@dataclass(frozen=True)
class World:
    """What an example is drawn from."""

    rng: np.random.Generator
    split: Split

    def choose(self, words: Sequence[str]) -> str:
        return words[int(self.rng.integers(len(words)))]

    def move(self, after: Move | None = None, again: bool = False, verbs: Sequence[str] = VERBS) -> Move:
        """A move; after another one, to another place, by another person or by the same one `again`."""
        while True:
            who, how, where = pick(self.rng, self.split, len(PEOPLE), len(verbs), len(PLACES))
            person, place = PEOPLE[who], PLACES[where]
            if after is None or (place != after.place and (person == after.person) == again):
                return Move(person, place, f"{person} {verbs[how]} to the {place}.")

    def aside(self, forms: Sequence[str], but: str | None = None) -> str:
        """A sentence in one of these forms that names a place, another one than `but`."""
        while True:
            text = written(self.choose(forms), self._fill)
            if split_of(text) == self.split and places_in(text) != [but]:
                return text

    def _fill(self, slot: str) -> str:
        return self.choose({"somebody": PEOPLE, "room": PLACES}.get(slot) or WORDS[slot])


def two_people(world: World) -> Example:
    first = world.move()
    moves = (first, world.move(after=first))
    asked = int(world.rng.integers(2))
    return _example(moves[asked].person, moves[asked].place, *(move.text for move in moves), needed=asked)


def another_moves_after(world: World) -> Example:
    move = world.move()
    return _example(move.person, move.place, move.text, world.move(after=move).text)


def moves_twice(world: World) -> Example:
    first = world.move()
    latest = world.move(after=first, again=True)
    return _example(latest.person, latest.place, first.text, latest.text, needed=1)


def mention_before(world: World) -> Example:
    move = world.move()
    return _example(move.person, move.place, world.aside(MENTIONS, but=move.place), move.text, needed=1)


def mention_after(world: World) -> Example:
    move = world.move()
    return _example(move.person, move.place, move.text, world.aside(MENTIONS, but=move.place))


def negation_after(world: World) -> Example:
    move = world.move()
    negation = f"{move.person} did not go to the {{room}} {{time}}."
    return _example(move.person, move.place, move.text, world.aside([negation], but=move.place))


def reworded(world: World, verbs: Sequence[str]) -> Example:
    move = world.move(verbs=verbs)
    return _example(move.person, move.place, move.text)


def other_asked(world: World) -> Example:
    move = world.move()
    return _example(world.choose([person for person in PEOPLE if person != move.person]), NOWHERE, move.text)


def no_fact(world: World) -> Example:
    return _example(world.choose(PEOPLE), NOWHERE, world.aside(MENTIONS))


def _example(asked: str, answer: str, *facts: str, needed: int = 0) -> Example:
    return Example(facts, f"Where is {asked}?", answer, support=(needed,))


@dataclass
class Probe:
    """One of them, as a task.

    Args:
        name: what people call it; with the answer, where that is no place.
        where: as of the task that has been trained.
        make: makes an example.
    """

    name: str
    where: Where
    make: Callable[[World], Example]
    answers: tuple[str, ...] = (*PLACES, NOWHERE)

    def draw(self, rng: np.random.Generator, split: Split) -> Example:
        return self.make(World(rng, split))

    def sentences(self) -> Iterator[str]:
        """None: no tokenizer is trained on what is only asked."""
        return iter(())


def probes(task: Task, tokenizer: PreTrainedTokenizerBase) -> tuple[Task, ...]:
    """What shows what a model has learnt that was trained on a task: the task itself, and probes if any suit it.

    They suit a task without end that tells of the same people and places in the same words. Where answers are no
    places, there is nothing, not even the task.
    """
    if not set(task.answers) <= {*PLACES, NOWHERE}:
        return ()
    rng = np.random.default_rng(0)
    drawn = [task.draw(rng, "test") for _ in range(100)]
    told = {sentence for example in drawn for sentence in (*example.facts, example.question)}
    if isinstance(task, Finite) or not told <= {*Detect().sentences()}:
        return (task,)
    made: dict[str, Callable[[World], Example]] = {
        "two people": two_people,
        "another moves after": another_moves_after,
        "moves twice": moves_twice,
        "mention before": mention_before,
        "mention after": mention_after,
        "negation after": negation_after,
    }
    if verbs := _spelled(OTHER_VERBS, tokenizer):
        made["reworded"] = partial(reworded, verbs=verbs)
    made |= {"other asked (nowhere)": other_asked, "no fact (nowhere)": no_fact}
    return (task, *(Probe(name, task.where, make) for name, make in made.items()))


def _spelled(words: Collection[str], tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Those of the words that a tokenizer has tokens for."""
    ids = token_ids(tokenizer, list(words))
    return tuple(word for word, some in zip(words, ids, strict=True) if some and tokenizer.unk_token_id not in some)
