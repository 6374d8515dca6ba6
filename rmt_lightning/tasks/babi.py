"""Facts, questions and answers of the bAbI tasks, read from their files."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from rmt_lightning.core.errors import UserError
from rmt_lightning.tasks.facts import Example, Split
from rmt_lightning.tasks.questions import Questions, Story, told


class Babi(Questions):
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

    Raises:
        UserError: if a file is missing or is no bAbI file, naming the line; if `path` has too few stories to be split.
    """

    name = "babi"
    STORIES = "bAbI stories"

    def __init__(
        self,
        path: str | list[str] | None = None,
        validation_path: str | list[str] | None = None,
        test_path: str | list[str] | None = None,
    ) -> None:
        if path is None and test_path is None:
            raise UserError("task.path: is missing; give task.path=…")
        given: dict[Split, tuple[str, str | list[str] | None]] = {
            "train": ("task.path", path),
            "validation": ("task.validation_path", validation_path),
            "test": ("task.test_path", test_path),
        }
        sources = {split: key for split, (key, names) in given.items() if names is not None}
        stories = {split: list(_read(key, names)) for split, (key, names) in given.items() if names is not None}
        super().__init__(stories, sources, f"task.path={path}", answers_of=sources)
        # Tokenizers of earlier runs have learnt these, and no answers.
        self._sentences = tuple(dict.fromkeys(told(chain.from_iterable(chain.from_iterable(stories.values())))))


class Babilong(Questions):
    """A task of bAbI as BABILong asks it: facts amid long text (Kuratov et al. 2024, arXiv 2406.10149).

    Every statement told before a question is a fact. The test file is asked whole. The train file is for training, but
    for one story in ten, which are for validation where the folder has no file for that. Nothing of the test is known
    in training: the answers of the train file are the classes, lists such as "apple,milk" among them, and what the
    test answers otherwise is counted as wrong.

    Args:
        folder: that of the bAbI files, such as tasks_1-20_v1-2/en-10k.
        name: the task, qa1 to qa20.

    Raises:
        UserError: if the folder has no such files, telling which are there; or one is no bAbI file, naming the line.
    """

    name = "babilong"
    STORIES = "bAbI stories"
    GIVE = "a file for validation, such as qa1_valid.txt"

    def __init__(self, folder: str, name: str = "qa1") -> None:
        there = _tasks_in(folder)
        files = there.get(name.lower(), {})
        if missing := [kind for kind in ("train", "test") if kind not in files]:
            whole = [task for task in sorted(there, key=_number) if {"train", "test"} <= there[task].keys()]
            hint = f"; task=babi task.path={files['train']} holds a part of it back" if "train" in files else ""
            told = f"whole there: {', '.join(whole)}" if whole else "give the folder of files such as qa1_*_train.txt"
            raise UserError(f"task.name={name}: task.folder={folder} has no {missing[0]} file of it; {told}{hint}")
        sources = {split: Path(files[kind]).name for split, kind in _FILES.items() if kind in files}
        stories = {split: list(_read("task.folder", files[kind])) for split, kind in _FILES.items() if kind in files}
        super().__init__(stories, sources, f"task.folder={files['train']}", answers_of=("train", "validation"))


_FILES: dict[Split, str] = {"train": "train", "validation": "valid", "test": "test"}
_FILE = re.compile(r"(qa\d+)(?:_.*)?_(train|valid|test)\.txt")


def _tasks_in(folder: str) -> dict[str, dict[str, str]]:
    """The files of each task in a folder, by what they are for.

    Raises:
        UserError: if there is no such folder, or there are two files for the same.
    """
    place = os.path.expanduser(folder)
    try:
        names = sorted(entry.name for entry in os.scandir(place) if not entry.is_dir())
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"task.folder={folder}: cannot be read ({why}); give the folder of the bAbI files") from None
    there: dict[str, dict[str, str]] = {}
    for match in filter(None, map(_FILE.fullmatch, names)):
        files = there.setdefault(match[1], {})
        if match[2] in files:
            both = f"{os.path.basename(files[match[2]])} and {match[0]}"
            raise UserError(f"task.folder={folder}: holds {both}; give a folder with one of them")
        files[match[2]] = os.path.join(place, match[0])
    return there


def _number(task: str) -> int:
    return int(task.removeprefix("qa"))


_LINE = re.compile(r"(\d{1,9})\s+(\S.*)", re.DOTALL)
# Without a tab, such a line has lost what stood after it.
_ASKS = re.compile(r"[?？؟](\s|$)")


def _read(key: str, given: str | list[str]) -> Iterator[Story]:
    """Yield the questions of each story in the files that a setting names, each file once."""
    # A file has several names where there are links.
    files: dict[str, str] = {}
    for name in [given] if isinstance(given, str) else given:
        path = os.path.expanduser(name)
        if os.path.isdir(path):
            raise UserError(f"{key}={name}: is a folder; give a file, or a pattern such as '{name}/qa1_*_train.txt'")
        found = [] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
        for file in map(os.path.normpath, found or [path]):
            files.setdefault(os.path.realpath(file), file)
    if not files:
        raise UserError(f"{key}=[]: names no file; give one")
    for file in files.values():
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
