"""Published sets of questions about long texts: where they stand, and how BABILong counts their answers."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from rmt_lightning.core.errors import UserError
from rmt_lightning.core.hub import out_of_reach
from rmt_lightning.core.tokens import in_short, token_count
from rmt_lightning.tasks.text_files import NO_TEXT, ROWS, TextFiles

log = logging.getLogger(__name__)

_PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
# What the answers of BABILong are made of, by task (booydar/babilong, babilong/metrics.py: TASK_LABELS).
LABELS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("qa1", "qa2", "qa3", "qa4", "qa11", "qa12", "qa13"), _PLACES),
    "qa5": ("Bill", "Fred", "Jeff", "Mary", "apple", "football", "milk"),
    **dict.fromkeys(("qa6", "qa9", "qa17", "qa18"), ("no", "yes")),
    "qa7": ("none", "one", "three", "two"),
    "qa8": ("apple", "football", "milk", "nothing"),
    "qa10": ("maybe", "no", "yes"),
    "qa14": ("bedroom", "cinema", "kitchen", "office", "park", "school"),
    "qa15": ("cat", "mouse", "sheep", "wolf"),
    "qa16": ("gray", "green", "white", "yellow"),
    "qa19": ("e,e", "e,n", "e,s", "n,e", "n,n", "n,w", "s,e", "s,s", "s,w", "w,n", "w,s", "w,w"),
    "qa20": ("bedroom", "bored", "garden", "hungry", "kitchen", "thirsty", "tired"),
}


def is_right(target: str, said: str, question: str, labels: Collection[str]) -> bool:
    """Whether an answer counts as right in BABILong (Kuratov et al. 2024; compare_answers of booydar/babilong).

    Case does not matter, and of the answer only what stands before its first full stop does. It is right if, of all
    labels but those that the question names, it holds the target alone; or, where that is a list such as "apple,milk",
    all that is in it. A label counts wherever its letters stand, so in qa7 "none" also holds "one", and is never right.
    """
    first = re.split(r"\.|<context>|<example>", said.lower())[0]
    named = {label for label in map(str.lower, labels) if label in first and label not in question.lower()}
    target = target.lower()
    # Those of qa19, such as "n,e", are labels themselves.
    wanted = target.split(",") if "," in target and len(target) > 3 else [target]
    return named.issuperset(wanted) and len(named) == len(wanted)


class Row(NamedTuple):
    """A question, the text that it is about, and its answer."""

    input: str
    question: str
    target: str


class Part(NamedTuple):
    """What a published set calls by one name: a task at a length, such as qa1 at 64k; without a length, it is empty."""

    task: str
    length: str

    def __str__(self) -> str:
        return f"{self.task} {self.length}".strip()

    @property
    def order(self) -> tuple[int, int, str]:
        """By length, then by the number of the task."""
        number = re.fullmatch(r"qa(\d+)", self.task)
        return token_count("set", self.length) if self.length else -1, int(number[1]) if number else 0, self.task


class PublishedSet:
    """Questions in files with the columns input, question and target, such as RMT-team/babilong on the Hub.

    Which task they are of, and how long their texts are, is told by the names of files, or of folders:
    data/qa1/0k.json, 0k/qa1-00000-of-00001.parquet, qa1_64k.jsonl. A file whose name tells no task is one by itself.

    Args:
        given: a folder or a file; or the id of a data set on the Hub.
        tasks: which of its tasks; None: all.
        tokens: which of its lengths; none: all.

    Attributes:
        parts: all of them, shorter ones first.

    Raises:
        UserError: if there is no such set, or not what is asked for.
    """

    def __init__(self, given: str, tasks: Sequence[str] | None = None, tokens: Sequence[int | str] = ()) -> None:
        self.given = given
        self.setting = f"set={given}"
        if tasks is not None and not tasks:
            raise UserError("tasks=[]: names no task; give some, such as [qa1,qa2], or leave it out")
        tasks = [re.sub(r"QA(?=[0-9]+$)", "qa", task) for task in tasks or ()]
        there: dict[Part, list[Callable[[], Path]]] = {}
        for part, file in self._files():
            there.setdefault(part, []).append(file)
        parts = sorted(there, key=lambda part: part.order)
        wanted = [in_short(token_count("tokens", one)) for one in tokens]
        for key, asked, known in (
            ("tasks", tasks, dict.fromkeys(part.task for part in parts)),
            ("tokens", wanted, dict.fromkeys(part.length for part in parts if part.length)),
        ):
            if absent := [one for one in asked if one not in known]:
                told = f"it has {', '.join(known)}" if known else "its files name none"
                raise UserError(f"{key}={','.join(asked)}: {self.setting} has no {absent[0]}; {told}")
        self._there = {
            part: there[part]
            for part in parts
            if (not tasks or part.task in tasks) and (not wanted or part.length in wanted)
        }
        self.parts = list(self._there)
        if not self.parts:
            raise UserError(
                f"{self.setting}: has none of these tasks at one of these lengths; leave out tasks or tokens"
            )

    def files(self, part: Part) -> TextFiles:
        """The files of a part, which are fetched first if they stand on the Hub."""
        return TextFiles("set", self.given, ROWS, [file() for file in self._there[part]])

    def rows(self, part: Part) -> Iterator[Row]:
        """The questions of a part, as they are read.

        Raises:
            UserError: naming file and place, if something is none.
        """
        for at, row in self.files(part).rows(Row._fields):
            for name in Row._fields:
                if not isinstance(text := row.get(name), str) or not text.strip() or NO_TEXT.search(text):
                    what = f"is {text!r:.40}, no text" if name in row else f"is missing; it has {', '.join(row)}"
                    raise UserError(f"{at}: {name} {what}")
            yield Row(row["input"], row["question"].strip(), row["target"].strip())

    @staticmethod
    def labels(part: Part, targets: Iterable[str]) -> tuple[str, ...]:
        """What answers are looked for: the labels of BABILong, or the targets, where these are others."""
        lists = (target.split(",") if len(target) > 3 else [target] for target in targets)
        asked, known = {*chain.from_iterable(lists)}, LABELS.get(part.task, ())
        return known if {*map(str.lower, asked)} <= {*map(str.lower, known)} else tuple(sorted(asked))

    def _files(self) -> Iterator[tuple[Part, Callable[[], Path]]]:
        place = os.path.expanduser(self.given)
        if os.path.exists(place) or not re.fullmatch(r"[\w.-]+/[\w.-]+", self.given):
            for file in TextFiles("set", self.given, ROWS, mixed=True).files:
                yield _part(PurePath(os.path.abspath(file))), partial(Path, file)
            return
        if trouble := out_of_reach(self.setting):
            raise UserError(
                f"{self.setting}: no such folder, and the Hugging Face Hub cannot be asked ({trouble}); connect to the "
                "network, or give a folder"
            )
        names = [name for name in self._of_hub("list_repo_files") if PurePath(name).suffix.lower() in ROWS]
        if not names:
            raise UserError(f"{self.setting}: has no {', '.join(ROWS)} file on the Hugging Face Hub; give another")
        yield from ((_part(PurePath(name)), partial(self._fetched, name)) for name in names)

    def _fetched(self, name: str) -> Path:
        log.info("%s: fetching %s", self.setting, name)
        return Path(self._of_hub("hf_hub_download", name))

    def _of_hub(self, ask: str, *words: str) -> Any:
        # Imported here, for it takes a while.
        from huggingface_hub import HfApi

        try:
            return getattr(HfApi(), ask)(self.given, *words, repo_type="dataset")
        except Exception as error:  # the Hub's client raises a different class for each kind of trouble
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise UserError(
                f"{self.setting}: cannot be read from the Hugging Face Hub ({reason}); give another id, or a folder"
            ) from None


def _part(path: PurePath) -> Part:
    """The task and the length that a file's name tells, or a folder's that is named so; the nearest one counts.

    Raises:
        UserError: if a length is no whole number of tokens.
    """
    words = [*path.parts[:-1], *re.split(r"[^0-9A-Za-z]+", path.stem)]
    tasks = [word.lower() for word in words if re.fullmatch(r"(?i)qa[0-9]+", word)]
    lengths = [word for word in words if re.fullmatch(r"[0-9]{1,4}[kK]|[0-9]{1,3}M", word)]
    # They are whole numbers: in 1.5k there is no 5k.
    lengths += re.findall(r"(?<![0-9A-Za-z.])[0-9]+\.[0-9]+[kKM](?![0-9A-Za-z])", path.stem)
    length = in_short(token_count("set", lengths[-1])) if lengths else ""
    return Part(tasks[-1] if tasks else path.stem, length)
