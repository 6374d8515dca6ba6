"""From a checked config to the objects of a run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import lightning as L
import torch
from filelock import FileLock
from hydra.utils import instantiate
from omegaconf import DictConfig
from transformers import PreTrainedTokenizerBase

from rmt_lightning.errors import UserError
from rmt_lightning.models.backbone import Backbone, Restored
from rmt_lightning.models.rmt import RMTEncoder
from rmt_lightning.run_folder import BACKBONE, TOKENIZER
from rmt_lightning.tasks.datamodule import FactDataModule
from rmt_lightning.tasks.facts import Task
from rmt_lightning.tasks.noise import SPLITS, Noise, tokenise
from rmt_lightning.tasks.placement import Key, Placement
from rmt_lightning.training.checkpoints import check_fits, read_checkpoint
from rmt_lightning.training.classification import FactClassifier


@dataclass(frozen=True)
class Parts:
    """What a run is made of."""

    tokenizer: PreTrainedTokenizerBase
    data: FactDataModule
    classifier: FactClassifier


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
    encoder = (earlier if earlier and trained else fresh).encoder(tokenizer)
    model: RMTEncoder = instantiate(config.model, encoder=encoder)
    corpora = tokenise(noise, tokenizer, config.cache_dir)
    placement = Placement(task, corpora, tokenizer, model.text_length, config.seed)
    for split in SPLITS:
        placement.sample(split, Key(num_segments=1, number=0))
    return Parts(
        tokenizer,
        instantiate(config.data, placement=placement),
        FactClassifier(
            model,
            answers or task.answers,
            instantiate(config.optim, _convert_="all"),
            config.curriculum.max_segments,
            config.seed,
        ),
    )


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


def find_device(name: Literal["auto", "cpu", "cuda"]) -> tuple[torch.device, str]:
    """The device that is meant, and what it is called in results.

    Raises:
        UserError: if a GPU is asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda: torch finds no GPU; give cpu or auto")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu"), "cpu"
    return torch.device("cuda"), torch.cuda.get_device_name()


def save_architecture(parts: Parts, folder: Path) -> None:
    """Leave tokenizer and backbone config in a run folder, each whole or not at all, to open its checkpoints with."""
    model = parts.classifier.model.encoder.model
    for name, part in ((TOKENIZER, parts.tokenizer), (BACKBONE, model.config)):
        with FileLock(folder / f".{name}.lock"):
            if (folder / name).exists():
                continue
            partial = folder / f".{name}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            part.save_pretrained(partial)
            os.rename(partial, folder / name)


def _all_sentences(task: Task, noise: Noise) -> Iterator[str]:
    yield from task.sentences()
    for document in noise.documents("train"):
        yield from document
