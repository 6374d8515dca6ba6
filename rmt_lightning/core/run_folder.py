"""What stands where in a run folder."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from rmt_lightning.core.errors import UserError
from rmt_lightning.core.files import check_readable, forget_unfinished, own_file
from rmt_lightning.core.quoting import shown

CONFIG = "config.yaml"
TYPED = "overrides.yaml"
CHECKPOINTS = "checkpoints"
LAST = "last.ckpt"
PREVIOUS = "previous.ckpt"
METRICS = "metrics"
PHASES = "phases.json"
STAGES = "stages.csv"
HOLD = "hold.csv"
EVALUATION = "evaluation.csv"
PREDICTIONS = "predictions.jsonl"
PROBES = "probes.csv"
HARDWARE = "hardware.json"
JOB = "job.json"
TEXT = "text.json"
TOKENIZER = "tokenizer"
BACKBONE = "backbone"
ADAPTER = "adapter"
# What else a run has written when it ends.
_RESULTS = ("curriculum.png", "perplexity.png", "documents.csv")

log = logging.getLogger(__name__)


def locate(path: str, key: str) -> tuple[Path, Path | None]:
    """The run folder and the checkpoint that `path`, either of them, stands for; a young run has no checkpoint yet.

    That of a folder is the last one, which may have been lost while earlier ones are there.

    Raises:
        UserError: naming the setting `key`, if there is no run, or none that may be read; or what is no file in it.
    """
    given = Path(os.path.realpath(path))
    run = given if os.path.isdir(given) else given.parent.parent
    try:
        for place in (given, run / CONFIG):
            os.stat(place)
    except PermissionError as error:
        raise UserError(f"{key}={path}: cannot be read ({error.strerror}); ask whose it is for that") from None
    except OSError:
        raise UserError(f"{key}={path}: no run there; give a run folder or one of its {CHECKPOINTS}/*.ckpt") from None
    refuse_pipes(run)
    check_readable(run / CHECKPOINTS)
    if given.is_file():
        return run, given
    return run, run / CHECKPOINTS / LAST if any((run / CHECKPOINTS).glob("*.ckpt")) else None


def stages(folder: Path) -> dict[int, Path]:
    """The checkpoints in a folder of those that a run leaves after its stages, in their order; no copies of them."""
    named = {path: re.fullmatch(r"stage-([1-9]\d*)\.ckpt", path.name) for path in folder.glob("stage-*.ckpt")}
    found = {int(name[1]): path for path, name in named.items() if name}
    return dict(sorted(found.items()))


def locate_checkpoint(path: str) -> tuple[Path, Path]:
    """The run folder and the checkpoint that the setting `checkpoint` stands for.

    Raises:
        UserError: if there is no run, or it has not written a checkpoint yet.
    """
    run, checkpoint = locate(path, "checkpoint")
    if checkpoint is None:
        raise UserError(f"checkpoint={path}: the run has not written a checkpoint yet; train it first")
    return run, checkpoint


def in_the_way(folder: Path) -> str | None:
    """What stands in a folder and would be lost in a run that begins there, or mixed with it; None if nothing does."""
    built_from = (TEXT, TOKENIZER, BACKBONE, ADAPTER)
    tested = (EVALUATION, PREDICTIONS)
    written = (TYPED, METRICS, PHASES, STAGES, HOLD, *tested, HARDWARE, *built_from, *_RESULTS)
    if found := next((name for name in written if os.path.lexists(folder / name)), None):
        return found
    # Where somebody works, a run belongs in a folder of its own; scripts, notes and logs may stand beside it.
    at_work = Path.cwd().is_relative_to(folder.resolve())
    others = (path.name for path in sorted(folder.iterdir()) if path.is_dir() and path.name[0] != ".")
    return next((name for name in others if name != CHECKPOINTS), None) if at_work else None


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Keep a run folder to this process.

    A record lock belongs to a process: it ends with it, whatever kills it, and neither other ranks nor loader workers
    inherit it. On NFS it holds between machines, if the lock service runs there.

    Raises:
        UserError: if another process has claimed the folder, it cannot be written to, or a folder in it is a link that
            leads out of it.
    """
    refuse_ways_out(folder)
    fresh = not any(folder.iterdir())
    try:
        lock = own_file(folder / ".lock")
        opened = lock.open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{shown(folder)}: cannot be written to ({error.strerror}); a run goes on in a copy of its folder, or from "
            f"one of its {CHECKPOINTS}/stage-*.ckpt"
        ) from None
    with opened as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.seek(0)
                raise UserError(
                    f"{shown(folder)}: a run is going on there ({file.read() or 'just begun'}); let it end, stop it, "
                    "or choose another folder"
                ) from None
            log.warning("%s cannot be locked (%s): do not start a second run in it", shown(folder), error.strerror)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        for part in (folder, folder / CHECKPOINTS, *folder.glob(f"{METRICS}/*")):
            forget_unfinished(part)
        try:
            yield
        finally:
            file.truncate(0)
            if fresh and folder.is_dir() and all(path == lock or path.suffix == ".log" for path in folder.iterdir()):
                # Nothing has come of it.
                for path in folder.iterdir():
                    path.unlink()
                if folder.resolve() != Path.cwd():
                    folder.rmdir()


