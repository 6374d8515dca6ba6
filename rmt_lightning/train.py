"""Front door: `python -m rmt_lightning.train task=detect curriculum.max_segments=7`.

A run folder holds config.yaml, train.log, tokenizer/, backbone/, metrics/, checkpoints/ and, at the end, stages.csv,
evaluation.csv and curriculum.png.
"""

from __future__ import annotations

import csv
import logging
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from rmt_lightning.config import front_door
from rmt_lightning.console import start_logging
from rmt_lightning.errors import UserError

# What follows takes seconds to import; --help and spelling mistakes should not have to wait for it.
if TYPE_CHECKING:
    import lightning as L

    from rmt_lightning.analysis.extrapolation import LengthResult
    from rmt_lightning.build import Parts
    from rmt_lightning.training.curriculum import SegmentCurriculum

log = logging.getLogger(__name__)

CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"


def main(config: DictConfig) -> None:
    folder = Path(HydraConfig.get().runtime.output_dir)
    start_logging(folder / f"{HydraConfig.get().job.name}.log", _is_first_process())
    source, checkpoint = _origin(config.resume, folder)
    try:
        if source:
            config = _resumed_config(source, HydraConfig.get().overrides.task)
        if source != folder and _is_first_process() and (folder / CONFIG).exists():
            raise UserError(
                f"hydra.run.dir={folder}: already holds a run; go on with it by resume={folder}, or choose another folder"
            )
        sys.exit(train(config, folder, source, checkpoint))
    finally:
        if _is_first_process() and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def train(config: DictConfig, folder: Path, source: Path | None, checkpoint: Path | None) -> int:
    """Train, or go on training from a checkpoint of the run in `source`; then test. Returns the exit code."""
    from rmt_lightning.build import build, save_architecture
    from rmt_lightning.training.checkpoints import LAST, Interrupted, RunCheckpoints, check_fits, read_checkpoint
    from rmt_lightning.training.classification import Diverged
    from rmt_lightning.training.progress import CurriculumProgress

    saved = read_checkpoint(checkpoint) if checkpoint else None
    parts = build(config, run=source, trained=saved is not None)
    curriculum = _instantiate(config.curriculum)
    if saved and checkpoint:
        check_fits(parts.classifier, saved["state_dict"], checkpoint)
        curriculum.load_state_dict(saved["callbacks"]["SegmentCurriculum"])

    if _is_first_process():
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(config, folder / CONFIG, resolve=True)
    save_architecture(parts, folder)
    checkpoints = RunCheckpoints(folder / CHECKPOINTS, curriculum)
    trainer = _trainer(config, folder, [curriculum, checkpoints, CurriculumProgress(curriculum)])
    last = folder / CHECKPOINTS / LAST
    if saved and curriculum.finished:
        log.info("%s has finished training; testing it again", source)
        parts.classifier.load_state_dict(saved["state_dict"])
    else:
        try:
            trainer.fit(parts.classifier, parts.data, ckpt_path=checkpoint, weights_only=True)
        except Interrupted as interrupted:
            log.info("stopped by %s and saved; go on with resume=%s", interrupted, folder)
            return 128 + interrupted.signum
        except Diverged as error:
            good = f"the last good checkpoint is {last}" if last.exists() else "no checkpoint had been written yet"
            print(f"error: {error}; {good}", file=sys.stderr)
            return 1
    if not trainer.is_global_zero:
        return 0
    _report(config, folder, trainer, parts, curriculum)
    if not curriculum.finished:
        stage = parts.data.num_segments
        log.error(
            "stage %d did not converge: raise curriculum.steps and go on with resume=%s, lower curriculum.threshold, "
            "or set curriculum.when_stuck=continue", stage, folder,
        )  # fmt: skip
        return 1
    return 0


def _origin(resume: str | None, folder: Path) -> tuple[Path | None, Path | None]:
    """The run to go on with and its checkpoint, if it has written one already."""
    if resume is None:
        return None, None
    path = Path(resume)
    if path.is_file():
        return path.parent.parent, path
    last = path / CHECKPOINTS / "last.ckpt"
    return path, last if last.exists() else None


def _run_folder(resume: str | None, fresh: str) -> str:
    """Where a run goes: a resumed run stays where it is, one that goes on from an earlier stage gets a folder of its own."""
    if resume is None:
        return fresh
    path = Path(resume)
    run = path if path.is_dir() else path.parent.parent
    if not path.exists() or not (run / CONFIG).exists():
        raise UserError(f"resume={resume}: no run there; give a run folder or one of its checkpoints/*.ckpt")
    return str(run) if path.is_dir() or path.name == "last.ckpt" else fresh


