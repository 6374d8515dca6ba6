"""Front door: `python -m rmt_lightning.export checkpoint=<run folder or checkpoint> folder=<where to>`.

The folder is what `from_pretrained` opens: config.json, model.safetensors, the tokenizer, backbone/ and, for a model
that was trained to choose between answers, head.safetensors. README.md is its model card, of what the run folder tells.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from rmt_lightning.app.hydra_errors import front_door
from rmt_lightning.app.schema import check
from rmt_lightning.app.trust import Trust
from rmt_lightning.core.errors import UserError
from rmt_lightning.core.files import beside, removed
from rmt_lightning.core.run_folder import locate_checkpoint


@dataclass(frozen=True)
class Root:
    """The settings of conf/export.yaml."""

    checkpoint: str
    folder: str
    merge: bool
    trust: Trust


def main(config: DictConfig) -> None:
    check(config, Root)
    folder = Path(config.folder)
    if os.path.lexists(folder):
        raise UserError(f"folder={config.folder}: is there already; choose another")
    run, checkpoint = locate_checkpoint(config.checkpoint)
    export(run, checkpoint, folder, config.merge, config.trust)


def export(run: Path, checkpoint: Path, folder: Path, merge: bool, trust: Trust) -> None:
    """Write the folder, whole or not at all; `merge` adds adapters to the weights that they stand beside."""
    from rmt_lightning.app.build import open_trained
    from rmt_lightning.app.card import told
    from rmt_lightning.models.adapters import merge_all
    from rmt_lightning.models.answerer import Answerer

    trained = open_trained(run, checkpoint, trust)
    if merge:
        merge_all(trained)
    partial = beside(folder)
    try:
        model = trained.model if isinstance(trained, Answerer) else trained
        page = told(run, checkpoint, trust, model.text_length)
        trained.save_pretrained(partial, model_card_kwargs=page)
        os.rename(partial, folder)
    except OSError as error:
        raise UserError(f"folder={folder}: cannot be written to ({error.strerror}); choose another") from None
    finally:
        removed(partial)
    place = json.dumps(str(folder), ensure_ascii=False)
    print(f"written; open it with rmt_lightning.{type(trained).__name__}.from_pretrained({place})")


run = front_door(main, "export")

if __name__ == "__main__":
    run()
