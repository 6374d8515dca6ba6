"""Front door: `python -m rmt_lightning.train task=detect curriculum.max_segments=7`.

A run folder holds config.yaml, hardware.json, train.log, tokenizer/, backbone/, metrics/, checkpoints/, stages.csv and,
at the end, evaluation.csv and curriculum.png; for a language model evaluation.csv, documents.csv and perplexity.png.
"""

from __future__ import annotations

import logging
import os
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from rmt_lightning.app.console import start_logging
from rmt_lightning.app.hydra_errors import front_door
from rmt_lightning.app.resume import saved_config
from rmt_lightning.app.schema import check
from rmt_lightning.app.sweep import run_job
from rmt_lightning.core.errors import UserError
from rmt_lightning.core.run_folder import CHECKPOINTS, CONFIG, LAST, METRICS, claimed, locate
from rmt_lightning.reporting.redaction import public

# What follows takes seconds to import; --help and spelling mistakes should not have to wait for it.
if TYPE_CHECKING:
    import lightning as L
    from lightning.pytorch.loggers import Logger

    from rmt_lightning.app.build import Parts, TextParts

log = logging.getLogger("rmt_lightning.train")


@dataclass(frozen=True)
class Root:
    """The settings of conf/train.yaml that belong to no group."""

    seed: Annotated[int, Ge(0)]
    resume: str | None
    cache_dir: str


def main(config: DictConfig) -> float | None:
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        return run_job(config)
    folder = Path(HydraConfig.get().runtime.output_dir)
    start_logging(folder / f"{HydraConfig.get().job.name}.log", _is_first_process())
    source, checkpoint = locate(config.resume, "resume") if config.resume else (None, None)
    code = 1
    try:
        with claimed(folder) if _is_first_process() else nullcontext():
            if source:
                config = _resumed_config(source, config, HydraConfig.get().overrides.task)
            check(config, Root)
            if source != folder.resolve() and _is_first_process() and (folder / CONFIG).exists():
                raise UserError(
                    f"hydra.run.dir={os.path.relpath(folder)}: already holds a run; choose another folder, or go on "
                    f"with resume={os.path.relpath(folder)}"
                )
            if code := train(config, folder, source, checkpoint):
                sys.exit(code)
    finally:
        _leave_wandb(code)
        if _is_first_process() and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    return None


def train(config: DictConfig, folder: Path, source: Path | None, checkpoint: Path | None) -> int:
    """Train, or go on training from a checkpoint of the run in `source`; then test. Returns the exit code."""
    from hydra.utils import instantiate

    from rmt_lightning.app.build import build_run, save_architecture
    from rmt_lightning.app.results import draw_attention, report
    from rmt_lightning.training.callbacks.checkpoints import RunCheckpoints, check_fits, read_newest
    from rmt_lightning.training.callbacks.hardware import Hardware, describe
    from rmt_lightning.training.callbacks.progress import CurriculumProgress
    from rmt_lightning.training.callbacks.wandb_run import StageRecords, WandbRun
    from rmt_lightning.training.phases.curriculum import Curriculum
    from rmt_lightning.training.phases.state_passing import StatePassing

    shown = os.path.relpath(folder)
    checkpoint, saved = read_newest(checkpoint) if checkpoint else (None, None)
    parts = build_run(config, run=source, trained=saved is not None)
    curriculum: Curriculum = instantiate(config.curriculum, _convert_="all")
    hold: StatePassing | None = instantiate(config.get("hold"), curriculum=curriculum)
    phases: list[Curriculum] = [curriculum, hold] if hold else [curriculum]
    if saved and checkpoint:
        check_fits(parts.module, saved["state_dict"], checkpoint)
        for phase in phases:
            if phase.state_key in saved["callbacks"]:
                phase.load_state_dict(saved["callbacks"][phase.state_key])
    checkpoints = RunCheckpoints(folder / CHECKPOINTS, curriculum)
    logger: Logger | None = instantiate(config.logger, save_dir=folder) if "_target_" in config.logger else None
    callbacks = [*phases, checkpoints, CurriculumProgress(phases[-1]), Hardware(folder)]
    if isinstance(logger, WandbRun):
        callbacks.append(StageRecords(logger, curriculum))
    trainer = _trainer(config, folder, callbacks, logger)
    test = instantiate(config.test, _convert_="all")

    # Nothing has been written so far, and all that can be wrong with the settings has been found.
    if _is_first_process():
        OmegaConf.save(config, folder / CONFIG, resolve=True)
    save_architecture(parts, folder)
    if logger:
        logger.log_hyperparams(public(OmegaConf.to_container(config, resolve=True)) | {"hardware": describe(trainer)})
    if saved and phases[-1].finished:
        log.info("%s has finished training; testing it again", shown)
        parts.module.load_state_dict(saved["state_dict"])
    elif code := _fit(trainer, parts, checkpoint, folder):
        return code
    if not trainer.is_global_zero:
        return 0
    if isinstance(logger, WandbRun):
        draw_attention(folder, trainer, parts)
    report(test, folder, trainer, parts, curriculum, hold)
    if isinstance(logger, WandbRun):
        logger.log_results()
    if phases[-1].finished:
        return 0
    if trainer.global_step == trainer.max_steps:
        log.info("stopped by trainer.max_steps=%d; raise it and go on with resume=%s", trainer.max_steps, shown)
        return 0
    log.error(
        "stage %d did not converge: raise curriculum.steps and go on with resume=%s, lower curriculum.threshold, "
        "or set curriculum.when_stuck=continue", parts.data.num_segments, shown,
    )  # fmt: skip
    return 1