def _resumed_config(source: Path, overrides: list[str]) -> DictConfig:
    """The config of an earlier run, with what the command line changes of it."""
    config = OmegaConf.load(source / CONFIG)
    assert isinstance(config, DictConfig)
    OmegaConf.set_struct(config, True)
    for override in overrides:
        key, _, value = override.lstrip("+").partition("=")
        if key == "resume":
            continue
        if isinstance(OmegaConf.select(config, key, default=None), DictConfig) or key == "experiment":
            raise UserError(f"{override}: a resumed run keeps its {key}; start a new run to change it")
        OmegaConf.update(config, key, OmegaConf.create({"value": value} if not value else f"value: {value}").value)
    return config


def _instantiate(node: DictConfig) -> SegmentCurriculum:
    from hydra.utils import instantiate

    curriculum: SegmentCurriculum = instantiate(node)
    return curriculum


def _trainer(config: DictConfig, folder: Path, callbacks: list[L.Callback]) -> L.Trainer:
    import torch
    from hydra.utils import instantiate
    from lightning.pytorch.loggers import CSVLogger

    from rmt_lightning.training.checkpoints import AtomicCheckpointIO

    loggers = [CSVLogger(folder, name="metrics", flush_logs_every_n_steps=config.data.steps_per_epoch)]
    if "_target_" in config.logger:
        loggers.append(instantiate(config.logger))
    on_gpu = config.trainer.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    trainer: L.Trainer = instantiate(
        config.trainer,
        precision=config.trainer.precision or ("bf16-mixed" if on_gpu else "32-true"),
        max_epochs=-1,
        default_root_dir=folder,
        callbacks=callbacks,
        logger=loggers,
        plugins=[AtomicCheckpointIO()],
        # Keys are sharded by the data module, and the curriculum must not see an untrained validation.
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    return trainer


def _report(config: DictConfig, folder: Path, trainer: L.Trainer, parts: Parts, curriculum: SegmentCurriculum) -> None:
    """Test the run on longer and longer inputs; print and save what it has learnt."""
    from rich import get_console
    from rich.progress import track
    from rich.table import Table

    from rmt_lightning.analysis import figures
    from rmt_lightning.analysis.extrapolation import evaluate_length

    console = get_console()
    table = Table("stage", "segments", "steps", "seconds", "accuracy", title="Curriculum")
    for stage in curriculum.results:
        mark = "" if stage.converged else " (not converged)"
        segments = str(stage.stage) if curriculum.lengths == "exact" or stage.stage == 1 else f"1–{stage.stage}"
        accuracy = f"{stage.accuracy:.4f}{mark}"
        table.add_row(str(stage.stage), segments, str(stage.steps), f"{stage.seconds:.1f}", accuracy)
    console.print(table)
    _write_csv(folder / "stages.csv", [asdict(stage) for stage in curriculum.results])

    device = trainer.strategy.root_device
    classifier = parts.classifier.to(device).eval()
    lengths: list[LengthResult] = []
    with trainer.precision_plugin.forward_context():
        for n in track(config.test.segments, "testing", console=console, transient=True, disable=not console.is_terminal):
            samples, batch = config.test.samples, 2 * config.data.batch_size
            lengths.append(evaluate_length(classifier, parts.data, n, samples, batch, device))
    text_length = parts.classifier.model.text_length
    table = Table("segments", "tokens of text", "accuracy", "95% interval", title=f"Test on {config.test.samples} samples")
    for result in lengths:
        low, high = result.interval
        tokens = f"{result.segments * text_length:,}"
        table.add_row(str(result.segments), tokens, f"{result.accuracy:.4f}", f"{low:.3f} – {high:.3f}")
    console.print(table)
    rows = [asdict(r) | {"accuracy": r.accuracy, "low": r.interval[0], "high": r.interval[1]} for r in lengths]
    _write_csv(folder / "evaluation.csv", rows)
    answers = len(parts.data.placement.task.answers)
    name = parts.data.placement.task.name
    figure = figures.curriculum(curriculum.history, lengths, curriculum.results[-1].stage, 1 / answers, f"task={name}")
    figure.savefig(folder / "curriculum.png", dpi=150)
    console.print(
        f"Everything is in [bold]{os.path.relpath(folder)}[/]: config.yaml, {HydraConfig.get().job.name}.log, tokenizer/, "
        "metrics/ (csv), checkpoints/stage-<n>.ckpt and last.ckpt, stages.csv, evaluation.csv, curriculum.png",
        highlight=False,
    )


def _write_csv(path: Path, rows: list[dict[str, object]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _is_first_process() -> bool:
    return int(os.environ.get("LOCAL_RANK", 0)) == 0 and int(os.environ.get("NODE_RANK", 0)) == 0


def _wandb_has_no_key() -> bool:
    """Without a key wandb would ask for one, or fail."""
    import wandb

    return not (os.environ.get("WANDB_API_KEY") or wandb.api.api_key)


OmegaConf.register_new_resolver("run_folder", _run_folder, replace=True)
OmegaConf.register_new_resolver("run_dir", lambda: HydraConfig.get().runtime.output_dir, replace=True)
OmegaConf.register_new_resolver("wandb_has_no_key", _wandb_has_no_key, replace=True)
run = front_door(main, "train")

if __name__ == "__main__":
    run()
