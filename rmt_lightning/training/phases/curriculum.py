"""How long a run trains, and on what: longer inputs as soon as the present ones are mastered, or a number of steps."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import lightning as L
from annotated_types import Ge, Gt, Le, MinLen
from lightning.pytorch.callbacks import Callback

from rmt_lightning.tasks.datamodule import Lengths, data_of
from rmt_lightning.training.optimization import at_stage

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StageResult:
    """What a finished stage has shown.

    Attributes:
        stage: its number, which is also the number of segments of its longest inputs.
        steps: optimizer steps it took, lessons included.
        seconds: wall-clock time it took, lessons included.
        accuracy: at the last validation, on inputs of `stage` segments.
        converged: whether it ended by converging rather than by running out of steps.
    """

    stage: int
    steps: int
    seconds: float
    accuracy: float
    converged: bool


class Curriculum(Callback, ABC):
    """Decides when a run ends. What it needs for that travels in checkpoints.

    Attributes:
        results: what the stages have shown that are over; a curriculum need not have stages.
    """

    results: Sequence[StageResult] = ()

    @property
    @abstractmethod
    def finished(self) -> bool:
        """Whether the run has come to its end. One that has stopped short of it can be resumed."""

    @abstractmethod
    def progress(self, trainer: L.Trainer) -> tuple[str, int, int]:
        """What is being done and how well it goes, in a few words; steps done, and steps there are to do."""

    def passed(self, result: StageResult) -> bool:
        """Whether a stage's result lets the run go on to the next one."""
        return result.converged


class FixedSteps(Curriculum):
    """No curriculum: training ends with the first validation after a number of steps.

    Args:
        steps: optimizer steps.
    """

    def __init__(self, steps: Annotated[int, Ge(1)]) -> None:
        super().__init__()
        self.steps = steps
        # (optimizer step, perplexity) of every validation
        self.history: list[tuple[int, float]] = []

    @property
    def finished(self) -> bool:
        return bool(self.history) and self.history[-1][0] >= self.steps

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        perplexity, bits = (float(trainer.callback_metrics[f"val/{name}"]) for name in ("perplexity", "bits_per_byte"))
        self.history.append((trainer.global_step, perplexity))
        log.info("step %d: perplexity %.2f, %.4f bits per byte", trainer.global_step, perplexity, bits)
        if self.finished:
            trainer.should_stop = True

    def progress(self, trainer: L.Trainer) -> tuple[str, int, int]:
        perplexity = f"{self.history[-1][1]:.2f}" if self.history else "–"
        return f"perplexity {perplexity}", trainer.global_step, self.steps

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = state_dict["history"]


