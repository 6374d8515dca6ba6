"""Batches of fact samples, all segments of a batch at once.

Shapes: B batch, T segments, S text tokens of a segment, A tokens of the longest answer, Q questions about a sample.
"""

from __future__ import annotations

import os
import signal
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, Generic, NamedTuple, Protocol, TypeVar, runtime_checkable

import lightning as L
import numpy as np
import torch
from annotated_types import Ge, Le
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from rmt_lightning.core.errors import UserError
from rmt_lightning.core.names import BY_THE_RUN
from rmt_lightning.tasks.facts import Split
from rmt_lightning.tasks.placement import Key, Placement

# Bytes of validation samples that are kept, for every validation of a stage asks for the same ones.
_KEPT = 2**26
# Of the longest inputs that are trained on, or made whole.
MOST_SEGMENTS = 4096

Data = TypeVar("Data", bound="ShortEpochs")
Data_contra = TypeVar("Data_contra", bound="ShortEpochs", contravariant=True)


@runtime_checkable
class Keys(Protocol[Data_contra]):
    """What decides which samples come next: the phases of a run (see training/phases/)."""

    def training_keys(self, data: Data_contra) -> Iterator[list[Any]]:
        """The keys of each batch of the present epoch; of an epoch that was interrupted, of those that are left."""

    def validation_keys(self, data: Data_contra) -> Iterator[list[Any]]:
        """The keys of each batch of a validation."""


class ShortEpochs(L.LightningDataModule):
    """Training in short epochs, between which there is a validation and the length of inputs may change.

    A data module makes samples from keys, and has nothing that others write.

    Args:
        keys: which samples come next; None: the phases of the module that is trained on them know.
        segment_length: what the model sees of a segment, memory and special tokens included.
        batch_size: samples of a training step, on each device.
        num_workers: processes that make samples; 0 makes them in the main process.
        steps_per_epoch: training steps between two validations.

    Raises:
        UserError: if there are too many loader workers for this machine.
    """

    def __init__(
        self, keys: Keys[Any] | None, segment_length: int, batch_size: int, num_workers: int, steps_per_epoch: int
    ) -> None:
        super().__init__()
        cores = os.cpu_count() or 1
        if num_workers > (most := max(64, 8 * cores)):
            raise UserError(
                f"data.num_workers={num_workers}: too many processes for {cores} CPU cores; give {most} or less"
            )
        self._keys = keys
        self.segment_length = segment_length
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.steps_per_epoch = steps_per_epoch

    @property
    def keys(self) -> Keys[Any]:
        """Which samples come next.

        Raises:
            UserError: if nobody knows.
        """
        if self._keys is not None:
            return self._keys
        module: Any = self.trainer.lightning_module if self.trainer else None
        keys: Keys[Any] | None = getattr(module, "led_by", None)
        if keys is None:
            raise UserError(
                f"{type(self).__name__}: nothing says which samples come next; give the Trainer "
                "callbacks=[SegmentCurriculum(…)], or FixedSteps(…) for running text"
            )
        return keys

    @property
    @abstractmethod
    def validated(self) -> int:
        """How many samples the first validation reads, on all devices together."""

    @property
    def rank(self) -> int:
        return self.trainer.global_rank if self.trainer else 0

    @property
    def world_size(self) -> int:
        return self.trainer.world_size if self.trainer else 1

    def loader(self, dataset: Dataset[Any], **options: Any) -> DataLoader[Any]:
        """A loader with the options that all have in common."""
        return DataLoader(
            dataset,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=leave_signals_to_the_run,
            **options,
        )


def leave_signals_to_the_run(_worker: int) -> None:
    """Let a loader worker go on when a signal reaches all processes of a run: the one that trains saves, and ends it.

    Ctrl-C does, and so do schedulers. A second SIGTERM ends the worker, for torch and Python end those by it that hang.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


class TrainingKeys(Sampler[list[Any]], Generic[Data]):
    """The keys of one short epoch's batches. They carry all that changes, so that no loader worker can be stale."""

    def __init__(self, data: Data) -> None:
        self.data = data

    def __len__(self) -> int:
        return self.data.steps_per_epoch

    def __iter__(self) -> Iterator[list[Any]]:
        yield from self.data.keys.training_keys(self.data)


