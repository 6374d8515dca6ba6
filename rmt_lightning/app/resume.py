"""The config of an earlier run."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from rmt_lightning.core.names import public_name
from rmt_lightning.core.run_folder import CONFIG


def saved_config(run: Path) -> DictConfig:
    """The resolved config of a run, whatever its classes were called, and wherever they stood, when it was written."""
    config = OmegaConf.load(run / CONFIG)
    assert isinstance(config, DictConfig)
    for part in config.values():
        if isinstance(part, DictConfig) and "_target_" in part:
            part._target_ = public_name(part._target_)
    return config


def trained_config(run: Path, asked: DictConfig) -> DictConfig:
    """The config of a run, with the task and the noise that `asked` names instead of its own."""
    config = saved_config(run)
    for group in ("task", "noise"):
        if group in asked:
            config[group] = asked[group]
    config.cache_dir = asked.cache_dir
    return config


def provenance(config: DictConfig, checkpoint: Path) -> dict[str, Any]:
    """What results depend on besides the settings of a front door: the checkpoint's content, the task and the noise."""
    return {
        "checkpoint": checkpoint.name,
        "sha256": hashlib.sha256(checkpoint.read_bytes()).hexdigest(),
        "task": OmegaConf.to_container(config.task),
        "noise": OmegaConf.to_container(config.noise),
    }