def refuse_ways_out(run: Path, part: str = "") -> None:
    """Make sure that what is written into a run folder, or into one of its parts, stays in it.

    Links to files are no danger: files are made anew beside their place.

    Raises:
        UserError: naming a link to a folder elsewhere.
    """
    inner = (Path(place, name) for place, *names in os.walk(run / part) for name in (*names[0], *names[1]))
    for path in (run / part, *inner) if part else inner:
        # One that leads nowhere yet may stand where a folder is to be made.
        to_folder = path.is_dir() or (not path.exists() and "." not in path.name)
        if path.is_symlink() and to_folder and not path.resolve().is_relative_to(run.resolve()):
            shown = os.path.relpath(path)
            raise UserError(f"{shown}: is a link that leads out of the run folder; put there what it leads to")


def refuse_pipes(folder: Path) -> None:
    """Make sure that whatever is read in a folder has an end: who opens a pipe waits for somebody to write to it.

    Raises:
        UserError: naming a pipe, a socket or a device, or a link to one.
    """
    for place, _, names in os.walk(folder):
        for path in (Path(place, name) for name in names):
            if path.exists() and not path.is_file():
                raise UserError(f"{shown(path)}: is no plain file; remove it, or put the file back")


def cut_ways_out(run: Path, part: Path) -> None:
    """Remove the links to files elsewhere from a part of a run folder that another library writes through."""
    for path in part.rglob("*"):
        if path.is_symlink() and not path.resolve().is_relative_to(run.resolve()):
            path.unlink(missing_ok=True)


def findings(place: str | Path, kind: str, name: str, settings: dict[str, Any]) -> Path:
    """Where results that were found with these settings belong: <place>/<kind>/<name>-<key of the settings>.

    Raises:
        UserError: if a link leads out of the place, it holds what is no file, or there can be no such place.
    """
    try:
        refuse_ways_out(Path(place), kind)
        refuse_pipes(Path(place, kind))
    except OSError as error:
        raise UserError(f"{shown(place)}: {error.strerror}; choose another folder") from None
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    # A task may be called anything.
    return Path(place) / kind / f"{name.replace('/', '_')}-{key}"


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Make a folder of results, and keep it to this process for a while; another one that wants it waits.

    Raises:
        UserError: if it cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(own_file(folder / ".lock"))
        try:
            lock.acquire(timeout=5)
        except Timeout:
            log.info("%s: another process writes there; waiting for it", shown(folder))
            lock.acquire()
    except OSError as error:
        raise UserError(
            f"{shown(folder)}: cannot be written to ({error.strerror}); give output=<another folder>"
        ) from None
    try:
        forget_unfinished(folder)
        yield
    finally:
        lock.release()
