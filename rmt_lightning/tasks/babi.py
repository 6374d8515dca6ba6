"""Facts, questions and answers of the bAbI tasks, read from their files."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from rmt_lightning.core.errors import UserError
from rmt_lightning.tasks.facts import Example, Split, Where


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
    where: Where = "anywhere"

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
        if os.path.exists(file) and not os.path.isfile(file):
            raise UserError(f"{key}={file}: is no plain file; give a qa*.txt file")
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