class SegmentCurriculum(Curriculum):
    """Adds a segment each time the run converges (RMT-2023, section 5: "curriculum").

    Converged means accuracy of at least `threshold` in `validations` validations in a row, or, if `patience` is given,
    that many validations without a better one. The next stage starts from the weights just reached, with a fresh
    optimizer and schedule.

    The metric is summed over all ranks, so every rank decides alike.

    Args:
        max_segments: the last stage.
        lengths: stage n trains on inputs of "exact"ly n segments, as published, or of 1 … n ("uniform"), which keeps
            short inputs working.
        steps: budget of a stage in optimizer steps; a list gives one for each stage.
        threshold: accuracy at which a stage has converged; a list gives one for each stage.
        validations: how many in a row must reach it.
        patience: validations without improvement after which a stage counts as converged; None: never.
        lessons: whether stages are cut into lessons, for small models from scratch. Stage 1: the task's easier forms,
            if it has any, without noise; the task without noise; the task with more and more noise. Later ones: the
            last of the easier forms, as many as the task says, then the task. Each lesson converges, and has its
            budget, as a stage does.
        when_stuck: what to do if the budget is spent: "stop" the run, or "continue" with the next lesson or stage.
    """

    def __init__(
        self,
        max_segments: Annotated[int, Ge(1)],
        steps: Annotated[int, Ge(1)] | Annotated[list[Annotated[int, Ge(1)]], MinLen(1)],
        lengths: Lengths = "uniform",
        threshold: Annotated[float, Gt(0), Le(1)] | Annotated[list[Annotated[float, Gt(0), Le(1)]], MinLen(1)] = 0.99,
        validations: Annotated[int, Ge(1)] = 1,
        patience: Annotated[int, Ge(1)] | None = None,
        lessons: bool = False,
        when_stuck: Literal["stop", "continue"] = "stop",
    ) -> None:
        super().__init__()
        self.max_segments = max_segments
        self.steps = steps
        self.lengths = lengths
        self.threshold = threshold
        self.validations = validations
        self.patience = patience
        self.lessons = lessons
        self.when_stuck = when_stuck
        self.results: list[StageResult] = []
        # (optimizer step of the run, stage, accuracy) of every validation on the task itself
        self.history: list[tuple[int, int, float]] = []
        self._begin_stage(first_step=0)

    def _begin_stage(self, first_step: int) -> None:
        self.lesson_steps = 0
        self.seconds = 0.0
        self._begin_schedule(first_step)

    def _begin_schedule(self, first_step: int) -> None:
        self.first_step = first_step
        self.successes = 0
        self.best = -1.0
        self.since_best = 0

    @property
    def finished(self) -> bool:
        """Whether the last stage is over."""
        return any(result.stage >= self.max_segments and self.passed(result) for result in self.results)

    def passed(self, result: StageResult) -> bool:
        return result.converged or self.when_stuck == "continue"

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        data_of(trainer).lengths = self.lengths

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Go on at once if a run that had reached its last stage is resumed with a later one, or end with fewer."""
        stage = data_of(trainer).num_segments = min(data_of(trainer).num_segments, self.max_segments)
        within_lessons = data_of(trainer).lesson not in (None, data_of(trainer).lessons)
        passed = any(result.stage == stage and self.passed(result) for result in self.results)
        self._resumed_between_stages = passed and not within_lessons and stage < self.max_segments
        # Loader workers start before on_train_start; by then the length must be right.
        data_of(trainer).num_segments += self._resumed_between_stages
        if not self.lessons:
            data_of(trainer).lesson = None
        elif self._resumed_between_stages or (data_of(trainer).lesson is None and not self.history):
            self._begin_lessons(trainer)

    def _begin_lessons(self, trainer: L.Trainer) -> None:
        data_of(trainer).lesson = 1 if self.lessons and data_of(trainer).lessons else None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._clock = time.perf_counter()
        if self._resumed_between_stages:
            self._begin_stage(first_step=trainer.global_step)
            trainer.strategy.setup_optimizers(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._count_time()

    def _count_time(self) -> None:
        now = time.perf_counter()
        self.seconds += now - self._clock
        self._clock = now

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pl_module.log("stage", float(data_of(trainer).num_segments))
        if self.lessons:
            # 0 where validation is on the task itself.
            lesson, last = data_of(trainer).lesson, data_of(trainer).lessons
            pl_module.log("lesson", float(0 if lesson in (None, last) else lesson))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.finished:
            return
        self._count_time()
        accuracy = float(trainer.callback_metrics["val/accuracy"])
        stage = data_of(trainer).num_segments
        steps = trainer.global_step - self.first_step
        converged = self._converged(accuracy, stage)
        lesson, lessons = data_of(trainer).lesson, data_of(trainer).lessons
        name = f"stage {stage}, lesson {lesson}" if lesson else f"stage {stage}"
        if lesson in (None, lessons):
            self.history.append((trainer.global_step, stage, accuracy))
        log.info("%s: step %d, accuracy %.4f on %d segments", name, steps, accuracy, stage)
        if not converged and steps < at_stage(self.steps, stage):
            return
        if lesson:
            log.info("%s %s after %d steps", name, "converged" if converged else "did not converge", steps)
            if lesson < lessons and (converged or self.when_stuck == "continue"):
                data_of(trainer).lesson = lesson + 1
                self.lesson_steps += steps
                self._begin_schedule(first_step=trainer.global_step)
                trainer.strategy.setup_optimizers(trainer)
                return
        # A stage that was stuck and has been resumed has a result already, which this one replaces.
        result = StageResult(stage, self.lesson_steps + steps, self.seconds, accuracy, converged)
        self.results = [*(earlier for earlier in self.results if earlier.stage != stage), result]
        log.info(
            "stage %d %s after %d steps and %.1f s with accuracy %.4f",
            stage, "converged" if converged else "did not converge", result.steps, self.seconds, accuracy,
        )  # fmt: skip
        if self.passed(result):
            data_of(trainer).lesson = None
        if stage >= self.max_segments or not self.passed(result):
            trainer.should_stop = True
            return
        data_of(trainer).num_segments = stage + 1
        self._begin_lessons(trainer)
        self._begin_stage(first_step=trainer.global_step)
        trainer.strategy.setup_optimizers(trainer)

    def progress(self, trainer: L.Trainer) -> tuple[str, int, int]:
        stage, metrics = data_of(trainer).num_segments, trainer.callback_metrics
        segments = stage if self.lengths == "exact" else f"1–{stage}"
        accuracy = f"{float(metrics['val/accuracy']):.3f}" if "val/accuracy" in metrics else "–"
        lesson = f" · lesson {data_of(trainer).lesson}/{data_of(trainer).lessons}" if data_of(trainer).lesson else ""
        shown = f"stage {stage}/{self.max_segments}{lesson} · {segments} segments · accuracy {accuracy}"
        return shown, trainer.global_step - self.first_step, at_stage(self.steps, stage)

    def _converged(self, accuracy: float, stage: int) -> bool:
        self.successes = self.successes + 1 if accuracy >= at_stage(self.threshold, stage) else 0
        self.since_best = 0 if accuracy > self.best else self.since_best + 1
        self.best = max(self.best, accuracy)
        on_plateau = self.patience is not None and self.since_best >= self.patience
        return self.successes >= self.validations or on_plateau

    def state_dict(self) -> dict[str, Any]:
        names = ("history", "first_step", "lesson_steps", "seconds", "successes", "best", "since_best")
        return {name: getattr(self, name) for name in names} | {"results": [asdict(result) for result in self.results]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, value in state_dict.items():
            setattr(self, name, value)
        self.results = [StageResult(**result) for result in state_dict["results"]]
