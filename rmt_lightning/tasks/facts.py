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

import glob
import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated, Literal, Protocol, runtime_checkable

import numpy as np
from annotated_types import Ge

from rmt_lightning.core.errors import UserError

Split = Literal["train", "validation", "test"]

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
        where: "start" sets the facts at the very start of the input, "anywhere" between any two sentences.
    """

    name: str
    answers: tuple[str, ...]
    where: Literal["start", "anywhere"]

    def draw(self, rng: np.random.Generator, split: Split) -> Example:
        """Draw an example that belongs to `split`, using `rng` alone."""

    def sentences(self) -> Iterator[str]:
        """Every sentence the task can say, for a tokenizer that is trained on the spot."""


@runtime_checkable
class Finite(Protocol):
    """What a task offers besides if there is an end of its questions; validation and test ask each at most once."""

    def questions(self, split: Split) -> Sequence[Example]:
        """All questions of a split."""


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
    where: Literal["start", "anywhere"] = "anywhere"
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
    where: Literal["start", "anywhere"] = "anywhere"
    answers = (*PLACES, "nowhere")
    repeated = 1

    def __init__(self, moves: Annotated[int, Ge(1)] = 4) -> None:
        self.moves = moves

    @property
    def easier(self) -> tuple[Whereabouts, ...]:
        """What to begin with (see `SegmentCurriculum`): a single move, then two."""
        return tuple(Whereabouts(moves) for moves in (1, 2) if moves < self.moves)

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
    where: Literal["start", "anywhere"] = "anywhere"
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
    where: Literal["start", "anywhere"] = "anywhere"
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


class Babi:
    """Facts, questions and answers read from files of the bAbI tasks (Weston et al. 2016, arXiv 1502.05698).

    ```
    1 Mary moved to the bathroom.
    2 John went to the hallway.
    3 Where is Mary? \tbathroom\t1      the answer, and the numbers of the facts that it needs; without them, all
    ```

    Every statement told before a question is a fact, in the order of the file. The answers of all files are the
    classes. A file for validation or test is asked whole. Where there is none, one story in ten of `path` is held back;
    of these stories each question is asked once that training does not tell word by word.

    Args:
        path: a bAbI file, such as tasks_1-20_v1-2/en-10k/qa1_single-supporting-fact_train.txt, a pattern, or a list of
            either; may only be missing where nothing is trained, and a test file is given.
        validation_path: likewise, for validation.
        test_path: likewise, for the test.

    Attributes:
        remarks: what people should know of the questions.

    Raises:
        UserError: if a file is missing or is no bAbI file, naming the line; if `path` has too few stories to be split.
    """

    name = "babi"
    where: Literal["start", "anywhere"] = "anywhere"

    def __init__(
        self,
        path: str | list[str] | None = None,
        validation_path: str | list[str] | None = None,
        test_path: str | list[str] | None = None,
    ) -> None:
        if path is None and test_path is None:
            raise UserError("task.path: is missing; give task.path=…")
        given = {"path": path, "validation_path": validation_path, "test_path": test_path}
        stories = {name: list(_read(f"task.{name}", value)) for name, value in given.items() if value is not None}
        everything = [example for of_file in stories.values() for story in of_file for example in story]
        self.answers = tuple(sorted({example.answer for example in everything}))
        self._sentences = tuple(dict.fromkeys(s for e in everything for s in (*e.facts, e.question)))
        held_back: dict[Split, list[Story]] = {
            split: stories[f"{split}_path"] for split in _HELD_BACK if f"{split}_path" in stories
        }
        parts = _split(f"task.path={path}", stories.get("path", []), held_back)
        self._examples = {split: tuple(chain.from_iterable(part)) for split, part in parts.items()}
        for split in _HELD_BACK:
            if split not in held_back:
                self._examples[split] = _only_there(self._examples[split], self._examples["train"])
        self.remarks = tuple(self._remarks(held_back))

    def _remarks(self, given: Collection[Split]) -> Iterator[str]:
        """How many questions there are, from which files, and what should not be there."""
        train = self._examples["train"]
        counts = [f"{len(train):,} questions for training"] if train else []
        for split in _HELD_BACK:
            source = f"all of task.{split}_path" if split in given else "a tenth of task.path"
            counts += [f"{len(self._examples[split]):,} for {split}, {source}"] if self._examples[split] else []
        yield "; ".join(counts)
        known, answers = set(train), {example.answer for example in train}
        for split in _HELD_BACK if train else ():
            examples = self._examples[split]
            for strange, what in (
                (lambda example: example in known, "stand in training too, word for word"),
                (lambda example: example.answer not in answers, "have answers that it never gives"),
            ):
                if count := sum(map(strange, examples)):
                    yield f"of the {len(examples):,} questions for {split}, {count:,} {what}"

    def questions(self, split: Split) -> tuple[Example, ...]:
        """All that can be asked of a split, as it stands in the file."""
        if not self._examples[split]:
            raise UserError("task.path: is missing; give task.path=…")
        return self._examples[split]

    def draw(self, rng: np.random.Generator, split: Split) -> Example:
        examples = self.questions(split)
        return examples[int(rng.integers(len(examples)))]

    def sentences(self) -> Iterator[str]:
        yield from self._sentences


Story = tuple[Example, ...]
_HELD_BACK: tuple[Split, Split] = ("validation", "test")
_LINE = re.compile(r"(\d{1,9})\s+(\S.*)", re.DOTALL)
# Without a tab, such a line has lost what stood after it.
_ASKS = re.compile(r"[?？؟](\s|$)")


def _read(key: str, given: str | list[str]) -> Iterator[Story]:
    """Yield the questions of each story in the files that a setting names, each file once."""
    files: dict[str, None] = {}
    for name in [given] if isinstance(given, str) else given:
        path = os.path.expanduser(name)
        if os.path.isdir(path):
            raise UserError(f"{key}={name}: is a folder; give a file, or a pattern such as '{name}/qa1_*_train.txt'")
        found = [] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
        files |= dict.fromkeys(map(os.path.normpath, found or [path]))
    if not files:
        raise UserError(f"{key}=[]: names no file; give one")
    for file in files:
        try:
            content = Path(file).read_bytes()
            lines = content.decode().replace("\r\n", "\n").replace("\r", "\n").split("\n")
            if (zero := content.find(0)) >= 0:
                # As UTF-16 has them.
                raise UnicodeDecodeError("utf-8", content, zero, zero + 1, "a zero")
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            raise UserError(f"{key}={file}: line {line} is not UTF-8; save it as UTF-8") from None
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            raise UserError(f"{key}={file}: cannot be read as a bAbI file ({why}); give a qa*.txt file") from None
        yield from _stories(f"{key}={file}", lines)


def _stories(shown: str, lines: Iterable[str]) -> Iterator[Story]:
    """Yield the questions of each story. One begins with number 1, or 0; then numbers grow."""
    facts: dict[int, str] = {}
    story: list[Example] = []
    before: int | None = None
    numbered = ((number, line.strip("\ufeff \t")) for number, line in enumerate(lines, start=1))
    number = 0
    for number, line in ((number, line) for number, line in numbered if line):
        try:
            position, text, answer, needed = _parse(line)
            if position == 0 or (position == 1 and before != 0):
                if facts and not story:
                    raise ValueError("begins a story before anything has been asked about the one before")
                if story:
                    yield tuple(story)
                facts, story = {}, []
            elif before is None or position <= before:
                raise ValueError(f"has the number {position}; a story begins with 1, and numbers grow")
            before = position
            if answer is None:
                facts[position] = text
                continue
            if not facts:
                raise ValueError("asks before anything is told")
            if unknown := [one for one in needed if one not in facts]:
                raise ValueError(f"needs {unknown[0]}, which is the number of no statement before it")
            order = list(facts)
            support = tuple(map(order.index, needed)) or tuple(range(len(facts)))
            story.append(Example(tuple(facts.values()), text, answer, support))
        except ValueError as error:
            raise UserError(f"{shown}: line {number} {error}") from None
    if not story:
        raise UserError(f"{shown}: {f'line {number} ends a story that asks nothing' if facts else 'is empty'}")
    yield tuple(story)


def _parse(line: str) -> tuple[int, str, str | None, list[int]]:
    """Number, sentence, answer and the numbers of the facts that it needs; a statement has no answer.

    Raises:
        ValueError: what is wrong with the line.
    """
    match = _LINE.fullmatch(line)
    if match is None:
        raise ValueError("is not of the form '<number> <sentence>' of bAbI files")
    text, *rest = map(str.strip, match[2].split("\t"))
    if not rest:
        if _ASKS.search(text):
            raise ValueError("asks without a tab before the answer")
        return int(match[1]), text, None, []
    answer, ids = rest[0], " ".join(rest[1:]).replace(",", " ").split()
    if not answer:
        raise ValueError("has no answer after its tab")
    if len(rest) > 2 or not all(map(str.isdecimal, ids)):
        raise ValueError("does not end in '<question> tab <answer> tab <numbers of facts>'")
    if len(rest) == 1 and not _ASKS.search(text):
        raise ValueError("has a tab, but neither a question mark before it nor the numbers of facts after the answer")
    return int(match[1]), text, answer, [int(one) for one in ids]


def _split(shown: str, stories: list[Story], given: dict[Split, list[Story]]) -> dict[Split, list[Story]]:
    """The stories of each split: those that are `given`, or one in ten of `stories`, of which equal ones go together.

    Raises:
        UserError: if there are fewer than ten to be split.
    """
    parts: dict[Split, list[Story]] = {"train": [], "validation": [], "test": [], **given}
    numbers = {story: number for number, story in enumerate(dict.fromkeys(stories))}
    if 0 < len(stories) < 10 and len(given) < len(_HELD_BACK):
        raise UserError(
            f"{shown}: holds {len(stories)} bAbI stories; at least 10 are needed to hold some back; give more, or "
            "task.validation_path and task.test_path"
        )
    for place, story in enumerate(stories):
        # With fewer different ones, some are on both sides.
        number = numbers[story] if len(numbers) >= 10 else place
        split = _HELD_BACK[number % 10 - 8] if number % 10 >= 8 else "train"
        parts["train" if split in given else split].append(story)
    return parts


def _only_there(examples: Sequence[Example], train: Sequence[Example]) -> tuple[Example, ...]:
    """Each of the examples once, without those of training, unless nothing else is left."""
    known = set(train)
    once = tuple(dict.fromkeys(examples))
    return tuple(example for example in once if example not in known) or once
