"""Longer inputs, or more pairs, as soon as the present ones are mastered."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import lightning as L
import numpy as np
import torch
from annotated_types import Ge, Gt, Le, MinLen
from torch import Tensor

from rmt_lightning.core.errors import UserError
from rmt_lightning.core.run_folder import STAGES
from rmt_lightning.models.segment_model import SegmentModel
from rmt_lightning.tasks.datamodule import MOST_SEGMENTS, FactBatch, FactDataModule, SampleDataModule
from rmt_lightning.tasks.facts import Counted
from rmt_lightning.tasks.placement import Key, Placement
from rmt_lightning.training.optimization import WarmupDecay, at_stage
from rmt_lightning.training.phases.lessons import draw_form, form_of, lessons_of
from rmt_lightning.training.phases.phase import Outcome, Phase, Progress, Start, Verdict

log = logging.getLogger(__name__)

Lengths = Literal["exact", "uniform"]


@dataclass(frozen=True)
class StageResult:
    """What a finished stage has shown.

    Attributes:
        stage: its number, which is also the number of segments of its longest inputs unless it is pairs that grow.
        steps: optimizer steps it took, lessons included.
        seconds: wall-clock time it took, lessons included.
        accuracy: at the last validation, on its longest inputs, or with most pairs.
        converged: whether it ended by converging rather than by running out of steps.
        questions: how many different questions the last validation asked at this length; None in earlier versions.
        fits: the share of all questions that inputs of this length have room for; the others are left out.
    """

    stage: int
    steps: int
    seconds: float
    accuracy: float
    converged: bool
    questions: int | None = None
    fits: float | None = None


class SegmentCurriculum(Phase):
    """Adds a segment each time the run converges (RMT-2023, section 5: "curriculum").

    Converged means accuracy of at least `threshold` in `validations` validations in a row, or, if `patience` is given,
    that many validations without a better one. The next stage starts from the weights just reached, with a fresh
    optimizer and schedule.

    The metric is summed over all ranks, so every rank decides alike.

    Args:
        max_segments: of the longest inputs, and the last stage.
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
        grow: what a stage has more of: "segments", or "pairs" where a task is of pairs: one, then twice as many each
            time, up to `task.pairs`. Inputs then have `max_segments` segments, but where pairs stand apart, no more
            than there are pairs; and `lengths` is about numbers of pairs.
        when_stuck: what to do if the budget is spent: "stop" the run, or "continue" with the next lesson or stage.
    """

    name = "curriculum"
    title = "Curriculum"
    table = STAGES

    def __init__(
        self,
        max_segments: Annotated[int, Ge(1), Le(MOST_SEGMENTS)],
        steps: Annotated[int, Ge(1)] | Annotated[list[Annotated[int, Ge(1)]], MinLen(1)],
        lengths: Lengths = "uniform",
        threshold: Annotated[float, Gt(0), Le(1)] | Annotated[list[Annotated[float, Gt(0), Le(1)]], MinLen(1)] = 0.99,
        validations: Annotated[int, Ge(1)] = 1,
        patience: Annotated[int, Ge(1)] | None = None,
        lessons: bool = False,
        when_stuck: Literal["stop", "continue"] = "stop",
        grow: Literal["segments", "pairs"] = "segments",
    ) -> None:
        self.max_segments = max_segments
        self.steps = steps
        self.lengths = lengths
        self.threshold = threshold
        self.validations = validations
        self.patience = patience
        self.lessons = lessons
        self.when_stuck = when_stuck
        self.grow = grow
        self.stage = 1
        self.results: list[StageResult] = []
        # (optimizer step of the run, stage, accuracy) of every validation on the task itself
        self.history: list[tuple[int, int, float]] = []
        # Counted from 1; None is the whole stage.
        self.lesson: int | None = None
        self._clock: float | None = None
        self._begin_stage(step=0)

    def prepare(self, module: L.LightningModule, data: SampleDataModule, before: Phase | None) -> None:
        if not isinstance(data, SampleDataModule):
            raise UserError("SegmentCurriculum: asks questions, which running text has not; give FixedSteps instead")
        self.samples, self.validation_samples = data.placement, data.validation_samples
        if not isinstance(data, FactDataModule):
            if self.lessons or self.grow == "pairs":
                raise UserError("lessons, grow: are for tasks, and these are labeled texts; leave them out")
            if self.max_segments > 1 and self.samples.fits("train", Key(self.max_segments - 1, 0)) == 1:
                raise UserError(f"max_segments={self.max_segments}: no text takes so many; give fewer")
            return
        self.placement = data.placement
        if self.grow == "pairs" and not isinstance(data.placement.task, Counted):
            raise UserError(
                f"curriculum.grow=pairs: task={data.placement.task.name} has no pairs; choose task=key_value, "
                "remember, rewrite or mqar, or leave it out"
            )
        if self.grow == "pairs" and self.lessons:
            raise UserError(
                "curriculum.lessons=true: begins with fewer pairs, as curriculum.grow=pairs does; leave one of them out"
            )
        self._enter(self.stage)

    @property
    def longest(self) -> int:
        return self.max_segments

    @property
    def stages(self) -> int:
        """How many stages there are."""
        return self.max_segments if self.grow == "segments" else len(self.placement.easier) + 1

    def asked(self, stage: int) -> Key:
        """The longest samples of a stage, or those of most pairs; their number is of no meaning."""
        if self.grow == "segments":
            return Key(stage, 0)
        easier = stage - 1 if stage <= len(self.placement.easier) else None
        return Key(self.placement.spread(self.max_segments, easier), 0, easier=easier)

    @property
    def last_step(self) -> int | None:
        # Whatever is found there: nothing comes after the budget of the last stage.
        if self.stage < self.stages or self._within_lessons:
            return None
        return self.schedule_step + at_stage(self.steps, self.stage)

    @property
    def begins(self) -> bool:
        # A run that had reached its last stage may have been resumed with a later one; and one in a stage with lessons.
        over = self._passed(self.stage) and not self._within_lessons
        untaught = self.lesson is None and self.lessons and lessons_of(self.placement, self.stage) > 0
        return self.first_step is None or over or untaught

    def begin(self, step: int) -> None:
        self.first_step = step if self.first_step is None else self.first_step
        if self._passed(self.stage):
            self._enter(self.stage + 1)
        self._begin_lessons()
        self._begin_stage(step)

    def shortest(self, placement: Placement) -> int:
        """Segments of the shortest inputs that are of the task itself, not of an easier form."""
        return 1 if self.grow == "segments" else placement.spread(self.max_segments)

    @property
    def pairs(self) -> int:
        """How many pairs the samples of the present stage have at most, where pairs grow."""
        return self.placement.facts(self.asked(self.stage).easier)

    def _enter(self, stage: int) -> None:
        self.stage = stage
        self.num_segments = self.asked(stage).num_segments

    def _begin_stage(self, step: int) -> None:
        self.lesson_steps = 0
        self.seconds = 0.0
        self._begin_schedule(step)

    def _begin_lessons(self) -> None:
        self.lesson = 1 if self.lessons and lessons_of(self.placement, self.stage) else None

    def _begin_schedule(self, step: int) -> None:
        self.schedule_step = step
        self.successes = 0
        self.best = -1.0
        self.since_best = 0

    @property
    def finished(self) -> bool:
        """Whether the last stage is over."""
        return any(result.stage >= self.stages and self._goes_on(result) for result in self.results)

    @property
    def stuck(self) -> bool:
        return any(result.stage == self.stage and not self._goes_on(result) for result in self.results)

    def advice(self, again: str) -> str:
        return (
            f"stage {self.stage} did not converge: raise curriculum.steps and go on with {again}, lower "
            "curriculum.threshold, or set curriculum.when_stuck=continue"
        )

    def _goes_on(self, result: StageResult) -> bool:
        return result.converged or self.when_stuck == "continue"

    def _passed(self, stage: int) -> bool:
        return any(result.stage == stage and self._goes_on(result) for result in self.results)

    @property
    def _within_lessons(self) -> bool:
        return self.lesson is not None and self.lesson < lessons_of(self.placement, self.stage)

    @property
    def milestones(self) -> list[str]:
        return [f"stage-{result.stage}" for result in self.results if self._goes_on(result)]

    def training_keys(self, data: SampleDataModule, batch: int) -> list[Key]:
        stage = draw_length(self.samples.seed, batch, self.stage, self.lengths)
        like = self.asked(stage)
        if self.lesson is not None:
            easier, text_length = draw_form(self.placement, self.stage, self.lesson, batch)
            like = like._replace(easier=easier, text_length=text_length)
        return [like._replace(number=number) for number in data.numbers(batch)]

    def validation_keys(self, data: SampleDataModule) -> Iterator[list[Key]]:
        # Accuracy is told apart by numbers of segments alone.
        lengths: Lengths = "exact" if self.grow == "pairs" else self.lengths
        for stage, samples in validated(self.stage, lengths, data.validation_samples):
            like = self.asked(stage)
            if self.lesson is not None:
                easier, text_length = form_of(self.placement, self.stage, self.lesson)
                like = like._replace(easier=easier, text_length=text_length)
            yield from data.shared("validation", samples, like)

    def optimization(self, default: WarmupDecay) -> tuple[WarmupDecay, int]:
        return default, self.stage

    def start(self, batch: FactBatch, model: SegmentModel[Any], random: torch.Generator) -> Start:
        # Time counts from the first step, also of a run that has been resumed.
        self._clock = self._clock or time.perf_counter()
        return super().start(batch, model, random)

    def step(self, start: Start, outcome: Outcome, model: SegmentModel[Any], random: torch.Generator) -> None:
        self._count_time()

    def _count_time(self) -> None:
        now = time.perf_counter()
        self.seconds += now - (self._clock or now)
        self._clock = now

    def logged(self) -> dict[str, float]:
        # 0 where validation is on the task itself.
        lesson = float(self.lesson or 0) if self._within_lessons else 0.0
        pairs = {"pairs": float(self.pairs)} if self.grow == "pairs" else {}
        return {"stage": float(self.stage)} | pairs | ({"lesson": lesson} if self.lessons else {})

    def derived(self, metrics: Mapping[str, Tensor]) -> dict[str, float]:
        if not isinstance(self.samples, Placement):
            return {}
        task = self.samples.form(self.asked(self.stage).easier)
        return {"val/capacity": task.capacity(float(metrics["val/accuracy"]))} if isinstance(task, Counted) else {}

    def validate(self, step: int, metrics: Mapping[str, Tensor], total: Callable[[Tensor], Tensor]) -> Verdict:
        self._count_time()
        accuracy, stage, steps = float(metrics["val/accuracy"]), self.stage, step - self.schedule_step
        converged = self._converged(accuracy)
        name = f"stage {stage}, lesson {self.lesson}" if self.lesson else f"stage {stage}"
        if not self._within_lessons:
            self.history.append((step, stage, accuracy))
        what = f"{self.pairs} pairs" if self.grow == "pairs" else f"{stage} segment{'s' * (stage > 1)}"
        log.info("%s: step %d, accuracy %.4f on %s", name, steps, accuracy, what)
        if not converged and steps < at_stage(self.steps, stage):
            return "go on"
        if self.lesson:
            log.info("%s %s after %d steps", name, "converged" if converged else "did not converge", steps)
            if self._within_lessons and (converged or self.when_stuck == "continue"):
                self.lesson += 1
                self.lesson_steps += steps
                self._begin_schedule(step)
                return "restart"
        like = self.asked(stage)
        asked = range(self.samples.asked("validation", self.validation_samples, like))
        questions = self.samples.different("validation", (like._replace(number=number) for number in asked))
        fits = self.samples.fits("validation", like)
        taken = self.lesson_steps + steps
        return self._end_stage(StageResult(stage, taken, self.seconds, accuracy, converged, questions, fits), step)

    def _end_stage(self, result: StageResult, step: int) -> Verdict:
        self.results = [*self.results, result]
        log.info(
            "stage %d %s after %d steps and %.1f s with accuracy %.4f", result.stage,
            "converged" if result.converged else "did not converge", result.steps, self.seconds, result.accuracy,
        )  # fmt: skip
        if self._goes_on(result):
            self.lesson = None
        if result.stage >= self.stages or not self._goes_on(result):
            return "end"
        self.begin(step)
        return "restart"

    def progress(self, step: int, metrics: Mapping[str, Tensor]) -> Progress:
        stage = self.stage
        segments = stage if self.lengths == "exact" or stage == 1 else f"1–{stage}"
        accuracy = f"{float(metrics['val/accuracy']):.3f}" if "val/accuracy" in metrics else "–"
        lesson = f" · lesson {self.lesson}/{lessons_of(self.placement, stage)}" if self.lesson else ""
        what = f"{self.pairs} pairs" if self.grow == "pairs" else f"{segments} segment{'s' * (stage > 1)}"
        told = f"stage {stage}/{self.stages}{lesson} · {what} · accuracy {accuracy}"
        return Progress(told, step - self.schedule_step, at_stage(self.steps, stage))

    def _converged(self, accuracy: float) -> bool:
        self.successes = self.successes + 1 if accuracy >= at_stage(self.threshold, self.stage) else 0
        self.since_best = 0 if accuracy > self.best else self.since_best + 1
        self.best = max(self.best, accuracy)
        on_plateau = self.patience is not None and self.since_best >= self.patience
        return self.successes >= self.validations or on_plateau

    def rows(self) -> list[dict[str, Any]]:
        return [asdict(result) for result in self.results]

    def state_dict(self) -> dict[str, Any]:
        # The stage under the name that it had when it was a number of segments alone.
        saved = {name: getattr(self, name) for name in _SAVED}
        return saved | {"num_segments": self.stage, "results": self.rows()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in _SAVED:
            setattr(self, name, state[name])
        self.results = [StageResult(**result) for result in state["results"]]
        # A run may be resumed to end sooner, or without lessons.
        self._enter(min(state["num_segments"], self.stages))
        self.lesson = self.lesson if self.lessons else None
        # A stage that was stuck, and is about to be trained further, has shown nothing yet.
        if self._within_lessons or not self._passed(self.stage):
            self.results = [result for result in self.results if result.stage != self.stage]


_SAVED = (
    "first_step", "lesson", "history", "schedule_step", "lesson_steps", "seconds", "successes", "best",
    "since_best",
)  # fmt: skip


def draw_length(seed: int, batch: int, longest: int, lengths: Lengths = "uniform") -> int:
    """The number of segments of training batch number `batch`: the same on all ranks."""
    if lengths == "exact":
        return longest
    rng = np.random.Generator(np.random.Philox(key=[seed, 2**32], counter=[0, 0, 0, batch]))
    return int(rng.integers(1, longest + 1))


def validated(longest: int, lengths: Lengths, samples: int) -> Iterator[tuple[int, int]]:
    """Which lengths a validation asks at, and how often: an eighth as often at those that are shorter."""
    for num_segments in range(1 if lengths == "uniform" else longest, longest + 1):
        yield num_segments, samples if num_segments == longest else -(-samples // 8)
