"""Questions of which there is an end: which are for training, validation and test, and what is known of them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain

import numpy as np

from rmt_lightning.core.errors import UserError
from rmt_lightning.tasks.facts import Example, Split, Where

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
        given = {split: stories[split] for split in HELD_BACK if split in stories}
        parts = _split(shown, list(stories.get("train", [])), given)
        self._examples = {split: tuple(chain.from_iterable(part)) for split, part in parts.items()}
        for split in HELD_BACK:
            if split not in given:
                self._examples[split] = _only_there(self._examples[split], self._examples["train"])
        self.remarks = tuple(self._remarks(sources, given))

    def _remarks(self, sources: Mapping[Split, str], given: Collection[Split]) -> Iterator[str]:
        """How many questions there are, from which files, and what should not be there."""
        train = self._examples["train"]
        counts = [f"{len(train):,} questions for training"] if train else []
        for split in HELD_BACK:
            source = f"all of {sources[split]}" if split in given else f"a tenth of {sources.get('train')}"
            counts += [f"{len(self._examples[split]):,} for {split}, {source}"] if self._examples[split] else []
        yield "; ".join(counts)
        known, answers = set(train), {example.answer for example in train}
        for split in HELD_BACK if train else ():
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


def told(examples: Iterable[Example]) -> Iterator[str]:
    """All sentences of some examples."""
    return (sentence for example in examples for sentence in (*example.facts, example.question))


def _split(shown: str, stories: list[Story], given: dict[Split, list[Story]]) -> dict[Split, list[Story]]:
    """The stories of each split: those that are `given`, or one in ten of `stories`, of which equal ones go together.

    Raises:
        UserError: if there are fewer than ten to be split.
    """
    parts: dict[Split, list[Story]] = {"train": [], "validation": [], "test": [], **given}
    numbers = {story: number for number, story in enumerate(dict.fromkeys(stories))}
    if 0 < len(stories) < 10 and len(given) < len(HELD_BACK):
        raise UserError(
            f"{shown}: holds {len(stories)} bAbI stories; at least 10 are needed to hold some back; give more, or "
            "task.validation_path and task.test_path"
        )
    for place, story in enumerate(stories):
        # With fewer different ones, some are on both sides.
        number = numbers[story] if len(numbers) >= 10 else place
        split = HELD_BACK[number % 10 - 8] if number % 10 >= 8 else "train"
        parts["train" if split in given else split].append(story)
    return parts


def _only_there(examples: Sequence[Example], train: Sequence[Example]) -> tuple[Example, ...]:
    """Each of the examples once, without those of training, unless nothing else is left."""
    known = set(train)
    once = tuple(dict.fromkeys(examples))
    return tuple(example for example in once if example not in known) or once
