"""From a checked config to the objects of a run."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

import lightning as L
import torch
from filelock import FileLock
from hydra.utils import get_object
from omegaconf import DictConfig
from torch import nn
from transformers import PreTrainedTokenizerBase

from rmt_lightning.app.own_parts import check_model
from rmt_lightning.app.resume import saved_config
from rmt_lightning.app.schema import check_parts, instantiate
from rmt_lightning.app.trust import Trust
from rmt_lightning.core.errors import UserError
from rmt_lightning.core.files import own_file, removed
from rmt_lightning.core.run_folder import TOKENIZER
from rmt_lightning.models.adapters import Finetuning
from rmt_lightning.models.answerer import Answerer
from rmt_lightning.models.backbone import Transformer
from rmt_lightning.models.pretrained import check_reopens
from rmt_lightning.models.segment_model import SegmentModel
from rmt_lightning.models.sources import Backbone, Restored, parts_for
from rmt_lightning.models.tiny import TrainingText
from rmt_lightning.tasks.corpus import Corpus, text_digest, tokenize
from rmt_lightning.tasks.facts import Finite, Split, Task, check_task, questions_digest
from rmt_lightning.tasks.noise import Noise, counted, fingerprint_of
from rmt_lightning.tasks.placement import Key, Placement
from rmt_lightning.training.answering import FactModule
from rmt_lightning.training.callbacks.checkpoints import check_fits, read_checkpoint
from rmt_lightning.training.phases.phase import Phases


@dataclass(frozen=True)
class Foundation:
    """What every run stands on: a tokenizer, a model, and tokenized text."""

    tokenizer: PreTrainedTokenizerBase
    model: SegmentModel[Any]
    corpora: dict[Split, Corpus]


def build_foundation(config: DictConfig, run: Path | None, trained: bool, sentences: Iterable[str] = ()) -> Foundation:
    """Build what every run stands on.

    Args:
        config: the composed config of a run.
        run: folder of an earlier run to go on with; its tokenizer is used, which only a run without weights may lack.
        trained: whether weights of that run are about to be loaded, so that pretrained ones are not needed.
        sentences: what a tokenizer that is trained on the spot has to learn beside the noise.

    Raises:
        UserError: if something cannot be built.
    """
    L.seed_everything(config.seed, verbose=False)
    noise: Noise = instantiate(config.noise, _convert_="all")
    fresh: Backbone = instantiate(config.backbone, _convert_="all")
    # Weights know the tokens of one tokenizer alone.
    earlier = Restored(run) if run and (trained or (run / TOKENIZER).is_dir()) else None
    to_learn = list(sentences)
    text = TrainingText(
        chain(to_learn, chain.from_iterable(counted(noise.documents("train"), "train"))),
        lambda: f"{fingerprint_of(noise)} {to_learn}",
        config.cache_dir,
    )
    tokenizer = (earlier or fresh).tokenizer(text)
    model = _model(config, earlier if earlier and trained else fresh, tokenizer)
    return Foundation(tokenizer, model, tokenize(noise, tokenizer, config.cache_dir))


def construct(config: DictConfig, **given: Any) -> Any:
    """Build a part of a run with what the run gives it beside its settings.

    Raises:
        UserError: if one of the settings would be overridden by that.
    """
    for name in given:
        if name in config:
            raise UserError(f"{config._get_full_key(name)}: is set by the run itself; leave it out")
    return instantiate(config, _convert_="all", **given)


def _model(config: DictConfig, backbone: Backbone, tokenizer: PreTrainedTokenizerBase) -> SegmentModel[Any]:
    """Build the model of a run, handing it of the backbone what its constructor asks for by name."""
    own = config.model
    parts = parts_for(get_object(own._target_), backbone, tokenizer)
    if "update" in own:
        # Only the model knows how wide its memory is.
        width = next(iter(inspect.signature(get_object(own["update"]._target_)).parameters))
        if width in own["update"]:
            raise UserError(f"model.update.{width}: is set by the run itself; leave it out")
        parts["update"] = instantiate(own["update"], _partial_=True, _convert_="all")
    model: SegmentModel[Any] = instantiate(own, _convert_="all", **parts)
    check_model(model)
    choose_trained(config, model)
    return model


def choose_trained(config: DictConfig, model: nn.Module) -> None:
    """Let finetune= choose which weights of the backbone are trained, and put adapters into it.

    Raises:
        UserError: if there is no backbone, or no layer for them.
    """
    for group in finetunings(config):
        backbones = [part.model for part in model.modules() if isinstance(part, Transformer)]
        if not backbones:
            raise UserError(f"finetune={group}: a {type(model).__name__} has no backbone; leave it out")
        check_parts(config, [group])
        finetuning: Finetuning = instantiate(config[group], _convert_="all")
        finetuning(*backbones)


def finetunings(config: DictConfig) -> list[str]:
    """Where a config has what finetune= has chosen: nowhere if the whole backbone is trained."""
    parts = {str(name): part for name, part in config.items() if isinstance(part, DictConfig) and "_target_" in part}
    kinds = {name: get_object(part._target_) for name, part in parts.items()}
    return [name for name, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, Finetuning)]


def build_answering(
    config: DictConfig,
    run: Path | None = None,
    trained: bool = False,
    answers: Sequence[str] | None = None,
    phases: Phases | None = None,
) -> tuple[Placement, FactModule]:
    """Build samples of a fact task, and what answers them; other arguments as of `build_foundation`.

    Args:
        answers: what the weights that are about to be loaded can answer, if that is not what the task does.
        phases: what the module is led through; None if it is not trained.

    Raises:
        UserError: if something cannot be built.
    """
    task: Task = instantiate(config.task, _convert_="all")
    check_task(task)
    base = build_foundation(config, run, trained, task.sentences())
    placement = Placement(task, base.corpora, base.tokenizer, base.model.text_length, config.seed)
    placement.check_words()
    # Earlier versions had no metrics in their configs, and what is not trained needs none.
    metrics = instantiate(config.metrics, _convert_="all") if phases else {}
    module: FactModule = construct(
        config.answer,
        model=base.model,
        answers=answers or task.answers,
        phases=phases,
        metrics=metrics,
        optimization=None,
    )
    return placement, module


def text_names(corpora: Mapping[Split, Corpus], task: Task | None) -> dict[str, str]:
    """What names the text of a run, and the questions if they are read from files."""
    names = {"sha256": text_digest(corpora)}
    if isinstance(task, Finite):
        names["questions"] = questions_digest(task)
    return names


def testable(key: str, lengths: Sequence[Key], model: SegmentModel[Any], placement: Placement) -> list[Key]:
    """Those of the lengths that the model can read and that have room for questions.

    Args:
        key: what stands before `segments` and `tokens` in the names of the settings that hold the lengths.

    Raises:
        UserError: if there are none; naming the setting, if the model can read none.
    """
    sizes = {like: placement.longest("test", like) for like in lengths}
    readable = [like for like in lengths if model.max_segments is None or sizes[like] <= model.max_segments]
    if not readable and all(like.tokens is None for like in lengths):
        model.fitting(f"{key}segments", [*sizes.values()])
    if not readable:
        raise UserError(
            f"{key}tokens: too long for positions; at most {model.max_segments} segments of {model.text_length} tokens "
            "fit; give fewer"
        )
    found = [like for like in readable if placement.fits("test", like)]
    return found or [like for like in readable[-1:] if placement.asked("test", None, like)]


class Trained(NamedTuple):
    """What a run has trained.

    Attributes:
        placement: makes the samples to ask it about.
        module: with the weights of a checkpoint.
        sha256: of that checkpoint's file.
    """

    placement: Placement
    module: FactModule
    sha256: str


def load(config: DictConfig, run: Path, checkpoint: Path) -> Trained:
    """Build what a run has trained, give it the weights of one of its checkpoints, and the samples to ask it about.

    Args:
        config: the run's config, perhaps with another task or noise.
        run: its folder.
        checkpoint: where the weights are.

    Raises:
        UserError: if the checkpoint is damaged or of a language model, or the model does not know the task's answers.
    """
    saved = _answers_in(checkpoint)
    known = saved["answers"]
    placement, module = build_answering(config, run, trained=True, answers=known)
    task = placement.task
    # Who writes may write anything.
    if unknown := [answer for answer in task.answers if answer not in known and not module.WRITES]:
        raise UserError(
            f"task={task.name}: the model does not know the answers {', '.join(unknown)}; it knows {', '.join(known)}"
        )
    check_fits(module, saved["state_dict"], checkpoint)
    module.load_state_dict(saved["state_dict"])
    return Trained(placement, module, saved["sha256"])


def open_answering(config: DictConfig, run: Path, checkpoint: Path) -> tuple[FactModule, str]:
    """What a run has trained, with the weights of one of its checkpoints and the SHA-256 of that, without its samples.

    Raises:
        UserError: if the checkpoint is damaged or of a language model.
    """
    saved = _answers_in(checkpoint)
    backbone = Restored(run)
    model = _model(config, backbone, backbone.tokenizer([]))
    module: FactModule = construct(
        config.answer, model=model, answers=saved["answers"], phases=None, metrics=None, optimization=None
    )
    check_fits(module, saved["state_dict"], checkpoint)
    module.load_state_dict(saved["state_dict"])
    return module, saved["sha256"]


def _answers_in(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint holds, if that answers."""
    saved = read_checkpoint(checkpoint)
    if "answers" not in saved:
        raise UserError(
            f"{checkpoint}: holds a language model, which knows no answers; its run's evaluation.csv has its perplexity"
        )
    return saved


