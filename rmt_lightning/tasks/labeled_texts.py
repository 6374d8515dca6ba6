"""Texts and labels of one's own, for training from Python.

Shapes: B batch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Protocol, TypeVar, cast

import numpy as np
from torch.utils.data import DataLoader, Dataset, Sampler

from rmt_lightning.core.errors import UserError
from rmt_lightning.core.tokens import plain_ids
from rmt_lightning.tasks.datamodule import Batches, Keys, SampleDataModule, TrainingKeys, ValidationKeys
from rmt_lightning.tasks.facts import Split
from rmt_lightning.tasks.noise import SPLITS
from rmt_lightning.tasks.placement import Key

Item = TypeVar("Item", covariant=True)
# An answer, or its place among the answers of the module.
Label = str | int
# How many texts are tokenized at once to count their tokens.
_AT_ONCE = 256


class Listed(Protocol[Item]):
    """A list, or a torch Dataset that has a length."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Item: ...


class TextBatch(NamedTuple):
    """Texts that take the same number of segments.

    Attributes:
        texts: B of them, each of which may end with a question.
        labels: B answers, or their places among the answers of the module.
        num_segments: how many segments the texts take.
    """

    texts: list[str]
    labels: list[Label]
    num_segments: int


class LabeledTexts:
    """Texts and their labels, by how many segments they take.

    A sample of n segments is a text that takes as many; where there is none, one that takes the next smaller number
    that there is, or else the smallest.

    Args:
        texts: of each split.
        tokenizer: of the backbone.
        text_length: how many tokens of text there are in a segment.
        seed: of the order in which texts are trained on.

    Raises:
        UserError: naming the text, if one is none or has no label.
    """

    def __init__(
        self, texts: dict[Split, Listed[tuple[str, Label]]], tokenizer: Any, text_length: int, seed: int
    ) -> None:
        self.seed = seed
        self.texts = texts
        self.labels = {split: [_label(split, number, row) for number, row in _rows(texts[split])] for split in texts}
        # The numbers of the texts of each split, by how many segments they take.
        self.by_length: dict[Split, dict[int, list[int]]] = {}
        for split, rows in texts.items():
            numbers = defaultdict(list)
            for start in range(0, len(rows), _AT_ONCE):
                some = range(start, min(start + _AT_ONCE, len(rows)))
                for number, ids in zip(some, plain_ids(tokenizer, [rows[number][0] for number in some]), strict=True):
                    if not ids:
                        raise UserError(f"{split}[{number}]: its text is empty for the tokenizer; leave it out")
                    numbers[-(-len(ids) // text_length)].append(number)
            if not numbers:
                raise UserError(f"{split}: holds no text; give some")
            self.by_length[split] = dict(sorted(numbers.items()))

    def length(self, split: Split, num_segments: int) -> int:
        """How many segments the samples take that are asked for as some of so many."""
        there = self.by_length[split]
        return max((length for length in there if length <= num_segments), default=min(there))

    def number(self, split: Split, key: Key) -> int:
        """Which text a sample is. Those of training come in an order of their own each time they are gone through."""
        pool = self.by_length[split][self.length(split, key.num_segments)]
        if split != "train":
            return pool[key.number]
        times, place = divmod(key.number, len(pool))
        return pool[int(_order(self.seed, key.num_segments, times, len(pool))[place])]

    def asked(self, split: Split, samples: int | None, key: Key) -> int:
        there = len(self.by_length[split][self.length(split, key.num_segments)])
        return there if samples is None else min(samples, there)

    def different(self, split: Split, keys: Iterable[Key]) -> int:
        return len({self.number(split, key) for key in keys})

    def fits(self, split: Split, like: Key) -> float:
        counts = {length: len(numbers) for length, numbers in self.by_length[split].items()}
        return sum(count for length, count in counts.items() if length <= like.num_segments) / sum(counts.values())


@lru_cache(maxsize=16)
def _order(seed: int, num_segments: int, times: int, size: int) -> np.ndarray:
    """In which order so many texts are gone through, having been gone through so many times."""
    rng = np.random.Generator(np.random.Philox(key=[seed, 2**35], counter=[0, 0, num_segments, times]))
    return rng.permutation(size)


class TextDataModule(SampleDataModule):
    """Texts and labels of one's own: stage n of a curriculum reads those that take n segments.

    Args:
        train: pairs of a text, which may end with a question, and its label: one of the answers of the module, or its
            place among them. A list, or a torch Dataset that has a length.
        validation: likewise, to decide by.
        test: likewise, for `Trainer.test` and `Trainer.predict`.
        batch_size: B, on each device.
        num_workers: processes that read texts; 0 reads them in the main process.
        steps_per_epoch: training steps between two validations.
        validation_samples: how many texts a validation reads at the full length, at most.
        seed: of the order of training.
        keys: which samples come next; None: the phases of the module that is trained on them know.

    Raises:
        UserError: once a Trainer has it, if something is no such pair, or no answer of the module.
    """

    placement: LabeledTexts

    def __init__(
        self,
        train: Listed[tuple[str, Label]],
        validation: Listed[tuple[str, Label]],
        test: Listed[tuple[str, Label]] | None = None,
        batch_size: int = 32,
        num_workers: int = 0,
        steps_per_epoch: int = 25,
        validation_samples: int = 512,
        seed: int = 0,
        keys: Keys[TextDataModule] | None = None,
    ) -> None:
        super().__init__(keys, 0, batch_size, num_workers, steps_per_epoch)
        given = {"train": train, "validation": validation, "test": test}
        self.texts = {split: given[split] for split in SPLITS if given[split] is not None}
        self.validation_samples = validation_samples
        self.seed = seed

    def setup(self, stage: str) -> None:
        model = cast(Any, self.trainer).lightning_module.model
        self.segment_length = model.text_length
        self.placement = LabeledTexts(cast(Any, self.texts), model.tokenizer, self.segment_length, self.seed)

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader("train", TrainingKeys(self))

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader("validation", ValidationKeys(self))

    def test_dataloader(self) -> DataLoader[Any]:
        """All texts of the test, shorter ones first.

        Raises:
            UserError: if there are none.
        """
        if "test" not in self.texts:
            raise UserError("test: is missing; give TextDataModule(…, test=…)")
        lengths = (Key(num_segments, 0) for num_segments in self.placement.by_length["test"])
        return self._loader("test", Batches(keys for like in lengths for keys in self.shared("test", None, like)))

    def predict_dataloader(self) -> DataLoader[Any]:
        """Those of the test."""
        return self.test_dataloader()

    def _loader(self, split: Split, batches: Sampler[list[Key]]) -> DataLoader[Any]:
        return self.loader(_Texts(self.placement, split), batch_sampler=batches, collate_fn=_batch)


class _Texts(Dataset[tuple[str, Label, int]]):
    """Texts by key, with their labels and the number of segments that they take."""

    def __init__(self, placement: LabeledTexts, split: Split) -> None:
        self.placement = placement
        self.split = split

    def __getitem__(self, key: Key) -> tuple[str, Label, int]:
        number = self.placement.number(self.split, key)
        text = self.placement.texts[self.split][number][0]
        return text, self.placement.labels[self.split][number], self.placement.length(self.split, key.num_segments)


def _batch(rows: Sequence[tuple[str, Label, int]]) -> TextBatch:
    texts, labels, lengths = zip(*rows, strict=True)
    return TextBatch(list(texts), list(labels), lengths[0])


def _rows(rows: Listed[Any]) -> Iterable[tuple[int, Any]]:
    return ((number, rows[number]) for number in range(len(rows)))


def _label(split: Split, number: int, row: Any) -> Label:
    """The label of a row, if that is a text with a label."""
    if not isinstance(row, Sequence) or isinstance(row, str) or len(row) != 2 or not isinstance(row[0], str):
        raise UserError(f"{split}[{number}]: is {row!r:.60}; give pairs of a text and its label")
    label = row[1].item() if hasattr(row[1], "item") else row[1]
    if not isinstance(label, str | int):
        raise UserError(
            f"{split}[{number}]: has the label {label!r:.40}; give one of the answers, or its place in them"
        )
    return label
