"""Front door: `python -m rmt_lightning.train task=detect curriculum.max_segments=7`.

A run folder holds config.yaml, overrides.yaml, hardware.json, train.log, tokenizer/, backbone/, metrics/, checkpoints/,
phases.json, stages.csv and, at the end, evaluation.csv and curriculum.png; for a language model evaluation.csv,
documents.csv and perplexity.png.
"""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from annotated_types import Ge
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from rmt_lightning.app.console import start_logging
from rmt_lightning.app.hydra_errors import front_door, told_in_one_line
from rmt_lightning.app.resume import check_resumed, composed_again, run_folder
from rmt_lightning.app.schema import check
from rmt_lightning.app.sweep import run_job
from rmt_lightning.core.errors import UserError
from rmt_lightning.core.run_folder import CONFIG, claimed, locate


@dataclass(frozen=True)
class Root:
    """The settings of conf/train.yaml that belong to no group."""

    seed: Annotated[int, Ge(0)]
    resume: str | None
    cache_dir: str


def main(config: DictConfig) -> float | None:
    hydra = HydraConfig.get()
    if hydra.mode == RunMode.MULTIRUN:
        return run_job(config)
    folder, first = Path(hydra.runtime.output_dir), _is_first_process()
    start_logging(folder / f"{hydra.job.name}.log", first)
    source, checkpoint = locate(config.resume, "resume") if config.resume else (None, None)
    code = 1
    try:
        with claimed(folder) if first else nullcontext():
            check(config, Root)
            if source:
                check_resumed(config, source, hydra.overrides.task)
            if source != folder.resolve() and first and (folder / CONFIG).exists():
                raise UserError(
                    f"hydra.run.dir={os.path.relpath(folder)}: already holds a run; choose another folder, or go on "
                    f"with resume={os.path.relpath(folder)}"
                )
            # It takes seconds to import; spelling mistakes should not have to wait for it.
            from rmt_lightning.app.training import train

            if code := train(config, folder, source, checkpoint):
                sys.exit(code)
    finally:
        _leave_wandb(code)
        if first and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    return None


def _is_first_process() -> bool:
    # One of these is more than 0 in every other process that Lightning, torchrun or SLURM has started.
    return all(int(os.environ.get(name, 0)) == 0 for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"))


def _leave_wandb(code: int) -> None:
    """Tell W&B how the run has ended; another run of this process would go on in it otherwise."""
    if "wandb" in sys.modules:
        import wandb

        wandb.finish(exit_code=code)


def run() -> None:
    with told_in_one_line("train"):
        sys.argv[1:] = composed_again(sys.argv[1:])
    front_door(main, "train")()


OmegaConf.register_new_resolver("run_folder", run_folder, replace=True)

if __name__ == "__main__":
    # By its name, so that the launchers of sweeps can pickle it.
    from rmt_lightning.train import run

    run()
