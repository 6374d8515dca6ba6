"""What is saved and logged, when, and how it is read again. Nothing is lost by a kill, a signal or a full disk."""

from __future__ import annotations

import csv
import hashlib
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
from pickle import PicklingError
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import nn
from torch.serialization import get_unsafe_globals_in_checkpoint

from rmt_lightning.core.errors import UserError
from rmt_lightning.core.files import append_csv, beside, read_csv, write_atomically, write_csv
from rmt_lightning.core.quoting import shown
from rmt_lightning.core.run_folder import CHECKPOINTS, CONFIG, LAST, METRICS, PHASES, PREVIOUS, stages
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
        content, foreign = _pickled(checkpoint)
        if foreign:
            parts = checkpoint | checkpoint.get("callbacks", {})
            *_, part = (name for name, value in parts.items() if _pickled(value)[1])
            raise UserError(
                f"{part}: its state holds {', '.join(foreign)}, which no checkpoint is opened with again; let its "
                "state_dict() return plain values and tensors alone, as float(…), str(…) or torch.tensor(…) make them"
            )
        write_atomically(Path(path), content.getbuffer())

    def load_checkpoint(self, path: str | Path, *args: Any, **options: Any) -> dict[str, Any]:
        return upgraded(super().load_checkpoint(path, *args, **options))


