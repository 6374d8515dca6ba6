"""Batches of fact samples, all segments of a batch at once.

Shapes: B batch, T segments, S text tokens of a segment.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, cast

import lightning as L
import numpy as np
import torch
from annotated_types import Ge
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from rmt_lightning.tasks.facts import Split
from rmt_lightning.tasks.placement import Key, Placement, Sample

Lengths = Literal["exact", "uniform"]

# In how many lessons noise grows to what a segment holds.
NOISY_LESSONS = 5


class ShortEpochs(L.LightningDataModule):
    """Training in short epochs, between which there is a validation and the length of inputs may change.

    Batches are numbered from the start of the run. The number travels in checkpoints, so whatever interrupts training,
    the next batch is the one that would have come next.

    Args:
        batch_size: samples of a training step, on each device.
        num_workers: processes that make samples; 0 makes them in the main process.
        steps_per_epoch: training steps between two validations.
    """

    def __init__(self, batch_size: int, num_workers: int, steps_per_epoch: int) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.steps_per_epoch = steps_per_epoch
        self.consumed = 0

    @property
    def rank(self) -> int:
        return self.trainer.global_rank if self.trainer else 0

    @property
    def world_size(self) -> int:
        return self.trainer.world_size if self.trainer else 1

    def steps_of_epoch(self) -> range:
        """The numbers of the present epoch's batches; of an epoch that was interrupted, those that are left."""
        return range(self.consumed, self.consumed - self.consumed % self.steps_per_epoch + self.steps_per_epoch)

    def loader(self, dataset: Dataset[dict[str, Any]], **options: Any) -> DataLoader[dict[str, Tensor]]:
        """A loader with the options that all have in common."""
        return DataLoader(
            dataset,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            **options,
        )

    def state_dict(self) -> dict[str, Any]:
        return {"consumed": self.consumed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.consumed = state_dict["consumed"]


class FactDataset(Dataset[dict[str, Any]]):
    """Samples by key. What a key means never changes, so copies of the data set in loader workers cannot be stale.

    A sample is a dictionary of

    - input_ids: (T, S).
    - told: (T, S), the facts and the question where they stand; -1 is noise.
    - label: the class of the answer, -1 in mere noise.
    - questions, answers: (Q, S) and (Q,), the question and all that could be asked instead (see `Placement.endings`).
    - distance: segments between the first fact that is needed and the question.
    - first_told, last_told: the segments of the first and of the last fact.
    - border: a segment behind the first fact in which another one is told or the question asked. What is known of the
      sample before it has to be remembered from earlier segments. 0 if there is none; of no meaning in mere noise.
    """

    def __init__(self, placement: Placement, split: Split) -> None:
        self.placement = placement
        self.split = split
        # Mere noise asks nothing, as often as the task could ask something.
        nothing = placement.endings(placement.task.draw(np.random.default_rng(0), split))
        self.nothing = tuple(np.full_like(part, -1) for part in nothing)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        sample = self.placement.sample(self.split, key)
        pieces = list(sample.pieces)
        first, last = min(sample.homes, default=0), max(sample.homes, default=0)
        borders = sorted({*sample.homes, key.num_segments - 1} - {first})
        questions, answers = self.placement.endings(sample.example) if sample.example else self.nothing
        return {
            "input_ids": torch.from_numpy(np.stack([np.concatenate([p.ids for p in segment]) for segment in pieces])),
            "told": torch.from_numpy(np.stack([np.concatenate([p.told for p in segment]) for segment in pieces])),
            "label": sample.answer,
            "questions": torch.from_numpy(questions),
            "answers": torch.from_numpy(answers),
            "distance": sample.distance,
            "first_told": first,
            "last_told": last,
            "border": borders[key.number % len(borders)] if borders else 0,
        }


class TrainingKeys(Sampler[list[Key]]):
    """The keys of one short epoch's batches, `steps_per_epoch` of them, beginning where training stands.

    The length of a batch is drawn from (seed, number of the batch), so all ranks agree on it.
    """

    def __init__(self, data: FactDataModule) -> None:
        self.data = data

    def __len__(self) -> int:
        return self.data.steps_per_epoch

    def __iter__(self) -> Iterator[list[Key]]:
        data = self.data
        for batch in data.steps_of_epoch():
            num_segments = data.draw_length(batch)
            start = (batch * data.world_size + data.rank) * data.batch_size
            fresh = data.batch_size - data.carried
            easier, text_length = data.draw_lesson(batch)
            yield [
                Key(num_segments, start + row, easier=easier, text_length=text_length)
                if row < fresh
                else Key(num_segments, start + row, False, data.fragments)
                for row in range(data.batch_size)
            ]


class ValidationKeys(Sampler[list[Key]]):
    """The fixed keys of a validation, each seen once whatever the number of ranks.

    There are `validation_samples` at the full length and, if training mixes lengths, an eighth as many at each shorter
    one. It has no `__len__`: the number of batches grows with the stage, and Lightning would keep to the first one.
    """

    def __init__(self, data: FactDataModule) -> None:
        self.data = data

    def __iter__(self) -> Iterator[list[Key]]:
        data = self.data
        easier, text_length = data.asked_in_lesson()
        shortest = 1 if data.lengths == "uniform" else data.num_segments
        for num_segments in range(shortest, data.num_segments + 1):
            share = 1 if num_segments == data.num_segments else 8
            numbers = range(-(-data.validation_samples // share))[data.rank :: data.world_size]
            keys = [Key(num_segments, number, easier=easier, text_length=text_length) for number in numbers]
            yield from (keys[i : i + 2 * data.batch_size] for i in range(0, len(keys), 2 * data.batch_size))


class FactDataModule(ShortEpochs):
    """Fact samples for training and validation.

    `num_segments` lives here and travels in checkpoints; the curriculum is the only one that changes it. It also says
    whether training is on inputs of exactly that length ("exact") or of all up to it ("uniform"), and which `lesson`
    stage 1 has come to, if it has lessons. The last `carried` samples of each training batch are mere noise with
    `fragments` pieces of facts in a segment, for memories of earlier batches (see training/phases/state_passing.py).

    Args:
        placement: makes the samples.
        segment_length: what the backbone sees of a segment; the model tells how much of it is text.
        batch_size: samples of a training step, on each device.
        num_workers: processes that make samples; 0 makes them in the main process, which is usually fast enough.
        steps_per_epoch: training steps between two validations.
        validation_samples: samples of a validation at the current length.
    """

    def __init__(
        self,
        placement: Placement,
        segment_length: Annotated[int, Ge(1)],
        batch_size: Annotated[int, Ge(1)],
        num_workers: Annotated[int, Ge(0)] = 0,
        steps_per_epoch: Annotated[int, Ge(1)] = 25,
        validation_samples: Annotated[int, Ge(1)] = 512,
    ) -> None:
        super().__init__(batch_size, num_workers, steps_per_epoch)
        self.placement = placement
        self.segment_length = segment_length
        self.validation_samples = validation_samples
        self.lengths: Lengths = "uniform"
        self.num_segments = 1
        self.lesson: int | None = None
        self.carried = 0
        self.fragments = 0.0

    def draw_length(self, batch: int) -> int:
        """The number of segments of training batch number `batch`."""
        if self.lengths == "exact":
            return self.num_segments
        rng = np.random.Generator(np.random.Philox(key=[self.placement.seed, 2**32], counter=[0, 0, 0, batch]))
        return int(rng.integers(1, self.num_segments + 1))

    @property
    def lessons(self) -> int:
        """How many lessons the present stage may have.

        In stage 1 the easier forms and the task without noise, then more and more noise; in later stages those of
        the easier forms that are repeated, if there are any, and the task, all amid full noise.
        """
        easier, repeated = len(self.placement.easier), self.placement.repeated
        if self.num_segments == 1:
            return easier + 1 + NOISY_LESSONS
        return repeated + 1 if repeated else 0

    def asked_in_lesson(self) -> tuple[int | None, int | None]:
        """Which easier form of the task validation is on, if any, and S if segments are shorter than they could be."""
        if self.lesson is None:
            return None, None
        if self.num_segments > 1:
            first = len(self.placement.easier) - self.placement.repeated
            return (first + self.lesson - 1 if self.lesson <= self.placement.repeated else None), None
        tightest, full = self.placement.tightest, self.placement.text_length
        noisy = self.lesson - len(tightest)
        if noisy < 0:
            return self.lesson - 1, tightest[self.lesson - 1]
        return None, tightest[-1] + (full - tightest[-1]) * noisy // NOISY_LESSONS

    def draw_lesson(self, batch: int) -> tuple[int | None, int | None]:
        """The same for training batch number `batch`, which may have less noise than that."""
        easier, longest = self.asked_in_lesson()
        if easier is not None or longest is None:
            return easier, longest
        rng = np.random.Generator(np.random.Philox(key=[self.placement.seed, 2**33], counter=[0, 0, 0, batch]))
        return None, int(rng.integers(self.placement.tightest[-1], longest + 1))

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return self.loader(FactDataset(self.placement, "train"), batch_sampler=TrainingKeys(self))

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return self.loader(FactDataset(self.placement, "validation"), batch_sampler=ValidationKeys(self))

    def stream(self, split: Split, num_segments: int, numbers: range) -> tuple[Iterator[Tensor], Tensor, Tensor]:
        """Samples side by side, one segment at a time, for inputs too long to be held at once.

        Returns:
            An iterator of T tensors (B, S), the labels (B,) and the distances (B,).
        """
        samples = [self.placement.sample(split, Key(num_segments, number)) for number in numbers]
        answers, distances = ([getattr(s, name) for s in samples] for name in ("answer", "distance"))
        return _side_by_side(samples), torch.tensor(answers), torch.tensor(distances)

    def noise(self, split: Split, num_segments: int, numbers: range) -> Iterator[Tensor]:
        """Mere noise, side by side, one segment (B, S) at a time."""
        return _side_by_side([self.placement.sample(split, Key(num_segments, n, facts=False)) for n in numbers])

    def state_dict(self) -> dict[str, Any]:
        return {
            "num_segments": self.num_segments,
            "lesson": self.lesson,
            "carried": self.carried,
            **super().state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.num_segments = state_dict["num_segments"]
        # Checkpoints from before there were lessons or carried states have none.
        self.lesson = state_dict.get("lesson")
        self.carried = state_dict.get("carried", 0)


def _side_by_side(samples: list[Sample]) -> Iterator[Tensor]:
    for rows in zip(*(sample.segments for sample in samples), strict=True):
        yield torch.from_numpy(np.stack(rows))


def data_of(trainer: L.Trainer) -> FactDataModule:
    """The data module of a trainer, which Lightning attaches without declaring it."""
    return cast(FactDataModule, cast(Any, trainer).datamodule)
