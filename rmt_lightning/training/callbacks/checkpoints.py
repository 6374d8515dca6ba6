"""What is saved, when, and how it is read again. Nothing is lost by a kill, a signal or a full disk."""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
import signal
import zipfile
from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import nn

from rmt_lightning.core.errors import UserError
from rmt_lightning.core.files import write_atomically, write_csv
from rmt_lightning.core.run_folder import CHECKPOINTS, LAST, PHASES, PREVIOUS
from rmt_lightning.training.callbacks.upgrade import upgraded
from rmt_lightning.training.phases.phase import Phases

log = logging.getLogger(__name__)


class Interrupted(Exception):
    """The run was asked to stop, and has saved where it stands.

    Args:
        signum: the signal that asked.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints whole or not at all."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        # torch reports a full disk as a RuntimeError; writing its bytes ourselves keeps the OSError.
        content = io.BytesIO()
        torch.save(checkpoint, content)
        write_atomically(Path(path), content.getbuffer())

    def load_checkpoint(self, path: str | Path, *args: Any, **options: Any) -> dict[str, Any]:
        return upgraded(super().load_checkpoint(path, *args, **options))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint without executing anything in it.

    Raises:
        UserError: if it is damaged.
    """
    try:
        # torch notices that a file is too short, but not that a bit of it has changed.
        with zipfile.ZipFile(path) as archive:
            if (damaged := archive.testzip()) is not None:
                raise zipfile.BadZipFile(damaged)
        checkpoint = upgraded(torch.load(path, map_location="cpu", weights_only=True))
        checkpoint["state_dict"]
    except Exception as error:  # zip, pickle and torch each have their own way to say that a file is broken
        raise UserError(
            f"{path}: is damaged or no checkpoint ({type(error).__name__}); "
            "give another one of the run's checkpoints/*.ckpt"
        ) from None
    return checkpoint


def read_newest(checkpoint: Path) -> tuple[Path, dict[str, Any]]:
    """Load a checkpoint to go on from, and say which; if last.ckpt is damaged, the newest one before it that is not.

    Whichever it is, training from there ends with the same weights.

    Raises:
        UserError: if there is none.
    """
    try:
        return checkpoint, read_checkpoint(checkpoint)
    except UserError:
        if checkpoint.name != LAST:
            raise
    folder = checkpoint.parent
    stages = sorted(folder.glob("stage-*.ckpt"), key=lambda path: int(path.stem.removeprefix("stage-")), reverse=True)
    for earlier in (folder / PREVIOUS, *stages):
        try:
            saved = read_checkpoint(earlier)
        except UserError:
            continue
        shown = os.path.relpath(checkpoint)
        log.info("%s is damaged; going on from %s, step %d", shown, earlier.name, saved["global_step"])
        return earlier, saved
    raise UserError(f"{checkpoint}: is damaged, and so is every earlier one; start a new run")


def check_fits(module: nn.Module, state_dict: Mapping[str, torch.Tensor], path: Path) -> None:
    """Raise UserError, naming the first difference, unless `state_dict` has the names and shapes of `module`."""
    own = module.state_dict()
    for name in [*own, *state_dict]:
        here = tuple(own[name].shape) if name in own else "missing"
        there = tuple(state_dict[name].shape) if name in state_dict else "missing"
        if here != there:
            raise UserError(f"{path}: holds another model: {name} is {there} there and {here} here")


class RunCheckpoints(Callback):
    """Saves `last.ckpt` and what phases have found after every validation, and one checkpoint a stage; obeys signals.

    The `last.ckpt` before stays as `previous.ckpt`, for the case that a disk damages the new one.
    Must stand after the phases in the list of callbacks, so that it saves what they have decided.

    Args:
        folder: the run folder.
        phases: what the run goes through.

    Attributes:
        saved_step: of `last.ckpt`, or of the checkpoint that training began from.
    """

    def __init__(self, folder: Path, phases: Phases) -> None:
        super().__init__()
        self.saved_step = 0
        self.folder = folder
        self.phases = phases
        self._signum: int | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._kept = self._milestones()
        self.saved_step = trainer.global_step
        # A run that goes on from an earlier checkpoint because the last one is damaged must not keep that one.
        self._last_is_whole = trainer.ckpt_path is not None and Path(trainer.ckpt_path).name == LAST
        self._handlers = {signum: signal.signal(signum, self._remember) for signum in (signal.SIGINT, signal.SIGTERM)}

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        for signum, handler in getattr(self, "_handlers", {}).items():
            signal.signal(signum, handler)

    def _remember(self, signum: int, frame: Any) -> None:
        if self._signum is not None:
            # Asked twice: leave at once. The last checkpoint is intact.
            raise KeyboardInterrupt
        self._signum = signum
        log.info("%s: saving after this step; once more to leave at once", signal.Signals(signum).name)

    def _asked_to_stop(self, trainer: L.Trainer) -> bool:
        asked = self._signum is not None
        if trainer.world_size > 1:
            # A signal may reach one rank alone, yet all of them must save together.
            asked = trainer.strategy.reduce_boolean_decision(asked, all=False)
        return asked

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        # Lightning would skip the validation of an epoch that is resumed after its last batch.
        if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            return
        if self._asked_to_stop(trainer):
            self._save(trainer)
            raise Interrupted(self._signum or signal.SIGTERM)
        if trainer.global_step == trainer.max_steps:
            # Later on Lightning takes the epoch for a whole one.
            self._save(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for name in self._milestones() - self._kept:
            trainer.save_checkpoint(self.folder / CHECKPOINTS / f"{name}.ckpt")
        self._kept = self._milestones()
        self._save(trainer)
        if not trainer.should_stop and self._asked_to_stop(trainer):
            raise Interrupted(self._signum or signal.SIGTERM)

    def _milestones(self) -> set[str]:
        return {name for phase in self.phases for name in phase.milestones}

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # trainer.max_steps may end a run between two validations.
        if trainer.global_step > self.saved_step:
            self._save(trainer)

    def _save(self, trainer: L.Trainer) -> None:
        last = self.folder / CHECKPOINTS / LAST
        if trainer.is_global_zero:
            write_phases(self.folder, self.phases, trainer.global_step)
            if self._last_is_whole and last.exists():
                _keep(last, last.with_name(PREVIOUS))
        trainer.save_checkpoint(last)
        self._last_is_whole = True
        self.saved_step = trainer.global_step


def write_phases(folder: Path, phases: Phases, step: int) -> None:
    """Write what phases have found, and how far each has come, for those who read the run folder."""
    told = []
    for phase, after in zip_longest(phases, [*phases][1:]):
        if phase.table and (rows := phase.rows()):
            write_csv(folder / phase.table, rows)
        first, end = phase.first_step, step if after is None or after.first_step is None else after.first_step
        told.append(
            {
                "name": phase.name,
                "title": phase.title,
                "first_step": first,
                "steps": 0 if first is None else end - first,
                "finished": phase.finished,
                "stuck": phase.stuck,
                "table": phase.table,
            }
        )
    write_atomically(folder / PHASES, json.dumps(told, indent=2).encode())


def _keep(path: Path, name: Path) -> None:
    """Give a file a second name, which costs no space; where a file system has no links, copy it."""
    name.unlink(missing_ok=True)
    try:
        os.link(path, name)
    except OSError:
        shutil.copyfile(path, name)
