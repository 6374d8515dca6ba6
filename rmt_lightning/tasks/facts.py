"""Worlds that state facts, ask a question and know the answer.

To add a task, write a class with the five members of `Task` and one yaml in conf/task/. A task that small models from
scratch do not learn at once may offer a tuple of `easier` ones, easiest first, which `curriculum.lessons=true` begins
stage 1 with, and say how many of the last of them are `repeated` at the beginning of every later stage. One with an end
of questions is `Finite` too. Any may have `remarks`, lines that are shown when a run begins.

Every world holds a fifth of its stories back from training, word by word: validation asks about facts the model has
never read as they are told there, though it may have read the same in other words. (The published code drew both from
the same ones.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol, get_args, runtime_checkable

import numpy as np
from annotated_types import Ge, Le

from rmt_lightning.core.errors import UserError

Split = Literal["train", "validation", "test"]
Where = Literal["start", "anywhere", "apart"]

# The six answers, the four people and the five verbs of RMT-2023 (arXiv 2304.11062, section 4), taken from bAbI.
PLACES = ("bathroom", "hallway", "garden", "office", "bedroom", "kitchen")
PEOPLE = ("Mary", "John", "Daniel", "Sandra")
VERBS = ("moved", "went", "went back", "journeyed", "travelled")
OBJECTS = ("apple", "football", "milk")
PICK_UPS = ("picked up", "took", "got", "grabbed")
OPPOSITE = {"north": "south", "south": "north", "east": "west", "west": "east"}
DIRECTIONS = tuple(OPPOSITE)
# How often a question is asked about somebody who has not moved.
NOWHERE = 0.1


@dataclass(frozen=True)
class Example:
    """One question and what must be remembered to answer it.

    Attributes:
        facts: whole sentences, in the order in which they are read.
        question: the sentence that ends the input.
        answer: a text, one of the task's `answers`.
        support: indices of the facts without which the answer is not known; the others are decoys.
        also: other questions about the same facts, with their answers, for training that asks more than once. A task
            has as many of them in all its examples.
    """

    facts: tuple[str, ...]
    question: str
    answer: str
    support: tuple[int, ...]
    also: tuple[tuple[str, str], ...] = ()


class Task(Protocol):
    """What every task offers.

    Attributes:
        name: how people call it.
        answers: all that an answer may be.
        where: "start" sets the facts at the very start of the input, "anywhere" between any two sentences, "apart" in
            segments of their own as far as there are enough.
    """

    name: str
    answers: tuple[str, ...]
    where: Where

    def draw(self, rng: np.random.Generator, split: Split) -> Example:
        """Draw an example that belongs to `split`, using `rng` alone."""

    def sentences(self) -> Iterator[str]:
        """Every sentence the task can say, for a tokenizer that is trained on the spot."""


def check_task(task: Task) -> None:
    """Raise UserError, naming what is wrong, unless a task tells and draws what every task does."""
    kind = type(task).__name__
    if missing := [name for name in Task.__annotations__ if not hasattr(task, name)]:
        # Those of one's own may set them when they are made.
        raise UserError(f"task: a {kind} has no {missing[0]}, as every task has; give it one")
    if not isinstance(task.name, str) or task.name in ("", ".", "..") or "/" in task.name:
        raise UserError(f"task: a {kind} is named {task.name!r}; let its name be a word, for folders are given it too")
    if not _are_texts(task.answers, list) or not task.answers:
        raise UserError(f"task: the answers of a {kind} are {task.answers!r:.60}; let them be a tuple of texts")
    if task.where not in get_args(Where):
        raise UserError(f"task: of a {kind}, where is {task.where!r}; allowed: {', '.join(get_args(Where))}")
    said: Any = task.sentences()
    if not isinstance(said, Iterable) or isinstance(said, str) or not all(isinstance(text, str) for text in said):
        raise UserError(f"task: sentences() of a {kind} makes no texts; let it yield all that the task may say")
    if isinstance(task, Finite):
        # Of a split that nobody asks for, it may have no questions.
        return
    drawn, again = (task.draw(np.random.default_rng(0), "train") for _ in range(2))
    fault = _fault(drawn)
    if fault is None and drawn != again:
        fault = "draws another one from the same rng; let it draw with rng alone"
    if fault:
        raise UserError(f"task: draw() of a {kind} {fault}")


def _fault(drawn: Any) -> str | None:
    if not isinstance(drawn, Example):
        return f"returns a {type(drawn).__name__}; let it return an Example"
    if not _are_texts(drawn.facts):
        return f"gives the facts {drawn.facts!r:.60}; let them be a tuple of sentences"
    if not isinstance(drawn.question, str) or not isinstance(drawn.answer, str):
        return f"asks {drawn.question!r:.60} and answers {drawn.answer!r:.60}; let both be texts"
    if not drawn.support or not all(number in range(len(drawn.facts)) for number in drawn.support):
        return f"gives the support {drawn.support!r:.60}; let it number some of the {len(drawn.facts)} facts, from 0 on"
    return None


def _are_texts(value: Any, *kinds: type) -> bool:
    return type(value) in (tuple, *kinds) and all(isinstance(text, str) for text in value)


@runtime_checkable
class Finite(Protocol):
    """What a task offers besides if there is an end of its questions; validation and test ask each at most once."""

    def questions(self, split: Split) -> Sequence[Example]:
        """All questions of a split."""


def questions_digest(task: Finite) -> str:
    """What names all that can be asked, and in which split."""
    content = hashlib.sha256()
    splits: tuple[Split, ...] = ("train", "validation", "test")
    for split in splits:
        content.update(repr((split, tuple(task.questions(split)))).encode())
    return content.hexdigest()


@runtime_checkable
class Counted(Protocol):
    """What a task offers besides whose facts are so many pairs, any of which may be asked for.

    Attributes:
        pairs: n.
    """

    pairs: int

    def capacity(self, accuracy: float) -> float:
        """How many of the pairs are held by a memory that answers so often."""


def held_out(*choices: int) -> bool:
    """Whether a combination of choices is kept for validation and test: one in five, spread over all choices."""
    return sum(choices) % 5 == 0


def pick(rng: np.random.Generator, split: Split, *sizes: int) -> tuple[int, ...]:
    """Draw one index below each of `sizes`, among the combinations that belong to `split`."""
    while True:
        choices = tuple(int(rng.integers(size)) for size in sizes)
        if held_out(*choices) == (split != "train"):
            return choices


class Detect:
    """One fact, anywhere in the noise (RMT-2023, section 4.2).

    ```
    noise noise Mary went to the garden. noise noise … noise Where is Mary?   -> garden
    ```
    """

    name = "detect"
    where: Where = "anywhere"
    answers = PLACES

    def draw(self, rng: np.random.Generator, split: Split) -> Example:
        person, verb, place = pick(rng, split, len(PEOPLE), len(VERBS), len(PLACES))
        fact = f"{PEOPLE[person]} {VERBS[verb]} to the {PLACES[place]}."
        return Example((fact,), f"Where is {PEOPLE[person]}?", PLACES[place], support=(0,))

    def sentences(self) -> Iterator[str]:
        for person in PEOPLE:
            yield f"Where is {person}?"
            yield from (f"{person} {verb} to the {place}." for verb in VERBS for place in PLACES)


class Memorize(Detect):
    """One fact, at the very start (RMT-2023, section 4.1).

    ```
    Mary went to the garden. noise noise … noise Where is Mary?   -> garden
    ```
    """

    name = "memorize"
    where = "start"


class Whereabouts:
    """Who is where, after several people have moved, some of them more than once (in the manner of bAbI task 1).

    ```
    noise John went to the office. noise Mary moved to the garden. noise Mary journeyed to the kitchen. noise
    Where is Mary?   -> kitchen
    ```

    Of each person the latest move counts. Who has not moved is nowhere, which is asked once in ten times.

    Args:
        moves: how many there are at most.

    Raises:
        UserError: if there are none.
    """

    name = "whereabouts"
    where: Where = "anywhere"
    answers = (*PLACES, "nowhere")

    def __init__(self, moves: Annotated[int, Ge(1), Le(1000)] = 4) -> None:
        self.moves = moves

    @property
    def easier(self) -> tuple[Whereabouts, ...]:
        """What to begin with (see `SegmentCurriculum`): a single move, then two."""
        return tuple(Whereabouts(moves) for moves in (1, 2) if moves < self.moves)

    @property
    def repeated(self) -> int:
        """With how many of these later stages begin too: with all, for a memory of one person is learnt first."""
        return len(self.easier)

    def draw(self, rng: np.random.Generator, split: Split) -> Example:
        facts: list[str] = []
        # Of each person who has moved: where to, and which fact tells it.
        latest: dict[int, tuple[int, int]] = {}
        for number in range(int(rng.integers(1, self.moves + 1))):
            while True:
                person, verb, place = pick(rng, split, len(PEOPLE), len(VERBS), len(PLACES))
                if latest.get(person, (None,))[0] != place:
                    break
            latest[person] = place, number
            facts.append(f"{PEOPLE[person]} {VERBS[verb]} to the {PLACES[place]}.")
        still = [person for person in range(len(PEOPLE)) if person not in latest]
        asked = int(rng.choice(still if still and rng.random() < NOWHERE else list(latest)))
        (question, answer), *also = (
            (f"Where is {PEOPLE[person]}?", PLACES[latest[person][0]] if person in latest else "nowhere")
            for person in sorted(range(len(PEOPLE)), key=lambda person: person != asked)
        )
        # That somebody has not moved is told by nothing, and not known before the end.
        support = (latest[asked][1],) if asked in latest else tuple(range(len(facts)))
        return Example(tuple(facts), question, answer, support, tuple(also))

    def sentences(self) -> Iterator[str]:
        yield "nowhere"
        yield from Detect().sentences()


class Reasoning:
    """Two facts about three places in a row (RMT-2023, section 4.3; bAbI task 4, two-argument relations).

    ```
    noise The hallway is east of the bathroom. noise The bedroom is west of the bathroom. noise
    What is the bathroom east of?   -> bedroom
    ```

    As in bAbI, the question is answered by one of the two facts or by its inverse; the other one names the wrong place.
    For a task in which both facts are needed see `Carried`.

    Args:
        plain: whether both facts end with the middle place and the question repeats the words of one of them, as above.
            Such questions are answered by comparing directions alone.
    """

    name = "reasoning"
    where: Where = "anywhere"
    answers = PLACES
    repeated = 1

    def __init__(self, plain: bool = False) -> None:
        self.plain = plain

    @property
    def easier(self) -> tuple[Reasoning, ...]:
        """What to begin with (see `SegmentCurriculum`)."""
        return (Reasoning(plain=True),)

    def draw(self, rng: np.random.Generator, split: Split) -> Example:
        while True:
            # How far the outer places stand after the middle one in the list of places, less one; and whether they lie
            # north and south of it, or east and west. The middle place is drawn apart, which keeps the answers even.
            one, other, line = (int(rng.integers(size)) for size in (len(PLACES) - 1, len(PLACES) - 1, 2))
            # Two times in three the middle place comes last in a fact, as in the published rows.
            first, second = (int(not self.plain and rng.random() < 1 / 3) for _ in range(2))
            swapped = int(rng.integers(2))
            if one != other and held_out(one, other, line, swapped + 2 * first + 4 * second) == (split != "train"):
                break
        middle = int(rng.integers(len(PLACES)))
        left, right = ((middle + 1 + after) % len(PLACES) for after in (one, other))
        d = DIRECTIONS[2 * line]
        facts = [(middle, OPPOSITE[d], left) if first else (left, d, middle)]
        facts += [(middle, d, right) if second else (right, OPPOSITE[d], middle)]
        if swapped:
            facts.reverse()
        sentences = tuple(f"The {PLACES[a]} is {way} of the {PLACES[b]}." for a, way, b in facts)
        questions = [(f"What is {way} of the {PLACES[b]}?", PLACES[subject]) for subject, way, b in facts]
        if not self.plain:
            questions += [
                (f"What is the {PLACES[b]} {OPPOSITE[way]} of?", PLACES[subject]) for subject, way, b in facts
            ]
        asked = int(rng.integers(len(questions)))
        question, answer = questions.pop(asked)
        return Example(sentences, question, answer, support=(asked % 2,), also=tuple(questions))

    def sentences(self) -> Iterator[str]:
        for direction in DIRECTIONS:
            for place in PLACES:
                yield f"What is {direction} of the {place}?"
                yield f"What is the {place} {direction} of?"
                yield f"The {place} is {direction} of the {PLACES[0]}."


class Carried:
    """Who carried it, and where they went: both facts are needed (in the manner of bAbI task 2).

    ```
    noise Mary took the apple. noise John got the milk. noise John went to the office. noise
    Mary moved to the garden. noise Where is the apple?   -> garden
    ```

    A second person with a second object is the decoy, so neither the object nor the places alone tell the answer.

    Args:
        asked: "thing" as above; "person": "Where is Mary?", for which one fact is enough; or "either".
        always: who or what is always in the story that is asked about, such as "Mary" or "apple"; None: that is drawn.
        interleaved: whether the two stories are; else one is over before the other begins.

    Raises:
        UserError: if `always` is nobody and nothing of the task.
    """

    name = "carried"
    where: Where = "anywhere"
    answers = PLACES
    repeated = 3

    def __init__(
        self,
        asked: Literal["thing", "person", "either"] = "thing",
        always: str | None = None,
        interleaved: bool = True,
    ) -> None:
        if always not in (None, *PEOPLE, *OBJECTS):
            raise UserError(f"task.always={always}: choose one of {', '.join((*PEOPLE, *OBJECTS))}, or null")
        self.asked = asked
        self.always = always
        self.interleaved = interleaved

    @property
    def easier(self) -> tuple[Carried, ...]:
        """What to begin with (see `SegmentCurriculum`): the second of the two steps, then both.

        Which of two stories the question matches is learned late, like a parity: as long as the model tells neither
        stories nor questions apart, learning one of them alone gains nothing. So the question is the same at first. The
        same is true of memory, and later stages begin with the last forms: who has the apple is worth remembering
        alone, and so is a story that is told to its end before the other begins.
        """
        return (
            Carried("person", always="Mary"),
            Carried("person"),
            Carried("either", always="apple", interleaved=False),
            Carried("either", interleaved=False),
            Carried("either", always="apple"),
            Carried("either"),
            Carried(always="apple", interleaved=False),
            Carried(interleaved=False),
            Carried(always="apple"),
        )

    def draw(self, rng: np.random.Generator, split: Split) -> Example:
        while True:
            who, what, where, verb = pick(rng, split, len(PEOPLE), len(OBJECTS), len(PLACES), len(VERBS))
            if self.always in (None, PEOPLE[who], OBJECTS[what]):
                break
        while True:
            other_who, other_what, other_where = (
                int((own + rng.integers(1, size)) % size)
                for own, size in ((who, len(PEOPLE)), (what, len(OBJECTS)), (where, len(PLACES)))
            )
            other_verb = int(rng.integers(len(VERBS)))
            # What is held back is no decoy either.
            if split != "train" or not held_out(other_who, other_what, other_where, other_verb):
                break
        mine = [self._take(rng, who, what), self._go(who, verb, where)]
        theirs = [self._take(rng, other_who, other_what), self._go(other_who, other_verb, other_where)]
        # Everybody takes before they go; apart from that stories are interleaved at random.
        slots = rng.permutation([True, True, False, False])
        if not self.interleaved:
            slots = np.repeat(rng.permutation([True, False]), 2)
        facts = tuple(mine.pop(0) if own else theirs.pop(0) for own in slots)
        support = tuple(np.flatnonzero(slots).tolist())
        here, there = PLACES[where], PLACES[other_where]
        people = [(f"Where is {PEOPLE[who]}?", here), (f"Where is {PEOPLE[other_who]}?", there)]
        things = [(f"Where is the {OBJECTS[what]}?", here), (f"Where is the {OBJECTS[other_what]}?", there)]
        questions, others = things, people
        if self.asked == "person" or (self.asked == "either" and rng.integers(2)):
            questions, others, support = people, things, support[-1:]
        if self.asked == "either":
            questions += others
        (question, answer), *also = questions
        return Example(facts, question, answer, support, tuple(also))

    @staticmethod
    def _take(rng: np.random.Generator, person: int, thing: int) -> str:
        return f"{PEOPLE[person]} {PICK_UPS[rng.integers(len(PICK_UPS))]} the {OBJECTS[thing]}."

    @staticmethod
    def _go(person: int, verb: int, place: int) -> str:
        return f"{PEOPLE[person]} {VERBS[verb]} to the {PLACES[place]}."

    def sentences(self) -> Iterator[str]:
        yield from (f"Where is the {thing}?" for thing in OBJECTS)
        for person in PEOPLE:
            yield from (f"{person} {verb} to the {place}." for verb in VERBS for place in PLACES)
            yield from (f"{person} {verb} the {thing}." for verb in PICK_UPS for thing in OBJECTS)
