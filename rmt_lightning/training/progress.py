"""What a person sees of the curriculum while a run goes on."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from rich import get_console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from rmt_lightning.tasks.datamodule import data_of
from rmt_lightning.training.carried_states import CarriedStates
from rmt_lightning.training.curriculum import SegmentCurriculum
from rmt_lightning.training.optimization import at_stage


class CurriculumProgress(Callback):
    """A live bar over the steps of the present stage, with segments, accuracy and speed.

    Args:
        curriculum: knows the budget of each stage.
        hold: the phase after it, if there is one.
    """

    def __init__(self, curriculum: SegmentCurriculum, hold: CarriedStates | None = None) -> None:
        super().__init__()
        self.curriculum = curriculum
        self.hold = hold
        self.progress = Progress(
            TextColumn("{task.fields[phase]}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("steps · {task.fields[segments]} segments · accuracy {task.fields[accuracy]}"),
            TextColumn("· {task.fields[speed]} tokens/s ·"),
            TimeElapsedColumn(),
            console=get_console(),
            transient=True,
        )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Without a terminal there is nothing to animate; the log tells the same, one line a validation.
        if trainer.is_global_zero and get_console().is_terminal:
            self.task = self.progress.add_task("", phase="", segments=1, accuracy="–", speed="–")
            self._show(trainer)
            self.progress.start()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._show(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._show(trainer)

    def _show(self, trainer: L.Trainer) -> None:
        if not self.progress.tasks:
            return
        stage = data_of(trainer).num_segments
        phase, first_step, steps = (
            f"stage {stage}/{self.curriculum.max_segments}",
            self.curriculum.first_step,
            at_stage(self.curriculum.steps, stage),
        )
        if self.hold and self.hold.first_step is not None:
            phase, first_step, steps = "holding", self.hold.first_step, self.hold.steps
        metrics = trainer.callback_metrics
        self.progress.update(
            self.task,
            completed=trainer.global_step - first_step,
            total=steps,
            phase=phase,
            segments=stage if data_of(trainer).lengths == "exact" else f"1–{stage}",
            accuracy=f"{float(metrics['val/accuracy']):.3f}" if "val/accuracy" in metrics else "–",
            speed=f"{float(metrics['train/tokens_per_second']):,.0f}" if "train/tokens_per_second" in metrics else "–",
        )

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.progress.stop()
