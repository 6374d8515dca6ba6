"""A phase after the curriculum that makes memory hold: training on memories far older than any input.

Shapes: B batch, T segments, S text tokens of a segment, P memories in the pool.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Annotated, Any, cast

import lightning as L
import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor
from torch.utils._pytree import tree_map

from rmt_lightning.errors import UserError
from rmt_lightning.tasks.datamodule import data_of
from rmt_lightning.training.classification import FactClassifier
from rmt_lightning.training.curriculum import Curriculum, SegmentCurriculum
from rmt_lightning.training.optimization import WarmupDecay

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Losses:
    """How many memories were lost between two validations.

    Attributes:
        step: optimizer step of the run.
        segments: how many segments were read by memories from the pool.
        lost: how many of these memories then gave a wrong answer.
        age: mean age of the memories in the pool, in segments.
    """

    step: int
    segments: int
    lost: int
    age: float


class CarriedStates(Curriculum):
    """Carries memories over from step to step, so that they grow old at the price of short inputs.

    ```
    fresh    fact noise … noise question        as in the curriculum, 1 … n segments
    carried  [old memory] noise … noise question
    ```

    In a share of each batch, noise is read by memories from a pool, and the question of their facts asked behind it. A
    memory goes back as it was before the segment with the question if the answer was right, and is lost if it was
    wrong. Fresh memories take the free places. So ages grow without limit, while a step costs what it did in the
    curriculum, and gradients still flow through up to n segments. Training on states that are passed on is enough for
    recurrent models to go far beyond their training length (Buitrago Ruiz and Gu 2025, arXiv 2507.02782); keeping only
    memories that still answer, and asking them, is what is added here.

    Args:
        curriculum: what comes before.
        steps: optimizer steps of the phase.
        lr: highest learning rate; it rises over the first 20 steps and falls linearly to 0.
        weight_decay: of all weights.
        share: part of each batch that is carried on.
        pool: P, on each device.
        lifetime: after how many segments, on average, a memory that holds makes room for a fresh one.
        jitter: standard deviation of the noise that is added to memories from the pool, so that the model learns to
            pull them back to where they belong.
        fragments: how many pieces of facts stand in a segment of noise on average. What destroys memory is text that
            looks like a fact: "the kitchen cabinet", "I walked to the door".

    Raises:
        UserError: if the curriculum ends with one segment, which leaves nothing to carry.
    """

    def __init__(
        self,
        curriculum: SegmentCurriculum,
        steps: Annotated[int, Ge(1)],
        lr: Annotated[float, Gt(0)],
        weight_decay: Annotated[float, Ge(0)] = 1e-3,
        share: Annotated[float, Gt(0), Lt(1)] = 0.75,
        pool: Annotated[int, Ge(1)] = 256,
        lifetime: Annotated[int, Ge(1)] = 1000,
        jitter: Annotated[float, Ge(0)] = 0.0,
        fragments: Annotated[float, Ge(0)] = 1.0,
    ) -> None:
        super().__init__()
        if curriculum.max_segments < 2:
            raise UserError("curriculum.max_segments=1: leaves no memory to carry; give 2 or more, or leave out hold=")
        self.curriculum = curriculum
        self.steps = steps
        self.optimization = WarmupDecay(steps, lr, weight_decay, warmup=min(1.0, 20 / steps))
        self.share = share
        self.size = pool
        self.lifetime = lifetime
        self.jitter = jitter
        self.fragments = fragments
        self.first_step: int | None = None
        self.history: list[Losses] = []
        self.segments = 0
        self.lost = 0

    @property
    def finished(self) -> bool:
        return bool(self.history) and self.history[-1].step - (self.first_step or 0) >= self.steps

    def progress(self, trainer: L.Trainer) -> tuple[str, int, int]:
        if self.first_step is None:
            return self.curriculum.progress(trainer)
        rate = f"{self.history[-1].lost} lost in {self.history[-1].segments:,} segments" if self.history else "–"
        return f"holding · {rate}", trainer.global_step - self.first_step, self.steps

    # The phase begins when the curriculum ends, or when a run that has ended is resumed with it.

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        data_of(trainer).fragments = self.fragments

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.curriculum.finished:
            # A run that was held has been resumed with more stages, and is held again behind them.
            self.first_step, data_of(trainer).carried = None, 0
            self._begins_now = False
            return
        self._begins_now = self.first_step is None
        if self._begins_now:
            self._begin(trainer)
        else:
            # What Lightning is about to restore belongs to the optimizer of this phase.
            self._restart_optimization(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._begins_now:
            # Only now has Lightning restored the number of steps.
            self.first_step = trainer.global_step
            self._restart_optimization(trainer)

    def _begin(self, trainer: L.Trainer) -> None:
        data = data_of(trainer)
        self.first_step = trainer.global_step
        data.lengths = "uniform"
        data.carried = min(data.batch_size - 1, max(1, round(self.share * data.batch_size)))
        log.info("holding: %d of %d samples of a batch go on with old memories", data.carried, data.batch_size)

    def _restart_optimization(self, trainer: L.Trainer) -> None:
        cast(FactClassifier, trainer.lightning_module).optimization = self.optimization
        trainer.strategy.setup_optimizers(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.curriculum.finished:
            return
        if self.first_step is None:
            trainer.should_stop = False
            self._begin(trainer)
            self._restart_optimization(trainer)
            return
        counts = torch.tensor([self.segments, self.lost], device=pl_module.device)
        segments, lost = trainer.strategy.reduce(counts, reduce_op="sum").tolist()
        age = float(self.age[self.age >= 0].float().mean())
        self.history.append(Losses(trainer.global_step, segments, lost, age))
        self.segments = self.lost = 0
        log.info(
            "holding: step %d of %d, %d memories lost in %d segments, mean age %.0f segments",
            trainer.global_step - self.first_step, self.steps, lost, segments, age,
        )  # fmt: skip
        trainer.should_stop = self.finished

    # The pool: a memory, its question, its answer and its age; age -1 is a free place.

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: dict[str, Tensor], batch_idx: int
    ) -> None:
        """Give memories from the pool to the noise at the end of the batch, and ask their questions behind it."""
        carried = data_of(trainer).carried
        if not carried:
            return
        fresh = len(batch["label"]) - carried
        classifier = cast(FactClassifier, pl_module)
        initial = classifier.model.initial_state(len(batch["label"]))
        if not hasattr(self, "age"):
            self._make_room(initial, batch["question"])
        self._random = torch.Generator().manual_seed(_mix(classifier.seed, trainer.global_step, trainer.global_rank))
        order = torch.randperm(self.size, generator=self._random).to(self.age.device)
        self._held = order[self.age[order] >= 0][:carried]
        rows = slice(fresh, fresh + len(self._held))
        batch["question"][rows] = self.question[self._held]
        batch["label"][rows] = self.label[self._held]
        last, question = batch["input_ids"][:, -1], batch["question"]
        batch["input_ids"][:, -1] = torch.where(question >= 0, question, last)
        old = tree_map(self._disturbed, tree_map(lambda memories: memories[self._held], self.memory))
        batch["state"] = tree_map(lambda new, old: torch.cat([new[: rows.start], old, new[rows.stop :]]), initial, old)

    def _make_room(self, state: Any, question: Tensor) -> None:
        self.memory = tree_map(lambda part: part.detach().new_zeros(self.size, *part.shape[1:]), state)
        self.question = question.new_zeros(self.size, question.shape[1])
        self.label = question.new_zeros(self.size)
        self.age = question.new_full((self.size,), -1)

    def _disturbed(self, memories: Tensor) -> Tensor:
        noise = torch.randn(memories.shape, generator=self._random).to(memories)
        return memories + self.jitter * noise

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: dict[str, Tensor], batch_idx: int
    ) -> None:
        """Put back the memories whose answers were right, and take in fresh ones."""
        carried = data_of(trainer).carried
        if not carried:
            return
        samples, num_segments, _ = batch["input_ids"].shape
        fresh, held = samples - carried, self._held
        right, memory = outputs["right"], outputs["memory"]
        kept = right[fresh : fresh + len(held)]
        self.segments += num_segments * len(held)
        self.lost += int((~kept).sum())
        retired = torch.rand(len(held), generator=self._random).to(self.age.device) < (num_segments - 1) / self.lifetime
        self.age[held] = torch.where(kept & ~retired, self.age[held] + num_segments - 1, -1)
        self._store(held, memory, torch.arange(fresh, fresh + len(held), device=right.device))
        # What was told in the segment with the question is not in the memory before it.
        told = (batch["told"][:fresh] < num_segments - 1) & right[:fresh]
        free = torch.nonzero(self.age < 0).flatten()
        rows = torch.nonzero(told).flatten()[: len(free)]
        free = free[: len(rows)]
        self._store(free, memory, rows)
        self.question[free], self.label[free] = batch["question"][rows], batch["label"][rows]
        self.age[free] = num_segments - 1

    def _store(self, places: Tensor, memory: Any, rows: Tensor) -> None:
        def store(pool: Tensor, states: Tensor) -> None:
            pool[places] = states[rows].to(pool)

        tree_map(store, self.memory, memory)

    # Checkpoints hold the pools of all ranks, so that a resumed run goes on as an uninterrupted one does.

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if hasattr(self, "age"):
            pool = (self.memory, self.question, self.label, self.age)
            checkpoint["pool"] = tree_map(
                lambda part: trainer.strategy.all_gather(part).reshape(-1, *part.shape).cpu(), pool
            )

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if "pool" in checkpoint:
            self.memory, self.question, self.label, self.age = tree_map(
                lambda parts: parts[trainer.global_rank % len(parts)].to(pl_module.device), checkpoint["pool"]
            )

    def state_dict(self) -> dict[str, Any]:
        names = ("first_step", "segments", "lost")
        history = [vars(losses) for losses in self.history]
        return {name: getattr(self, name) for name in names} | {"history": history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.first_step, self.segments, self.lost = (state_dict[name] for name in ("first_step", "segments", "lost"))
        self.history = [Losses(**losses) for losses in state_dict["history"]]


def _mix(seed: int, step: int, rank: int) -> int:
    return (seed * 1_000_003 + step) * 1_009 + rank