def _pickled(value: Any) -> tuple[io.BytesIO, list[str]]:
    """What is written of a value, and what of it would have to be executed to open it again."""
    content = io.BytesIO()
    try:
        torch.save(value, content)
    except (PicklingError, AttributeError, TypeError) as error:
        return content, [str(error)]
    content.seek(0)
    return content, sorted(get_unsafe_globals_in_checkpoint(content))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint, and the `sha256` of its file, without executing anything in it.

    Raises:
        UserError: if it is missing, damaged, or not to be read.
    """
    try:
        # Opened once, for a run that goes on may put another one in its place.
        with path.open("rb") as file:
            # torch notices that a file is too short, but not that a bit of it has changed.
            if (damaged := zipfile.ZipFile(file).testzip()) is not None:
                raise zipfile.BadZipFile(damaged)
            file.seek(0)
            checkpoint = upgraded(torch.load(file, map_location="cpu", weights_only=True))
            checkpoint["state_dict"]
            file.seek(0)
            checkpoint["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise UserError(f"{path}: is missing; give another one of the run's checkpoints/*.ckpt") from None
    except PermissionError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); make it readable") from error
    except Exception as error:  # zip, pickle and torch each have their own way to say that a file is broken
        raise UserError(
            f"{path}: is damaged or no checkpoint ({type(error).__name__}); "
            "give another one of the run's checkpoints/*.ckpt"
        ) from None
    return checkpoint


def read_newest(checkpoint: Path) -> tuple[Path, dict[str, Any]]:
    """Load a checkpoint to go on from; if last.ckpt is missing or damaged, the newest one before it, and say which.

    Whichever it is, training from there ends with the same weights.

    Raises:
        UserError: if there is none, or the newest one may not be read.
    """
    try:
        return checkpoint, read_checkpoint(checkpoint)
    except UserError as error:
        if checkpoint.name != LAST or isinstance(error.__cause__, PermissionError):
            raise
    folder, wrong = checkpoint.parent, "damaged" if checkpoint.exists() else "missing"
    for earlier in (folder / PREVIOUS, *reversed(stages(folder).values())):
        try:
            saved = read_checkpoint(earlier)
        except UserError:
            continue
        log.info("%s is %s; going on from %s, step %d", shown(checkpoint), wrong, earlier.name, saved["global_step"])
        return earlier, saved
    raise UserError(f"{checkpoint}: is {wrong}, and so is every earlier one; start a new run")


def check_fits(module: nn.Module, state_dict: Mapping[str, torch.Tensor], path: Path) -> None:
    """Raise UserError, naming the first difference, unless `state_dict` has the names and shapes of `module`."""
    own = module.state_dict()
    for name in [*own, *state_dict]:
        here = tuple(own[name].shape) if name in own else "missing"
        there = tuple(state_dict[name].shape) if name in state_dict else "missing"
        if here != there:
            raise UserError(f"{path}: holds another model: {name} is {there} there and {here} here")


class MetricsTable(Logger):
    """What is logged, in metrics/version_<n>/metrics.csv for the n-th start of a run, counted from 0.

    Checkpoints wait until it is on the disk; what was logged after the checkpoint that a run
    goes on from is logged again, and so taken out of the files of earlier starts. The files then follow each other as
    if the run had never been interrupted.

    Args:
        folder: the run folder.
        done: optimizer steps of the run before this start.
    """

    name, version = METRICS, None

    def __init__(self, folder: Path, done: int) -> None:
        super().__init__()
        self._folder = folder / METRICS
        self._done = done
        self._path: Path | None = None
        self._columns: list[str] = []
        self._rows: list[dict[str, Any]] = []

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """They stand in config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Keep a row for the next `save`."""
        self._rows.append({**metrics, "step": step})

    @rank_zero_only
    def save(self) -> None:
        """Write what has been logged since the last time; the first time, make room for it."""
        path = self._path = self._path or self._begin()
        if not self._rows:
            return
        columns = sorted(set().union(self._columns, *self._rows))
        if columns == self._columns:
            append_csv(path, self._rows, columns)
        else:
            rows = [*(read_csv(path) if self._columns else []), *self._rows]
            write_csv(path, [{name: row.get(name, "") for name in columns} for row in rows])
        self._columns, self._rows = columns, []

    @rank_zero_only
    def sync(self) -> None:
        """Wait until what has been logged is on the disk."""
        self.save()
        if self._path and self._columns:
            with self._path.open("rb") as file:
                os.fsync(file.fileno())

    def _begin(self) -> Path:
        numbers = [path.name.removeprefix("version_") for path in self._folder.glob("version_*")]
        starts = sorted(int(number) for number in numbers if number.isdecimal())
        for number in starts:
            self._cut(self._file(number))
        path = self._file(1 + max(starts, default=-1))
        # If the run folder is not there any more, it is not made anew.
        self._folder.mkdir(exist_ok=True)
        path.parent.mkdir()
        return path

    def _file(self, number: int) -> Path:
        return self._folder / f"version_{number}" / "metrics.csv"

    def _cut(self, path: Path) -> None:
        """Take out what is about to be logged again, and a line that was not finished."""
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        *lines, unfinished = text.split("\n")
        rows = list(csv.DictReader(lines))
        kept = [row for row in rows if (row.get("step") or "").isdecimal() and int(row["step"]) < self._done]
        if unfinished or len(kept) < len(rows):
            write_csv(path, kept) if kept else path.unlink()


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
        self.saved_step = self._step = trainer.global_step
        self._stopping = False
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
        # Gradients that wait for those of the next batch are in no checkpoint.
        stepped, self._step = trainer.global_step > self._step, trainer.global_step
        # Lightning would skip the validation of an epoch that is resumed after its last batch.
        if not stepped or trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            return
        self._stopping = self._asked_to_stop(trainer)
        # If max_steps ends an epoch before its end, Lightning takes it for a whole one later on.
        if self._stopping or trainer.global_step == trainer.max_steps:
            self._save(trainer)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        # What the batch before has shown has been logged by now.
        self._stop_if_asked()

    def _stop_if_asked(self) -> None:
        if self._stopping:
            raise Interrupted(self._signum or signal.SIGTERM)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for name in self._milestones() - self._kept:
            trainer.save_checkpoint(self.folder / CHECKPOINTS / f"{name}.ckpt")
        self._kept = self._milestones()
        self._save(trainer)
        self._stopping = not trainer.should_stop and self._asked_to_stop(trainer)
        self._stop_if_asked()

    def _milestones(self) -> set[str]:
        return {name for phase in self.phases for name in phase.milestones}

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # trainer.max_steps may end a run between two validations.
        if trainer.global_step > self.saved_step:
            self._save(trainer)
        self._stop_if_asked()

    def _save(self, trainer: L.Trainer) -> None:
        last = self.folder / CHECKPOINTS / LAST
        if not (self.folder / CONFIG).exists():
            raise gone(self.folder)
        for logger in trainer.loggers:
            logger.sync() if isinstance(logger, MetricsTable) else logger.save()
        if trainer.is_global_zero:
            write_phases(self.folder, self.phases, trainer.global_step)
            if self._last_is_whole and last.exists():
                keep(last, last.with_name(PREVIOUS))
        trainer.save_checkpoint(last)
        self._last_is_whole = True
        self.saved_step = trainer.global_step


def gone(folder: Path) -> UserError:
    """What is told of a run folder that is no longer where it was; nothing is written there anew."""
    shown = os.path.relpath(folder)
    return UserError(
        f"{shown}: was removed, renamed or emptied while the run went on; resume it where it is, or start it again"
    )


def write_phases(folder: Path, phases: Phases, step: int, out_of_time: bool = False) -> None:
    """Write what phases have found, how far each has come and in which one time was up, for who reads the folder."""
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
                "out_of_time": out_of_time and phase is phases.current,
                "table": phase.table,
            }
        )
    write_atomically(folder / PHASES, json.dumps(told, indent=2).encode())


def keep(path: Path, name: Path) -> None:
    """Give a file a second name, which costs no space; where there are no links, copy it."""
    name.parent.mkdir(exist_ok=True)
    partial = beside(name)
    try:
        try:
            os.link(path, partial)
        except OSError:
            shutil.copyfile(path, partial)
        os.replace(partial, name)
    except OSError as error:
        error.filename = str(name)
        raise
    finally:
        # Of two names of one file, nothing is moved.
        partial.unlink(missing_ok=True)
