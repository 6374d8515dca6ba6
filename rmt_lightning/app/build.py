"""From a checked config to the objects of a run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from filelock import FileLock
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig
from torch import nn
from transformers import PreTrainedTokenizerBase

from rmt_lightning.analysis.extrapolation import LengthTest
from rmt_lightning.analysis.perplexity import DocumentTest
from rmt_lightning.app.resume import saved_config
from rmt_lightning.core.errors import UserError
from rmt_lightning.core.run_folder import BACKBONE, TOKENIZER
from rmt_lightning.models.answerer import Answerer
from rmt_lightning.models.backbone import Backbone, Restored, parts_for
from rmt_lightning.models.segment_model import SegmentModel
from rmt_lightning.tasks.datamodule import FactDataModule
from rmt_lightning.tasks.facts import Split, Task
from rmt_lightning.tasks.language import DocumentDataModule, LanguageModeling, RunningText
from rmt_lightning.tasks.noise import SPLITS, Corpus, Noise, tokenise
from rmt_lightning.tasks.placement import Key, Placement
from rmt_lightning.training.callbacks.checkpoints import check_fits, read_checkpoint
from rmt_lightning.training.classification import FactModule
from rmt_lightning.training.language_modeling import LanguageModeler
from rmt_lightning.training.phases.curriculum import FixedSteps, SegmentCurriculum


@dataclass(frozen=True)
class Parts:
    """What a run on facts is made of."""

    tokenizer: PreTrainedTokenizerBase
    data: FactDataModule
    classifier: FactModule

    @property
    def module(self) -> FactModule:
        """What is trained."""
        return self.classifier


@dataclass(frozen=True)
class TextParts:
    """What a run on running text is made of."""

    tokenizer: PreTrainedTokenizerBase
    data: DocumentDataModule
    module: LanguageModeler


def build_run(config: DictConfig, run: Path | None = None, trained: bool = False) -> Parts | TextParts:
    """Build what a training run needs, by its task; arguments as of `build`.

    Raises:
        UserError: if something cannot be built, choices do not go together, or there is too little text.
    """
    if issubclass(get_object(config.task._target_), LanguageModeling):
        _check_choices(config, {"data": DocumentDataModule, "curriculum": FixedSteps, "test": DocumentTest})
        if config.get("hold"):
            raise UserError("hold=state_passing: asks questions, which running text has not; leave it out")
        return _build_text(config, run, trained)
    _check_choices(config, {"data": FactDataModule, "curriculum": SegmentCurriculum, "test": LengthTest})
    parts = build(config, run, trained)
    model = parts.classifier.model
    model.fitting("curriculum.max_segments", [config.curriculum.max_segments])
    model.fitting("test.segments", config.test.segments)
    if config.get("hold") and model.max_segments is not None:
        raise UserError("hold=state_passing: this model keeps the whole text and has no memory to hold; leave it out")
    _check_noise(parts, config.curriculum.max_segments)
    return parts


def build(
    config: DictConfig, run: Path | None = None, trained: bool = False, answers: Sequence[str] | None = None
) -> Parts:
    """Build tokenizer, data and model of a fact task from a checked config.

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
    tokenizer, model, corpora = _foundation(config, run, trained, task.sentences())
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


def _build_text(config: DictConfig, run: Path | None, trained: bool) -> TextParts:
    L.seed_everything(config.seed, verbose=False)
    tokenizer, model, corpora = _foundation(config, run, trained)
    texts = {split: RunningText(corpora[split], tokenizer, model.text_length, config.seed) for split in SPLITS}
    modeler = LanguageModeler(model, instantiate(config.optim, _convert_="all"), config.seed)
    return TextParts(tokenizer, instantiate(config.data, texts=texts), modeler)


def _foundation(
    config: DictConfig, run: Path | None, trained: bool, sentences: Iterable[str] = ()
) -> tuple[PreTrainedTokenizerBase, SegmentModel[Any], dict[Split, Corpus]]:
    """What every run stands on: a tokenizer, which may have to learn `sentences` too, a model and tokenised text."""
    noise: Noise = instantiate(config.noise, _convert_="all")
    fresh: Backbone = instantiate(config.backbone, _convert_="all")
    earlier = Restored(run / TOKENIZER, run / BACKBONE) if run and (run / TOKENIZER).is_dir() else None
    text = chain(sentences, chain.from_iterable(noise.documents("train")))
    tokenizer = (earlier or fresh).tokenizer(text)
    model = _model(config.model, earlier if earlier and trained else fresh, tokenizer)
    return tokenizer, model, tokenise(noise, tokenizer, config.cache_dir)


def _check_choices(config: DictConfig, wanted: dict[str, type]) -> None:
    for group, kind in wanted.items():
        given = get_object(config[group]._target_)
        if not issubclass(given, kind):
            task = get_object(config.task._target_).name
            raise UserError(
                f"{group}: a {given.__name__} does not go with task={task}, which needs a {kind.__name__}; leave out "
                f"{group}=…"
            )


def _check_noise(parts: Parts, max_segments: int) -> None:
    needed = max_segments * parts.classifier.model.text_length
    for split, corpus in parts.data.placement.corpora.items():
        if len(corpus.tokens) < needed:
            raise UserError(
                f"noise: has {len(corpus.tokens)} tokens for {split}, fewer than the {needed} of one sample of "
                f"{max_segments} segments; give more text or lower curriculum.max_segments"
            )


def _model(config: DictConfig, backbone: Backbone, tokenizer: PreTrainedTokenizerBase) -> SegmentModel[Any]:
    """Build the model, handing it of the backbone what its constructor asks for by name."""
    parts = parts_for(get_object(config._target_), backbone, tokenizer)
    if "update" in config:
        # Only the model knows how wide its memory is.
        parts["update"] = instantiate(config["update"], _partial_=True, _convert_="all")
    model: SegmentModel[Any] = instantiate(config, _convert_="all", **parts)
    return model


def open_trained(run: Path, checkpoint: Path) -> Answerer | SegmentModel[Any]:
    """The model of one of a run's checkpoints, with its head if it was trained to choose between answers.

    Raises:
        UserError: if the checkpoint is damaged.
    """
    config = saved_config(run)
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
        UserError: if the checkpoint is damaged or of a language model, or the model does not know the task's answers.
    """
    saved = read_checkpoint(checkpoint)
    if "answers" not in saved:
        raise UserError(
            f"{checkpoint}: holds a language model, which knows no answers; its run's evaluation.csv has its perplexity"
        )
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


def save_architecture(parts: Parts | TextParts, folder: Path) -> None:
    """Leave tokenizer and backbone config in a run folder, each whole or not at all, to open its checkpoints with."""
    for name, part in ((TOKENIZER, parts.tokenizer), (BACKBONE, parts.module.model.architecture)):
        with FileLock(folder / f".{name}.lock"):
            if part is None or (folder / name).exists():
                continue
            partial = folder / f".{name}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            part.save_pretrained(partial)
            os.rename(partial, folder / name)