class ValidationKeys(Sampler[list[Any]], Generic[Data]):
    """The keys of a validation. It has no `__len__`: their number grows, and Lightning would keep to the first one."""

    def __init__(self, data: Data) -> None:
        self.data = data

    def __iter__(self) -> Iterator[list[Any]]:
        yield from self.data.keys.validation_keys(self.data)


class Batches(Sampler[list[Any]]):
    """Batches that are known beforehand. Of a list Lightning cannot make what it predicts on."""

    def __init__(self, batches: Iterable[list[Any]]) -> None:
        self.batches = list(batches)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[Any]]:
        return iter(self.batches)


class FactBatch(NamedTuple):
    """Samples, or one of them without B. Answers are texts, as token ids that end with -1.

    Attributes:
        input_ids: (B, T, S).
        told: (B, T, S), the facts and the question where they stand; -1 is noise.
        questions: (B, Q, S), the question, then all that could be asked instead (see `Placement.endings`).
        answers: (B, Q, A) to them; nothing but -1 in mere noise.
        distance: (B,) segments between the first fact that is needed and the question.
        first_told: (B,) the segment of the first fact.
        last_told: (B,) the segment of the last fact.
        border: (B,) a segment after the first fact in which another one is told or the question asked. What is known of
            the sample before it has to be remembered from earlier segments. 0 if there is none; of no meaning in mere
            noise.
    """

    input_ids: Tensor
    told: Tensor
    questions: Tensor
    answers: Tensor
    distance: Tensor
    first_told: Tensor
    last_told: Tensor
    border: Tensor

    @property
    def answer(self) -> Tensor:
        """(B, A), to the question that is asked."""
        return self.answers[:, 0]


class FactDataset(Dataset[FactBatch]):
    """Samples by key. What a key means never changes, so copies of the data set in loader workers cannot be stale.

    Args:
        placement: makes the samples.
        split: of which.
        kept: how many bytes of them are kept, to be asked for again.
    """

    def __init__(self, placement: Placement, split: Split, kept: int = 0) -> None:
        self.placement = placement
        self.split = split
        self.kept = kept
        self._made: dict[Key, FactBatch] = {}
        self._size = 0
        # Mere noise asks nothing, as often as the task could ask something.
        questions = 1 + len(placement.task.draw(np.random.default_rng(0), split).also)
        sizes = (placement.text_length, placement.longest_answer)
        self.nothing = tuple(np.full((questions, size), -1) for size in sizes)

    def __getitem__(self, key: Key) -> FactBatch:
        if not self.kept:
            return self._make(key)
        if key in self._made:
            return self._made[key]
        made = self._make(key)
        self._size += (size := sum(part.nbytes for part in made))
        if self._size > self.kept:
            # Of another stage, most likely.
            self._made, self._size = {}, size
        if size <= self.kept:
            self._made[key] = made
        return made

    def _make(self, key: Key) -> FactBatch:
        sample = self.placement.sample(self.split, key)
        pieces = list(sample.pieces)
        first, last = min(sample.homes, default=0), max(sample.homes, default=0)
        borders = sorted({*sample.homes, key.num_segments - 1} - {first})
        border = borders[key.number % len(borders)] if borders else 0
        questions, answers = self.placement.endings(sample.example) if sample.example else self.nothing
        return FactBatch(
            torch.from_numpy(np.stack([np.concatenate([p.ids for p in segment]) for segment in pieces])),
            torch.from_numpy(np.stack([np.concatenate([p.told for p in segment]) for segment in pieces])),
            torch.from_numpy(questions),
            torch.from_numpy(answers),
            *map(torch.tensor, (sample.distance, first, last, border)),
        )


class Samples(Protocol):
    """What a curriculum must know of the samples that it asks for, whatever they are.

    Attributes:
        seed: of what is drawn at random.
    """

    @property
    def seed(self) -> int: ...

    def asked(self, split: Split, samples: int | None, key: Key) -> int:
        """How many samples like this one a validation or a test asks, if so many are wanted; None: all."""

    def different(self, split: Split, keys: Iterable[Key]) -> int:
        """How many different questions the samples of these names ask."""

    def fits(self, split: Split, like: Key) -> float:
        """Which share of all questions inputs of this length have room for."""


