"""Questions of which there is an end: which are for training, validation and test; and those of one's own files."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from itertools import chain
from typing import Any

import numpy as np

from rmt_lightning.core.errors import UserError
from rmt_lightning.tasks.facts import Example, Split, Where
from rmt_lightning.tasks.noise import plain, sentences
from rmt_lightning.tasks.text_files import NO_TEXT, ROWS, TextFiles

# Questions that have facts in common, which are on one side.
Story = tuple[Example, ...]
HELD_BACK: tuple[Split, Split] = ("validation", "test")


class Questions:
    """A task whose questions are read from somewhere.

    Args:
        stories: those of each split that has some of its own. One in ten of training is held back for each that has
            none; of these each question is asked once that training does not tell word by word.
        sources: what people call that from which they come.
        shown: what people call that from which they come that are held back.
        answers_of: the splits whose answers are the classes.

    Attributes:
        remarks: what people should know of the questions.

    Raises:
        UserError: if there are too few stories to be held back.
    """

    name: str
    where: Where = "anywhere"
    # What a story is called, and what is given where there are too few to hold some back.
    STORIES = "stories"
    GIVE = "task.validation_path and task.test_path"

    def __init__(
        self,
        stories: Mapping[Split, list[Story]],
        sources: Mapping[Split, str],
        shown: str,
        answers_of: Collection[Split],
    ) -> None:
        everything = [example for part in stories.values() for story in part for example in story]
        answering = [example for split in answers_of for story in stories.get(split, ()) for example in story]
        self.answers = tuple(sorted({example.answer for example in answering or everything}))
        self._sentences = tuple(dict.fromkeys([*told(answering or everything), *self.answers]))
        self._sources = sources
        given = {split: stories[split] for split in HELD_BACK if split in stories}
        parts = _split(f"{shown}: holds", self.STORIES, self.GIVE, list(stories.get("train", [])), given)
        self._examples = {split: tuple(chain.from_iterable(part)) for split, part in parts.items()}
        known = {_alike(example) for example in self._examples["train"]}
        for split in HELD_BACK:
            if split not in given:
                self._examples[split] = _only_there(self._examples[split], known)
        self.remarks = tuple(self._remarks(sources, given, known))

    def _remarks(
        self, sources: Mapping[Split, str], given: Collection[Split], known: Set[tuple[str, str]]
    ) -> Iterator[str]:
        """How many questions there are, from which files, and what should not be there."""
        train = self._examples["train"]
        counts = [f"{len(train):,} questions for training"] if train else []
        for split in HELD_BACK:
            source = f"all of {sources[split]}" if split in given else f"a tenth of {sources.get('train')}"
            counts += [f"{len(self._examples[split]):,} for {split}, {source}"] if self._examples[split] else []
        yield "; ".join(counts)
        yield from _contradictions(chain.from_iterable(self._examples.values()))
        answers = {example.answer for example in train}
        for split in HELD_BACK if train else ():
            examples = self._examples[split]
            for strange, what in (
                (lambda example: _alike(example) in known, "stand in training too, word for word"),
                (lambda example: example.answer not in answers, "have answers that it never gives"),
            ):
                if count := sum(map(strange, examples)):
                    yield f"of the {len(examples):,} questions for {split}, {count:,} {what}"

    def questions(self, split: Split) -> tuple[Example, ...]:
        """All that can be asked of a split, as it stands in the file."""
        if not self._examples[split]:
            here = self._sources.get("train")
            raise UserError(
                f"{here}: has no question for {split}; give some" if here else "task.path: is missing; give task.path=…"
            )
        return self._examples[split]

    def draw(self, rng: np.random.Generator, split: Split) -> Example:
        examples = self.questions(split)
        return examples[int(rng.integers(len(examples)))]

    def sentences(self) -> Iterator[str]:
        yield from self._sentences


class QA(Questions):
    """Questions of one's own, a row of jsonl, json or parquet files for each.

    ```
    {"facts": ["Ada has the red key.", "Bo has the blue key."], "question": "Who has the red key?", "answer": "Ada"}
    {"context": "Ada has the green key. Bo is away.", "question": "Who has it?", "answer": "Ada", "split": "test"}
    ```

    What is told is a list of sentences, or a text, whose sentences are the facts then. The answers of training and
    validation are the classes; a model that writes (answer=generate) may answer anything. Rows may name the split that
    they belong to. Of a split without rows and without a file, one row in ten of training is held back; rows that tell
    the same are on one side.

    Args:
        path: a file, a folder, or a pattern; may only be missing where nothing is trained, and a test file is given.
        validation_path: likewise, for validation.
        test_path: likewise, for the test.

    Raises:
        UserError: naming file and line, if something is no such row; if there are too few to be split.
    """

    name = "qa"
    STORIES = "different texts"

    def __init__(
        self, path: str | None = None, validation_path: str | None = None, test_path: str | None = None
    ) -> None:
        if path is None and test_path is None:
            raise UserError("task.path: is missing; give task.path=…")
        rows = _rows_of("task.path", path, None) if path is not None else {}
        sources: dict[Split, str] = {split: f"task.path of split {split}" for split in rows}
        sources |= {"train": "task.path"} if path is not None else {}
        files: dict[Split, tuple[str, str | None]] = {
            "validation": ("task.validation_path", validation_path), "test": ("task.test_path", test_path),
        }  # fmt: skip
        for split, (key, given) in files.items():
            if given is not None and split in rows:
                raise UserError(f"{key}={given}: task.path has rows of split {split} too; leave one of them out")
            if given is not None:
                rows[split], sources[split] = _rows_of(key, given, split)[split], key
        stories = {split: _together(examples) for split, examples in rows.items()}
        super().__init__(stories, sources, f"task.path={path}", answers_of=("train", "validation"))
        asked = len(self._examples["train"])
        if 2 * len(self.answers) > asked > 20:
            told = f"{len(self.answers):,} different answers to {asked:,} questions"
            self.remarks += (f"{told}; if they are open ones, answer=generate writes them",)


_NAMES: dict[str, Split] = {
    "train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation",
    "dev": "validation", "test": "test",
}  # fmt: skip


def _rows_of(key: str, given: str, of: Split | None) -> dict[Split, list[Example]]:
    """The questions of each split in some files.

    Args:
        key: the setting that names them.
        given: its value.
        of: the split whose files they are; None: rows tell, and those that do not are for training.
    """
    found: dict[Split, list[Example]] = {} if of is None else {of: []}
    files = TextFiles(key, given, ROWS)
    for at, row in files.rows(("facts", "context", "question", "answer", "split")):
        try:
            split = _split_of(row.get("split"), of)
            example = _example(row)
        except ValueError as error:
            raise UserError(f"{at} {error}") from None
        found.setdefault(split, []).append(example)
    if not any(found.values()):
        raise UserError(f"{files.setting}: is empty; give rows with facts or context, question and answer")
    return found


def _split_of(name: Any, of: Split | None) -> Split:
    if name is None:
        return of or "train"
    split = _NAMES.get(name.lower()) if isinstance(name, str) else None
    if split is None:
        raise ValueError(f"has the split {name!r:.40}; give train, validation or test")
    if of not in (None, split):
        raise ValueError(f"has the split {name}, in a file for {of}")
    return split


def _example(row: Mapping[str, Any]) -> Example:
    """A row as a question.

    Raises:
        ValueError: what is wrong with it.
    """
    facts, context = row.get("facts"), row.get("context")
    if (facts is None) == (context is None):
        none = f"has no facts and no context{_has(row)}"
        raise ValueError("has both facts and a context; leave one out" if facts is not None else none)
    if facts is not None and (not isinstance(facts, list) or not facts):
        raise ValueError(f"has facts that are {facts!r:.40}; give a list of sentences")
    texts = {f"fact {number}": fact for number, fact in enumerate(facts or (), start=1)}
    texts |= {"context": context} if context is not None else {}
    for name, text in (texts | {name: row.get(name) for name in ("question", "answer")}).items():
        if text is None:
            raise ValueError(f"has no {name}{_has(row)}")
        if not isinstance(text, str) or not text.strip() or NO_TEXT.search(text):
            raise ValueError(f"has {name} {text!r:.40}, which is no text")
    told = sentences(context) if context is not None else [" ".join(fact.split()) for fact in facts or ()]
    question, answer = (" ".join(row[name].split()) for name in ("question", "answer"))
    return Example(tuple(told), question, answer, support=tuple(range(len(told))))


def _has(row: Mapping[str, Any]) -> str:
    given = [name for name, value in row.items() if value is not None]
    return f"; it has {', '.join(given or row) or 'nothing'}"


def _together(examples: Iterable[Example]) -> list[Story]:
    """Questions about the same facts as one story each."""
    stories: dict[str, list[Example]] = {}
    for example in examples:
        stories.setdefault(plain("\n".join(example.facts)), []).append(example)
    return [tuple(story) for story in stories.values()]


def _alike(example: Example) -> tuple[str, str]:
    """What is asked, and the answer, whatever letters are large and how they are encoded."""
    return plain("\n".join((*example.facts, example.question))), plain(example.answer)


def _contradictions(examples: Iterable[Example]) -> Iterator[str]:
    """Of how many questions only one of several answers can be right, if there are any."""
    answers: dict[str, set[str]] = {}
    for asked, answer in map(_alike, examples):
        answers.setdefault(asked, set()).add(answer)
    if several := [asked for asked, given in answers.items() if len(given) > 1]:
        yield f"questions with several answers to the same facts: {len(several):,}; one of them at most counts as right"


def told(examples: Iterable[Example]) -> Iterator[str]:
    """All sentences of some examples."""
    return (sentence for example in examples for sentence in (*example.facts, example.question))


def _split(
    holds: str, kind: str, give: str, stories: list[Story], given: dict[Split, list[Story]]
) -> dict[Split, list[Story]]:
    """The stories of each split: those that are `given`, or one in ten of `stories`, of which equal ones go together.

    Raises:
        UserError: if there are fewer than ten to be split.
    """
    parts: dict[Split, list[Story]] = {"train": [], "validation": [], "test": [], **given}
    numbers = {story: number for number, story in enumerate(dict.fromkeys(stories))}
    if 0 < len(stories) < 10 and len(given) < len(HELD_BACK):
        raise UserError(
            f"{holds} {len(stories)} {kind}; at least 10 are needed to hold some back; give more, or {give}"
        )
    for place, story in enumerate(stories):
        # With fewer different ones, some are on both sides.
        number = numbers[story] if len(numbers) >= 10 else place
        split = HELD_BACK[number % 10 - 8] if number % 10 >= 8 else "train"
        parts["train" if split in given else split].append(story)
    return parts


def _only_there(examples: Sequence[Example], known: Set[tuple[str, str]]) -> tuple[Example, ...]:
    """Each of the examples once, without those that are `known`, unless nothing else is left."""
    once: dict[tuple[str, str], Example] = {}
    for example in examples:
        once.setdefault(_alike(example), example)
    return tuple(example for alike, example in once.items() if alike not in known) or tuple(once.values())