def _fit(trainer: L.Trainer, parts: Parts | TextParts, checkpoint: Path | None, folder: Path) -> int:
    """Run the trainer to its end (0), or until a signal or a loss that is no number stops it."""
    from rmt_lightning.training.callbacks.checkpoints import Interrupted
    from rmt_lightning.training.callbacks.ranks import together
    from rmt_lightning.training.module import Diverged

    try:
        with together(trainer, os.path.relpath(folder)):
            trainer.fit(parts.module, parts.data, ckpt_path=checkpoint, weights_only=True)
    except Interrupted as interrupted:
        log.info("stopped by %s and saved; go on with resume=%s", interrupted, os.path.relpath(folder))
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


def _run_folder(resume: str | None, fresh: str) -> str:
    """Where a run goes: a resumed run stays where it is; one that goes on from an earlier stage gets a new folder."""
    if resume is None:
        return fresh
    run, checkpoint = locate(resume, "resume")
    if checkpoint is None or checkpoint.name == LAST:
        return os.path.relpath(run)
    # The task that a fresh run would be named after is not that of this one.
    return f"{fresh.rpartition('-')[0]}-{checkpoint.stem}-of-{run.name}"


def _resumed_config(source: Path, composed: DictConfig, overrides: list[str]) -> DictConfig:
    """The config of an earlier run, with what the command line changes of it; hold=… may be added to it."""
    config = saved_config(source)
    OmegaConf.set_struct(config, True)
    for override in overrides:
        key, _, value = override.lstrip("+").partition("=")
        group = key.split(".")[0]
        if key == "resume":
            continue
        if group == "hold":
            if not (config.get("hold") and composed.get("hold")):
                OmegaConf.update(config, "hold", composed.get("hold"), force_add=True)
            elif key != group:
                config.merge_with_dotlist([f"{key}={value}"])
            continue
        if group in ("task", "backbone", "experiment") or isinstance(OmegaConf.select(config, key), DictConfig):
            raise UserError(f"{override}: a resumed run keeps its {group}; start a new run to change it")
        config.merge_with_dotlist([f"{key}={value}"])
    return config


def _trainer(config: DictConfig, folder: Path, callbacks: list[L.Callback], logger: Logger | None) -> L.Trainer:
    import torch
    from hydra.utils import instantiate
    from lightning.pytorch.loggers import CSVLogger

    from rmt_lightning.training.callbacks.checkpoints import AtomicCheckpointIO

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
        # Keys are sharded by the data module, and the curriculum must not see an untrained validation.
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    return trainer


def _is_first_process() -> bool:
    # One of these is more than 0 in every other process that Lightning, torchrun or SLURM has started.
    return all(int(os.environ.get(name, 0)) == 0 for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"))


def _leave_wandb(code: int) -> None:
    """Tell W&B how the run has ended; another run of this process would go on in it otherwise."""
    if "wandb" in sys.modules:
        import wandb

        wandb.finish(exit_code=code)


OmegaConf.register_new_resolver("run_folder", _run_folder, replace=True)
run = front_door(main, "train")

if __name__ == "__main__":
    # By its name, so that the launchers of sweeps can pickle it.
    from rmt_lightning.train import run

    run()
