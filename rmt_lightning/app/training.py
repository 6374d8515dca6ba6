"""One training run, from a checked config to its test."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.loggers.logger import Logger
from omegaconf import DictConfig, OmegaConf
from torch.distributed import DistNetworkError

from rmt_lightning.app.build import construct, save_architecture, text_names
from rmt_lightning.app.console import show, take_over_lightning
from rmt_lightning.app.recipes import Recipe, build_phases, build_recipe, check_memory, phase_groups
from rmt_lightning.app.results import phase_table, tell_folder
from rmt_lightning.app.resume import (
    DamagedConfig,
    as_typed,
    begun_with,
    changes,
    key_of,
    overrides,
    presets,
    save_config,
    save_text,
    saved_config,
)
from rmt_lightning.app.schema import instantiate
from rmt_lightning.core.errors import UserError
from rmt_lightning.core.quoting import shown, to_type
from rmt_lightning.core.run_folder import CHECKPOINTS, LAST, PREVIOUS, cut_ways_out
from rmt_lightning.reporting.redaction import public
from rmt_lightning.training.callbacks.checkpoints import (
    Interrupted,
    MetricsTable,
    RunCheckpoints,
    check_fits,
    gone,
    keep,
    read_newest,
    write_phases,
)
from rmt_lightning.training.callbacks.hardware import Hardware, describe, make_fast
from rmt_lightning.training.callbacks.progress import PhaseProgress
from rmt_lightning.training.callbacks.ranks import together, wait_for_others
from rmt_lightning.training.callbacks.wandb_run import PhaseRecords, WandbRun
from rmt_lightning.training.module import Diverged
from rmt_lightning.training.trainer import RunTrainer

log = logging.getLogger(__name__)


def train(config: DictConfig, folder: Path, source: Path | None, checkpoint: Path | None) -> int:
    """Train, or go on training from a checkpoint of the run in `source`; then test. Returns the exit code.

    Raises:
        UserError: if something cannot be built, or does not go together; nothing has been written then. Later on, if
            the run folder is gone or the text is damaged.
    """
    take_over_lightning()
    code = 1
    make_fast()
    try:
        code = _train(config, folder, source, checkpoint)
    except OSError:
        if folder.is_dir():
            raise
        raise gone(folder) from None
    finally:
        if "wandb" in sys.modules:
            # Another run of this process would go on in it otherwise.
            sys.modules["wandb"].finish(exit_code=code)
    return code


def _train(config: DictConfig, folder: Path, source: Path | None, checkpoint: Path | None) -> int:
    checkpoint, saved = read_newest(checkpoint) if checkpoint else (None, None)
    recipe = build_recipe(config, run=source, trained=saved is not None)
    phases = recipe.phases
    phases.prepare(recipe.module, recipe.data)
    check_memory(recipe)
    accumulated, epoch = config.trainer.get("accumulate_grad_batches", 1), recipe.data.steps_per_epoch
    if accumulated > epoch:
        raise UserError(
            f"trainer.accumulate_grad_batches={accumulated}: a validation ends each step, and comes after "
            f"data.steps_per_epoch={epoch} batches; give no more, or raise that"
        )
    if saved and checkpoint:
        _check_answers(recipe, saved)
        check_fits(recipe.module, saved["state_dict"], checkpoint)
        phases.load(saved)
        _refuse_what_comes_too_late(config, source, recipe, saved)
    text = text_names(recipe.corpora, recipe.task)
    if source and saved:
        text = begun_with(source, text)
    loggers = _loggers(config.logger, folder)
    checkpoints = RunCheckpoints(folder, phases)
    callbacks = [phases, checkpoints, PhaseProgress(phases), Hardware(folder)]
    callbacks += [PhaseRecords(logger, phases) for logger in loggers if isinstance(logger, WandbRun)]
    # Before the checkpoints, which hold what callbacks have come to.
    callbacks[1:1] = instantiate(config.get("callbacks") or OmegaConf.create({}), _convert_="all").values()
    table = MetricsTable(folder, done=saved["global_step"] if saved else 0)
    trainer: RunTrainer = construct(config.trainer, folder=folder, callbacks=callbacks, logger=[table, *loggers])
    if (processes := trainer.num_devices * trainer.num_nodes) > recipe.data.validated:
        # One that has nothing to validate would not come to where the others wait for it.
        raise UserError(
            f"trainer.devices × trainer.num_nodes = {processes}: a validation has {recipe.data.validated} to share; "
            "give fewer processes, or more to validate"
        )
    # Lightning would do so once it has loaded weights, which may be more precise than those of a fresh module.
    trainer.precision_plugin.convert_module(recipe.module)
    trainer.compile(recipe.model)

    # Nothing has been written so far, and all that can be wrong with the settings has been found.
    hydra = HydraConfig.get()
    if trainer.is_global_zero:
        if checkpoint and source != folder.resolve():
            # Whatever becomes of it, it goes on from there.
            keep(checkpoint, folder / CHECKPOINTS / LAST)
        save_config(folder, config, overrides(hydra), presets(hydra))
        save_text(folder, text)
    save_architecture(recipe.model, folder)
    log.info("training in %s: %s", shown(folder), _header(recipe, trainer))
    recipe.tell()
    tell_idle(config, recipe, overrides(hydra))
    settings = public(OmegaConf.to_container(config, resolve=True))
    for logger in loggers:
        logger.log_hyperparams(settings | {"hardware": describe(trainer)})
    if saved and phases.finished:
        log.info("%s has finished training; testing it again", shown(folder))
        recipe.module.load_state_dict(saved["state_dict"])
    elif code := _fit(trainer, recipe, checkpoint, folder, checkpoints):
        return code
    if not trainer.is_global_zero:
        return 0
    step = saved["global_step"] if saved and phases.finished and not trainer.global_step else trainer.global_step
    write_phases(folder, phases, step, out_of_time=bool(trainer.budget and trainer.budget.over))
    _tell(recipe, folder, trainer, loggers)
    wait_for_others(trainer)
    return _end(recipe, trainer, to_type("resume", os.path.relpath(folder)))


def _loggers(config: DictConfig, folder: Path) -> list[Logger]:
    """Where metrics go beside metrics.csv: one logger, or several, each under a name of its own."""
    parts = [config] if "_target_" in config else list(config.values())
    loggers: list[Logger] = [construct(part, save_dir=folder) for part in parts]
    for place in (Path(logger.log_dir) for logger in loggers if logger.log_dir):
        if not place.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"logger: would write to {place}, outside of the run folder; give another logger.name")
        cut_ways_out(folder, place)
    return loggers


def _header(recipe: Recipe, trainer: RunTrainer) -> str:
    """What is trained, on what and with which text, in a line."""
    weights = [part.numel() for part in recipe.module.parameters()]
    trained = sum(part.numel() for part in recipe.module.parameters() if part.requires_grad)
    share = "" if trained == sum(weights) else f", {trained:,} of them trained"
    hardware = describe(trainer)
    where = hardware["gpus"][0] if hardware["gpus"] else f"CPU with {(n := hardware['threads'])} thread{'s' * (n > 1)}"
    processes = f"{trainer.world_size} processes, each on a " if trainer.world_size > 1 else "a "
    return (
        f"{type(recipe.model).__name__} of {sum(weights):,} weights{share}, on {processes}{where} in "
        f"{trainer.precision}; {len(recipe.corpora['train'].tokens):,} tokens of text"
    )


def _check_answers(recipe: Recipe, saved: dict[str, Any]) -> None:
    """Raise UserError if answers are others than those that the weights stand for: they are read from files."""
    known, present = (set(answers) for answers in (saved.get("answers", ()), getattr(recipe.module, "answers", ())))
    if known and known != present:
        found = {"gone": known - present, "new": present - known}
        told = ", ".join(f"{what}: {', '.join(sorted(some)[:4])}" for what, some in found.items() if some)
        raise UserError(
            f"task: its answers are not those that the run has learnt ({told}); put its files back, or start a new run"
        )


def _refuse_what_comes_too_late(config: DictConfig, source: Path | None, recipe: Recipe, saved: dict[str, Any]) -> None:
    """Raise UserError if settings were changed for a part of the run that is over."""
    typed = overrides(HydraConfig.get())
    if 0 <= config.trainer.get("max_steps", -1) < saved["global_step"]:
        word, _ = as_typed(["trainer.max_steps"], config, typed)
        raise UserError(f"{word}: the run has taken {saved['global_step']} steps already; give more, or -1 for any")
    if source is None or not (changed := _changed(config, source)):
        return
    # A setting may be what makes a phase end here.
    before = build_phases(saved_config(source, config.trust))
    before.prepare(recipe.module, recipe.data)
    before.load(saved)
    over_before = {phase.name for phase in before if phase.finished}
    default = recipe.phases.default
    going_on = [phase for phase in recipe.phases if not (phase.finished and phase.name in over_before)]
    groups = dict(zip(phase_groups(config), recipe.phases, strict=True))
    late = [group for group, phase in groups.items() if phase not in going_on]
    late += ["optim"] if all(phase.optimization(default)[0] is not default for phase in going_on) else []
    late += [] if going_on else ["answer", "metrics"]
    if changed := [key for key in changed if key.partition(".")[0] in late]:
        word, _ = as_typed(changed, config, typed)
        raise UserError(f"{word}: comes too late, for what it sets is over in this run; leave it out")


def tell_idle(config: DictConfig, recipe: Recipe, typed: Iterable[str]) -> None:
    """Say which of the settings that were typed change nothing, for others leave them nothing to do."""
    found = list(recipe.idle(config))
    for word in typed:
        for why in (why for key, why in found if key == key_of(word)):
            log.info("%s: %s", word, why)


def _changed(config: DictConfig, source: Path) -> list[str]:
    try:
        return changes(config, saved_config(source, config.trust))
    except DamagedConfig:
        # Damaged, and about to be written anew.
        return []


def _fit(trainer: L.Trainer, recipe: Recipe, checkpoint: Path | None, folder: Path, checkpoints: RunCheckpoints) -> int:
    """Run the trainer to its end (0), or until a signal or a loss that is no number stops it."""
    again = to_type("resume", os.path.relpath(folder))
    try:
        with together(trainer, again):
            trainer.fit(recipe.module, recipe.data, ckpt_path=checkpoint, weights_only=True)
    except Interrupted as interrupted:
        log.info("stopped by %s and saved; go on with %s", interrupted, again)
        # The other ranks have done what they were asked; another code of theirs would be taken for a death.
        return 128 + interrupted.signum if trainer.is_global_zero else 0
    except DistNetworkError as error:
        port, said = os.environ.get("MASTER_PORT"), str(error).splitlines()[0]
        raise UserError(
            f"MASTER_PORT={port}: the processes cannot meet there ({said:.150}); unset it or give another one, and go "
            f"on with {again}"
        ) from None
    except Diverged as error:
        # Weights that failed in the very next step are not good.
        good = folder / CHECKPOINTS / (PREVIOUS if checkpoints.saved_step == trainer.global_step else LAST)
        kept = f"the last good checkpoint is {shown(good)}" if good.exists() else "there is no good checkpoint"
        print(f"error: {error}; {kept}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        # Killed by the system, or by somebody.
        if not str(error).startswith("DataLoader worker"):
            raise
        raise UserError(
            f"data.num_workers={recipe.data.num_workers}: one of them has died, perhaps for want of memory "
            f"({str(error).rstrip(' .')}); give fewer, and go on with {again}"
        ) from None
    return 0


def _tell(recipe: Recipe, folder: Path, trainer: L.Trainer, loggers: Sequence[Logger]) -> None:
    """Show what the phases have found, test what has been trained, and say where everything is."""
    for phase in recipe.phases:
        if table := phase_table(phase):
            show(table)
    watched = [logger for logger in loggers if isinstance(logger, WandbRun)]
    if watched:
        recipe.draw(folder, trainer)
    recipe.test(folder, trainer)
    tell_folder(folder)
    for logger in watched:
        logger.log_results()


def _end(recipe: Recipe, trainer: RunTrainer, again: str) -> int:
    """Say why the run has ended; `again` is what goes on with it. Returns the exit code."""
    if stuck := [phase for phase in recipe.phases if phase.stuck]:
        log.error(stuck[0].advice(again))
        return 1
    if recipe.phases.finished:
        return 0
    if trainer.budget and trainer.budget.over:
        log.info("stopped by trainer.max_time=%s; go on with %s", trainer.budget.limit, again)
        return 0
    if trainer.global_step == trainer.max_steps:
        log.info("stopped by trainer.max_steps=%d; raise it and go on with %s", trainer.max_steps, again)
        return 0
    log.error(recipe.phases.current.advice(again))
    return 1
