"""One training run, from a checked config to its test."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import Logger
from omegaconf import DictConfig, OmegaConf
from rich import get_console

from rmt_lightning.app.build import save_architecture
from rmt_lightning.app.recipes import Recipe, build_recipe
from rmt_lightning.app.results import phase_table, told_folder
from rmt_lightning.app.resume import begun_with, presets, save_config, save_text
from rmt_lightning.core.run_folder import CHECKPOINTS, LAST, METRICS
from rmt_lightning.reporting.redaction import public
from rmt_lightning.tasks.noise import text_digest
from rmt_lightning.training.callbacks.checkpoints import (
    AtomicCheckpointIO,
    Interrupted,
    RunCheckpoints,
    check_fits,
    read_newest,
    write_phases,
)
from rmt_lightning.training.callbacks.hardware import Hardware, describe
from rmt_lightning.training.callbacks.progress import PhaseProgress
from rmt_lightning.training.callbacks.ranks import together
from rmt_lightning.training.callbacks.wandb_run import PhaseRecords, WandbRun
from rmt_lightning.training.module import Diverged

log = logging.getLogger(__name__)


def train(config: DictConfig, folder: Path, source: Path | None, checkpoint: Path | None) -> int:
    """Train, or go on training from a checkpoint of the run in `source`; then test. Returns the exit code.

    Raises:
        UserError: if something cannot be built, or does not go together; nothing has been written then.
    """
    code = 1
    try:
        code = _train(config, folder, source, checkpoint)
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
    if saved and checkpoint:
        check_fits(recipe.module, saved["state_dict"], checkpoint)
        phases.load(saved)
    text = text_digest(recipe.corpora)
    if source:
        text = begun_with(source, text)
    logger: Logger | None = instantiate(config.logger, save_dir=folder) if "_target_" in config.logger else None
    callbacks = [phases, RunCheckpoints(folder, phases), PhaseProgress(phases), Hardware(folder)]
    if isinstance(logger, WandbRun):
        callbacks.append(PhaseRecords(logger, phases))
    trainer = _trainer(config, folder, callbacks, logger)

    # Nothing has been written so far, and all that can be wrong with the settings has been found.
    hydra = HydraConfig.get()
    if trainer.is_global_zero:
        save_config(folder, config, hydra.overrides.task, presets(hydra))
        save_text(folder, text)
    save_architecture(recipe.model, folder)
    if logger:
        settings = public(OmegaConf.to_container(config, resolve=True))
        logger.log_hyperparams(settings | {"hardware": describe(trainer)})
    if saved and phases.finished:
        log.info("%s has finished training; testing it again", os.path.relpath(folder))
        recipe.module.load_state_dict(saved["state_dict"])
    elif code := _fit(trainer, recipe, checkpoint, folder):
        return code
    if not trainer.is_global_zero:
        return 0
    step = saved["global_step"] if saved and phases.finished and not trainer.global_step else trainer.global_step
    write_phases(folder, phases, step)
    _tell(recipe, folder, trainer, logger)
    return _end(recipe, trainer, os.path.relpath(folder))


def _fit(trainer: L.Trainer, recipe: Recipe, checkpoint: Path | None, folder: Path) -> int:
    """Run the trainer to its end (0), or until a signal or a loss that is no number stops it."""
    shown = os.path.relpath(folder)
    try:
        with together(trainer, shown):
            trainer.fit(recipe.module, recipe.data, ckpt_path=checkpoint, weights_only=True)
    except Interrupted as interrupted:
        log.info("stopped by %s and saved; go on with resume=%s", interrupted, shown)
        # The other ranks have done what they were asked; another code of theirs would be taken for a death.
        return 128 + interrupted.signum if trainer.is_global_zero else 0
    except Diverged as error:
        last = folder / CHECKPOINTS / LAST
        kept = (
            f"the last good checkpoint is {os.path.relpath(last)}" if last.exists() else "no checkpoint was written yet"
        )
        print(f"error: {error}; {kept}", file=sys.stderr)
        return 1
    return 0


def _tell(recipe: Recipe, folder: Path, trainer: L.Trainer, logger: Logger | None) -> None:
    """Show what the phases have found, test what has been trained, and say where everything is."""
    console = get_console()
    for phase in recipe.phases:
        if table := phase_table(phase):
            console.print(table)
    if isinstance(logger, WandbRun):
        recipe.draw(folder, trainer)
    recipe.test(folder, trainer)
    console.print(told_folder(folder), highlight=False, soft_wrap=True)
    if isinstance(logger, WandbRun):
        logger.log_results()


def _end(recipe: Recipe, trainer: L.Trainer, shown: str) -> int:
    """Say why the run has ended. Returns the exit code."""
    if recipe.phases.finished:
        return 0
    if trainer.global_step == trainer.max_steps:
        log.info("stopped by trainer.max_steps=%d; raise it and go on with resume=%s", trainer.max_steps, shown)
        return 0
    log.error(
        "stage %d did not converge: raise curriculum.steps and go on with resume=%s, lower curriculum.threshold, "
        "or set curriculum.when_stuck=continue", recipe.phases.current.num_segments, shown,
    )  # fmt: skip
    return 1


def _trainer(config: DictConfig, folder: Path, callbacks: list[Any], logger: Logger | None) -> L.Trainer:
    table = CSVLogger(folder, name=METRICS, flush_logs_every_n_steps=config.data.steps_per_epoch)
    on_gpu = config.trainer.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    trainer: L.Trainer = instantiate(
        config.trainer,
        _convert_="all",
        precision=config.trainer.precision or ("bf16-mixed" if on_gpu else "32-true"),
        max_epochs=-1,
        default_root_dir=folder,
        callbacks=callbacks,
        logger=[table, logger] if logger else table,
        plugins=[AtomicCheckpointIO()],
        # Keys are sharded by the data module, and the phases must not see an untrained validation.
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    return trainer
