"""What a person sees of a run while it goes on."""

from __future__ import annotations

import logging
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from rich import get_console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from rmt_lightning.core.progress import Pace, in_time
from rmt_lightning.training.phases.phase import Phases

log = logging.getLogger(__name__)

# Letters of a line that has room for all there is to tell.
_WIDE = 110


class PhaseProgress(Callback):
    """A live bar over the steps of a phase, with what it says of itself, speed, and the time that is left at most.

    Without a screen there is nothing to animate: the log has a line for each validation, and one now and then for the
    time that is left.

    Args:
        phases: know what is being done, and for how many steps.
    """

    def __init__(self, phases: Phases) -> None:
        super().__init__()
        self.phases = phases
        speed = (TextColumn("steps · {task.fields[speed]} tokens/s"),)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=8),
            MofNCompleteColumn(),
            *(speed if get_console().width >= _WIDE else ()),
            TextColumn("· {task.fields[left]}"),
            console=get_console(),
            transient=True,
        )
        self._done = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin(trainer)
        if trainer.is_global_zero and get_console().is_terminal:
            self.task = self.progress.add_task("", speed="–", left="–")
            self._show(trainer)
            self.progress.start()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._show(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._show(trainer)

    def _begin(self, trainer: L.Trainer) -> None:
        _, self._done, _ = self.phases.current.progress(trainer.global_step, trainer.callback_metrics)
        self._pace = Pace(self._done)

    def _show(self, trainer: L.Trainer) -> None:
        description, done, total = self.phases.current.progress(trainer.global_step, trainer.callback_metrics)
        if done < self._done:
            # Another stage or phase, whose steps take longer or less long.
            self._begin(trainer)
        self._done = done
        seconds = self._pace.left(done, total)
        left = "–" if seconds is None else f"≤ {in_time(seconds)} left"
        if self.progress.tasks:
            speed = trainer.callback_metrics.get("train/tokens_per_second")
            speed_told = "–" if speed is None else f"{float(speed):,.0f}"
            self.progress.update(
                self.task, description=description, completed=done, total=total, speed=speed_told, left=left
            )
        elif seconds and trainer.is_global_zero and self._pace.due:
            log.info("%s · %d of %d steps · %s", description, done, total, left)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.progress.stop()
