"""From a checked config to the objects of a run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
from filelock import FileLock
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn
from transformers import PreTrainedTokenizerBase

from rmt_lightning.errors import UserError
from rmt_lightning.models.answerer import Answerer
from rmt_lightning.models.backbone import Backbone, Restored, parts_for
from rmt_lightning.models.segment_model import SegmentModel
from rmt_lightning.run_folder import BACKBONE, CONFIG, TOKENIZER
from rmt_lightning.tasks.datamodule import FactDataModule
from rmt_lightning.tasks.facts import Task
from rmt_lightning.tasks.noise import SPLITS, Noise, tokenise
from rmt_lightning.tasks.placement import Key, Placement
from rmt_lightning.training.checkpoints import check_fits, read_checkpoint
from rmt_lightning.training.classification import FactModule


@dataclass(frozen=True)
class Parts:
    """What a run is made of."""

    tokenizer: PreTrainedTokenizerBase
    data: FactDataModule
    classifier: FactModule


def build(
    config: DictConfig, run: Path | None = None, trained: bool = False, answers: Sequence[str] | None = None
) -> Parts:
    """Build tokenizer, data and model from a checked config.

    Args:
        config: the composed config of a run.
        run: folder of an earlier run to go on with; its tokenizer is used if it has left one.
        trained: whether weights of that run are about to be loaded, so that pretrained ones are not needed.
        answers: the classes of those weights, if they are not the task's.

    Raises:
        UserError: if something cannot be built.
    """
    L.seed_everything(config.seed, verbose=False)
    task: Task = instantiate(config.task, _convert_="all")
    noise: Noise = instantiate(config.noise, _convert_="all")
    fresh: Backbone = instantiate(config.backbone, _convert_="all")
    earlier = Restored(run / TOKENIZER, run / BACKBONE) if run and (run / TOKENIZER).is_dir() else None
    tokenizer = (earlier or fresh).tokenizer(_all_sentences(task, noise))
    model = _model(config.model, earlier if earlier and trained else fresh, tokenizer)
    corpora = tokenise(noise, tokenizer, config.cache_dir)
    placement = Placement(task, corpora, tokenizer, model.text_length, config.seed)
    for split in SPLITS:
        placement.sample(split, Key(num_segments=1, number=0))
    return Parts(
        tokenizer,
        instantiate(config.data, placement=placement),
        instantiate(config.answer, _partial_=True)(
            model,
            answers or task.answers,
            instantiate(config.optim, _convert_="all"),
            config.curriculum.max_segments,
            config.seed,
        ),
    )


def _model(config: DictConfig, backbone: Backbone, tokenizer: PreTrainedTokenizerBase) -> SegmentModel[Any]:
    """Build the model, handing it of the backbone what its constructor asks for by name."""
    parts = parts_for(get_object(config._target_), backbone, tokenizer)
    model: SegmentModel[Any] = instantiate(config, _convert_="all", **parts)
    return model


def open_trained(run: Path, checkpoint: Path) -> Answerer | SegmentModel[Any]:
    """The model of one of a run's checkpoints, with its head if it was trained to choose between answers.

    Raises:
        UserError: if the checkpoint is damaged.
    """
    config = OmegaConf.load(run / CONFIG)
    saved = read_checkpoint(checkpoint)
    backbone = Restored(run / TOKENIZER, run / BACKBONE)
    model = _model(config.model, backbone, backbone.tokenizer([]))
    weights = {name: value for name, value in saved["state_dict"].items() if name.startswith(("model.", "head."))}
    whole: nn.Module = nn.ModuleDict({"model": model})
    if "head.weight" in weights:
        whole = Answerer(model, nn.Linear(model.width, len(saved["answers"])), saved["answers"])
    check_fits(whole, weights, checkpoint)
    whole.load_state_dict(weights)
    return whole if isinstance(whole, Answerer) else model


def load(config: DictConfig, run: Path, checkpoint: Path) -> Parts:
    """Build what a run has trained, and give it the weights of one of its checkpoints.

    Args:
        config: the run's config, perhaps with another task or noise.
        run: its folder.
        checkpoint: where the weights are.

    Raises:
        UserError: if the checkpoint is damaged, or the model does not know the task's answers.
    """
    saved = read_checkpoint(checkpoint)
    known = saved["answers"]
    parts = build(config, run, trained=True, answers=known)
    task = parts.data.placement.task
    if unknown := [answer for answer in task.answers if answer not in known]:
        raise UserError(
            f"task={task.name}: the model does not know the answers {', '.join(unknown)}; it knows {', '.join(known)}"
        )
    check_fits(parts.classifier, saved["state_dict"], checkpoint)
    parts.classifier.load_state_dict(saved["state_dict"])
    return parts


def save_architecture(parts: Parts, folder: Path) -> None:
    """Leave tokenizer and backbone config in a run folder, each whole or not at all, to open its checkpoints with."""
    for name, part in ((TOKENIZER, parts.tokenizer), (BACKBONE, parts.classifier.model.architecture)):
        with FileLock(folder / f".{name}.lock"):
            if part is None or (folder / name).exists():
                continue
            partial = folder / f".{name}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            part.save_pretrained(partial)
            os.rename(partial, folder / name)


def _all_sentences(task: Task, noise: Noise) -> Iterator[str]:
    yield from task.sentences()
    for document in noise.documents("train"):
        yield from document