class SampleDataModule(ShortEpochs):
    """Samples with an answer, by their keys, for training, validation and test.

    Attributes:
        placement: what is known of the samples.
        validation_samples: how many samples a validation asks about at the full length, or all questions if those are
            fewer.
    """

    placement: Samples
    validation_samples: int

    @property
    def validated(self) -> int:
        return self.placement.asked("validation", self.validation_samples, Key(1, 0))

    def numbers(self, batch: int) -> range:
        """The numbers of the samples that this device reads in training batch number `batch`."""
        start = (batch * self.world_size + self.rank) * self.batch_size
        return range(start, start + self.batch_size)

    def shared(self, split: Split, samples: int | None, like: Key) -> Iterator[list[Key]]:
        """The keys of this device's share of some samples of a split, all of one length, batch by batch."""
        numbers = range(self.placement.asked(split, samples, like))[self.rank :: self.world_size]
        size = 2 * self.batch_size
        for start in range(0, len(numbers), size):
            yield [like._replace(number=number) for number in numbers[start : start + size]]


class FactDataModule(SampleDataModule):
    """Fact samples for training, validation and test.

    Args:
        placement: makes the samples.
        keys: which of them come next; None: the phases of the module that is trained on them know.
        segment_length: what the backbone sees of a segment, memory and special tokens included, by which speed is
            counted; None: the text alone.
        batch_size: B, on each device.
        num_workers: processes that make samples; 0 makes them in the main process.
        steps_per_epoch: training steps between two validations.
        validation_samples: how many samples a validation asks about at the full length, or all questions if those are
            fewer.
        test_segments: at which lengths `Trainer.test` and `Trainer.predict` ask. A batch is made whole: much longer
            inputs are for rmt_lightning.evaluate, which makes and reads them segment by segment.
        test_samples: how many samples of each of these lengths; None: all questions, or 256 where there is no end of
            them.
    """

    def __init__(
        self,
        placement: Placement,
        keys: Keys[FactDataModule] | None = None,
        segment_length: Annotated[int, Ge(1)] | None = None,
        batch_size: Annotated[int, Ge(1)] = 32,
        num_workers: Annotated[int, Ge(0)] = 0,
        steps_per_epoch: Annotated[int, Ge(1)] = 25,
        validation_samples: Annotated[int, Ge(1), Le(10**6)] = 512,
        test_segments: Annotated[Sequence[int], BY_THE_RUN] = (),
        test_samples: Annotated[int | None, BY_THE_RUN] = 256,
    ) -> None:
        super().__init__(keys, segment_length or placement.text_length, batch_size, num_workers, steps_per_epoch)
        self.placement: Placement = placement
        self.validation_samples = validation_samples
        if wrong := [given for given in test_segments if not 1 <= given <= MOST_SEGMENTS]:
            raise UserError(f"test_segments: has {wrong[0]}; give numbers of segments from 1 to {MOST_SEGMENTS}")
        self.test_segments = tuple(test_segments)
        self.test_samples = test_samples

    def train_dataloader(self) -> DataLoader[FactBatch]:
        return self.loader(FactDataset(self.placement, "train"), batch_sampler=TrainingKeys(self))

    def val_dataloader(self) -> DataLoader[FactBatch]:
        return self.loader(FactDataset(self.placement, "validation", kept=_KEPT), batch_sampler=ValidationKeys(self))

    def test_dataloader(self) -> DataLoader[FactBatch]:
        """Samples of the test, shorter ones first.

        Raises:
            UserError: if no length is given.
        """
        if not self.test_segments:
            raise UserError("test_segments: are missing; give FactDataModule(…, test_segments=[1, 64])")
        lengths = (Key(num_segments, 0) for num_segments in sorted(set(self.test_segments)))
        batches = Batches(keys for like in lengths for keys in self.shared("test", self.test_samples, like))
        return self.loader(FactDataset(self.placement, "test"), batch_sampler=batches)

    def predict_dataloader(self) -> DataLoader[FactBatch]:
        """Those of the test."""
        return self.test_dataloader()
