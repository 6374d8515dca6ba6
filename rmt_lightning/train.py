"""Front door: `python -m rmt_lightning.train task=detect curriculum.max_segments=7`.

A run folder holds config.yaml, overrides.yaml, hardware.json, text.json, train.log, tokenizer/, backbone/, metrics/,
checkpoints/, phases.json, stages.csv and, at the end, evaluation.csv and curriculum.png; for a language model
evaluation.csv, documents.csv and perplexity.png.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from annotated_types import Ge, Le
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from rmt_lightning.app.console import start_logging
from rmt_lightning.app.hydra_errors import front_door
from rmt_lightning.app.processes import is_first_process
from rmt_lightning.app.resume import check_folder, check_place, composed_again, overrides, run_folder
from rmt_lightning.app.schema import check
from rmt_lightning.app.sweep import run_job
from rmt_lightning.app.trust import Trust, check_savable, check_trust
from rmt_lightning.core.run_folder import claimed, locate


@dataclass(frozen=True)
class Root:
    """The settings of conf/train.yaml that belong to no group."""

    seed: Annotated[int, Ge(0), Le(2**32 - 1)]  # NumPy's limit
    resume: str | None
    cache_dir: str
    trust: Trust


def main(config: DictConfig) -> float | None:
    hydra = HydraConfig.get()
    if hydra.mode == RunMode.MULTIRUN:
        return run_job(config)
    folder, first = Path(hydra.runtime.output_dir), is_first_process()
    start_logging(folder / f"{hydra.job.name}.log", first)
    source, checkpoint = locate(config.resume, "resume") if config.resume else (None, None)
    if first:
        check_place(folder, source)
    with claimed(folder) if first else nullcontext():
        check(config, Root)
        check_trust(config.trust)
        check_savable(OmegaConf.to_container(config, resolve=True))
        if first:
            check_folder(config, folder, source, checkpoint, overrides(hydra))
        # It takes seconds to import; spelling mistakes should not have to wait for it.
        from rmt_lightning.app.training import train

        if code := train(config, folder, source, checkpoint):
            sys.exit(code)
    return None


run = front_door(main, "train", composed_again)

# Once for each run, for it makes a folder.
OmegaConf.register_new_resolver("run_folder", run_folder, replace=True, use_cache=True)

if __name__ == "__main__":
    # By its name, so that the launchers of sweeps can pickle it.
    from rmt_lightning.train import run

    run()
