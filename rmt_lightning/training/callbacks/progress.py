"""What a person sees of a run while it goes on."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from rich import get_console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from rmt_lightning.training.phases.phase import Phases


class PhaseProgress(Callback):
    """A live bar over the steps of a phase, with what it says of itself, and speed.

    Args:
        phases: know what is being done, and for how many steps.
    """

    def __init__(self, phases: Phases) -> None:
        super().__init__()
        self.phases = phases
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("steps · {task.fields[speed]} tokens/s ·"),
            TimeElapsedColumn(),
            console=get_console(),
            transient=True,
        )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Without a terminal there is nothing to animate; the log tells the same, one line a validation.
        if trainer.is_global_zero and get_console().is_terminal:
            self.task = self.progress.add_task("", speed="–")
            self._show(trainer)
            self.progress.start()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._show(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._show(trainer)

    def _show(self, trainer: L.Trainer) -> None:
        if not self.progress.tasks:
            return
        description, completed, total = self.phases.current.progress(trainer.global_step, trainer.callback_metrics)
        speed = trainer.callback_metrics.get("train/tokens_per_second")
        self.progress.update(
            self.task,
            description=description,
            completed=completed,
            total=total,
            speed="–" if speed is None else f"{float(speed):,.0f}",
        )

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.progress.stop()