def open_trained(run: Path, checkpoint: Path, trust: Trust) -> Answerer | SegmentModel[Any]:
    """The model of one of a run's checkpoints, with its head if it was trained to choose between answers.

    Args:
        trust: modules whose classes the run's config may name.

    Raises:
        UserError: if the checkpoint is damaged, or the config names what it may not.
    """
    saved = read_checkpoint(checkpoint)
    backbone = Restored(run)
    config = saved_config(run, trust)
    check_parts(config, ["model"])
    model = _model(config, backbone, backbone.tokenizer([]))
    weights = {name: value for name, value in saved["state_dict"].items() if name.startswith(("model.", "head."))}
    whole: nn.Module = nn.ModuleDict({"model": model})
    if "head.weight" in weights:
        whole = Answerer(model, nn.Linear(model.width, len(saved["answers"])), saved["answers"])
    check_fits(whole, weights, checkpoint)
    whole.load_state_dict(weights)
    return whole if isinstance(whole, Answerer) else model


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


def save_architecture(model: SegmentModel[Any], folder: Path) -> None:
    """Leave tokenizer and backbone config in a run folder, each whole or not at all, to open its checkpoints with.

    Raises:
        UserError: if they would not do.
        OSError: if they cannot be written.
    """
    check_reopens(model)
    for name, part in model.parts.items():
        with FileLock(own_file(folder / f".{name}.lock")):
            if (folder / name).exists():
                continue
            partial = removed(folder / f".{name}.partial")
            try:
                part.save_pretrained(partial)
                os.rename(partial, folder / name)
            except Exception as error:  # fast tokenizers are written by Rust, which has the system's error in its words
                told = re.search(r"\(os error (\d+)\)", str(error))
                number = error.errno if isinstance(error, OSError) else told and int(told[1])
                if number is None:
                    raise
                # Which of its files it was is not told by all.
                raise OSError(number, os.strerror(number), str(folder / name)) from None
