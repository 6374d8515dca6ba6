"""The two kinds of runs, told apart here alone: questions about facts, and running text.

A recipe is what a run is made of, and what is done with it at the end.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import lightning as L
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_object
from omegaconf import DictConfig, ListConfig
from rich.table import Table

from rmt_lightning.analysis.extrapolation import LengthResult, LengthTest, in_words, noted, replies, score_length
from rmt_lightning.analysis.perplexity import DocumentTest, evaluate_documents, total
from rmt_lightning.app.build import build_answering, build_foundation, construct, testable
from rmt_lightning.app.console import show
from rmt_lightning.app.results import draw_attention, length_table, tell_limit
from rmt_lightning.app.schema import CONF, instantiate
from rmt_lightning.core.errors import UserError
from rmt_lightning.core.files import write_atomically, write_csv, write_jsonl
from rmt_lightning.core.progress import bar
from rmt_lightning.core.run_folder import EVALUATION, PREDICTIONS
from rmt_lightning.models.adapters import Finetuning
from rmt_lightning.models.machine import check_room, check_weights
from rmt_lightning.models.segment_model import SegmentModel, state_size
from rmt_lightning.models.sources import reads_backbone
from rmt_lightning.reporting import figures, style
from rmt_lightning.tasks.corpus import Corpus
from rmt_lightning.tasks.datamodule import FactDataModule, ShortEpochs
from rmt_lightning.tasks.facts import Split, Task
from rmt_lightning.tasks.language import DocumentDataModule, LanguageModeling, RunningText
from rmt_lightning.tasks.noise import SPLITS
from rmt_lightning.tasks.placement import Key, Placement
from rmt_lightning.training.answering import FactModule
from rmt_lightning.training.language_modeling import LanguageModeler
from rmt_lightning.training.module import SegmentModule
from rmt_lightning.training.optimization import at_stage
from rmt_lightning.training.phases.curriculum import SegmentCurriculum
from rmt_lightning.training.phases.fixed_steps import FixedSteps
from rmt_lightning.training.phases.phase import Phase, Phases
from rmt_lightning.training.phases.state_passing import StatePassing

log = logging.getLogger(__name__)

Kind = TypeVar("Kind", bound=Phase)
# Settings of a backbone that its tokenizer depends on.
_OF_TOKENIZERS = {"_target_", "name", "vocabulary_size"}
# The share of all questions that one segment must have room for, so that there is something to learn from.
_FEWEST = 0.05


class Recipe(ABC):
    """What a run is made of.

    Attributes:
        NEEDS: of which kind the choices of some groups must be.
        OTHERS: phases of the other kind of runs.
        phases: what it goes through.
        data: where its samples come from.
        module: what is trained.
        corpora: the text of its noise.
        task: what it asks, if it asks anything.
    """

    NEEDS: ClassVar[dict[str, type]]
    OTHERS: ClassVar[tuple[type, ...]]
    task: Task | None = None
    phases: Phases
    data: ShortEpochs
    module: SegmentModule
    corpora: Mapping[Split, Corpus]

    @abstractmethod
    def __init__(self, config: DictConfig, run: Path | None, trained: bool) -> None:
        """Build it; arguments as of `build_foundation`."""

    @property
    def model(self) -> SegmentModel[Any]:
        return self.module.model

    def tell(self) -> None:
        """Say what people should know of its samples; nothing is wrong with them."""

    def idle(self, config: DictConfig) -> Iterator[tuple[str, str]]:
        """Settings that change nothing, for others leave them nothing to do, and why that is so.

        Args:
            config: what the recipe was built from.
        """
        model = get_object(config.model._target_)
        if not reads_backbone(model):
            for name in set(config.backbone) - _OF_TOKENIZERS:
                yield f"backbone.{name}", f"changes nothing, for a {model.__name__} takes the tokenizer alone"
        borders = max(phase.longest for phase in self.phases) - 1
        if getattr(self.model, "memory_size", None) == 0:
            yield "model.bptt_depth", "changes nothing, for model.memory_size=0 leaves no gradient to cross a border"
            yield "model.memory_attention", "changes nothing, for model.memory_size=0 leaves no memory"
        elif self.model.bptt_depth >= borders:
            yield (
                "model.bptt_depth",
                f"changes nothing, for the longest inputs have {borders} borders, all of them crossed",
            )

    @abstractmethod
    def test(self, folder: Path, trainer: L.Trainer) -> None:
        """Test what has been trained, show what came of it, and write that into the run folder."""

    def draw(self, folder: Path, trainer: L.Trainer) -> None:
        """Draw what else there is to be seen of what has been trained."""

    def phase(self, kind: type[Kind]) -> Kind:
        """The first phase of a kind."""
        return next(phase for phase in self.phases if isinstance(phase, kind))


class FactRecipe(Recipe):
    """Questions about facts, at growing lengths."""

    NEEDS: ClassVar = {"data": FactDataModule, "curriculum": SegmentCurriculum, "test": LengthTest}
    OTHERS = (FixedSteps,)
    data: FactDataModule
    module: FactModule

    def __init__(self, config: DictConfig, run: Path | None, trained: bool) -> None:
        self.phases = build_phases(config)
        placement, self.module = build_answering(config, run, trained, phases=self.phases)
        self.corpora, self.task = placement.corpora, placement.task
        tested_elsewhere = {"test_segments": (), "test_samples": None}
        self.data = construct(config.data, placement=placement, keys=self.phases, **tested_elsewhere)
        self.lengths: LengthTest = instantiate(config.test, _convert_="all")
        self.model.fitting("curriculum.max_segments", [config.curriculum.max_segments])
        _check_noise(placement, config.curriculum.max_segments)
        _check_room(placement, config.data.segment_length, self.phase(SegmentCurriculum).shortest(placement))
        self.tested = testable("test.", self.lengths.lengths, self.model, placement)

    def tell(self) -> None:
        placement, curriculum = self.data.placement, self.phase(SegmentCurriculum)
        longest = curriculum.longest
        for remark in placement.remarks():
            log.info(remark)
        shares = {n: placement.fits("train", Key(n, 0)) for n in range(curriculum.shortest(placement), longest + 1)}
        if partial := ", ".join(f"{share:.1%} into {n}" for n, share in shares.items() if share < 1):
            log.info("task=%s: of its questions fit %s segments; the others are left out", placement.task.name, partial)
        longest_input = [Key(longest, 0)]
        tell_limit(placement, "data.validation_samples", "validation", self.data.validation_samples, longest_input)
        tell_limit(placement, "test.samples", "test", self.lengths.samples, self.tested)

    def test(self, folder: Path, trainer: L.Trainer) -> None:
        device = trainer.strategy.root_device
        self.module.to(device).eval()
        batch_size = 2 * self.data.batch_size
        placement, samples = self.data.placement, self.lengths.samples
        batches = {like: -(-placement.asked("test", samples, like) // batch_size) for like in self.tested}
        steps = sum(number * placement.longest("test", like) for like, number in batches.items())
        found: dict[Key, LengthResult] = {}
        predictions: list[dict[str, Any]] = []
        log.info("testing inputs of %s", in_words(self.tested))
        testing = bar("testing", steps, batch_size)
        with trainer.precision_plugin.forward_context(), testing as advance:
            for like in self.tested:
                told = noted(replies(self.module, placement, like, samples, batch_size, device, advance), predictions)
                found[like] = score_length(told, placement, like, self.module.WRITES)
        lengths = [*found.values()]
        show(length_table(found, self.lengths.lengths, self.model))
        # Whoever finds the table finds its answers.
        write_jsonl(folder / PREDICTIONS, predictions)
        write_csv(folder / EVALUATION, [result.length | result.row() for result in lengths])
        task, curriculum = self.data.placement.task, self.phase(SegmentCurriculum)
        figure = figures.curriculum(
            curriculum.history,
            [style.Place(result.segments, result.accuracy, *result.interval) for result in lengths],
            curriculum.num_segments,
            1 / len(task.answers),
            f"task={task.name}",
            "segments" if curriculum.grow == "segments" else "stages",
            self.data.validation_samples,
        )
        write_atomically(folder / "curriculum.png", style.rendered(figure))

    def idle(self, config: DictConfig) -> Iterator[tuple[str, str]]:
        yield from super().idle(config)
        curriculum = self.phase(SegmentCurriculum)
        last = curriculum.stages
        end = f"curriculum.max_segments={last}" if curriculum.grow == "segments" else f"stage {last}, the last one,"
        for group in ("curriculum", "optim"):
            for name, values in config[group].items():
                if isinstance(values, ListConfig) and (over := list(values[last:])):
                    yield f"{group}.{name}", f"{over} changes nothing, for {end} ends before"
        yield from self._rounded(config)
        if config.answer.get("all_questions") and _asks_one(self.data.placement):
            yield "answer.all_questions", f"changes nothing, for task={self.data.placement.task.name} has one question"
        if config.get("hold") and "rounds" in config.hold and config.hold.until_rate == 1:
            yield "hold.rounds", "changes nothing, for hold.until_rate=1 is met after one"

    def _rounded(self, config: DictConfig) -> Iterator[tuple[str, str]]:
        """Whether stages go on beyond their budget, at a learning rate of 0, to the validation that ends them."""
        epoch = -(-config.data.steps_per_epoch // config.trainer.get("accumulate_grad_batches", 1))
        stages = self.phase(SegmentCurriculum).stages
        # The last phase of a run ends at once.
        followed = stages if len(list(self.phases)) > 1 else stages - 1
        budgets = [at_stage(self.phase(SegmentCurriculum).steps, stage + 1) for stage in range(followed)]
        if any(steps % epoch for steps in budgets):
            told = (
                f"is rounded up to whole {epoch}s, for a validation ends a stage, and comes each data.steps_per_epoch"
            )
            yield "curriculum.steps", told

    def draw(self, folder: Path, trainer: L.Trainer) -> None:
        draw_attention(self.data.placement, self.module, trainer.strategy.root_device, folder)


class TextRecipe(Recipe):
    """Running text, for a number of steps."""

    NEEDS: ClassVar = {"data": DocumentDataModule, "curriculum": FixedSteps, "test": DocumentTest}
    OTHERS = (SegmentCurriculum, StatePassing)
    data: DocumentDataModule
    module: LanguageModeler

    def __init__(self, config: DictConfig, run: Path | None, trained: bool) -> None:
        _check_unused(config)
        self.phases = build_phases(config)
        base = build_foundation(config, run, trained)
        self.corpora = base.corpora
        texts = {
            split: RunningText(base.corpora[split], base.tokenizer, base.model.text_length, config.seed)
            for split in SPLITS
        }
        self.data = construct(config.data, texts=texts, keys=self.phases)
        metrics = instantiate(config.metrics, _convert_="all")
        self.module = LanguageModeler(base.model, self.phases, metrics)
        self.documents: DocumentTest = instantiate(config.test, _convert_="all")

    def test(self, folder: Path, trainer: L.Trainer) -> None:
        device = trainer.strategy.root_device
        self.module.to(device).eval()
        limit, batches = self.documents.documents, len(self.data.documents("test", self.documents.documents))
        testing = bar("testing documents", batches, self.data.batch_size, "documents")
        with trainer.precision_plugin.forward_context(), testing as advance:
            scores = evaluate_documents(self.module.nats, self.data, "test", limit, device, advance)
        together = total(scores)
        write_csv(folder / "documents.csv", [{"document": number, **score.row()} for number, score in scores.items()])
        write_csv(folder / EVALUATION, [{"documents": len(scores), **together.row()}])
        table = Table("documents", "tokens", "perplexity", "bits per byte", title="Test", title_justify="left")
        shown = (f"{together.tokens:,}", f"{together.perplexity:.2f}", f"{together.bits_per_byte:.4f}")
        table.add_row(str(len(scores)), *shown)
        show(table)
        history = self.phase(FixedSteps).history
        figure = figures.perplexity(history, together.perplexity, type(self.model).__name__)
        write_atomically(folder / "perplexity.png", style.rendered(figure))


def build_recipe(config: DictConfig, run: Path | None = None, trained: bool = False) -> Recipe:
    """Build what a training run needs, by its task; arguments as of `build_foundation`.

    Raises:
        UserError: if something cannot be built, choices do not go together, or there is too little text.
    """
    task = get_object(config.task._target_)
    recipe = TextRecipe if _is_kind(task, LanguageModeling) else FactRecipe
    for group, kind in [*recipe.NEEDS.items(), *((name, Phase) for name in phase_groups(config))]:
        given = get_object(config[group]._target_)
        if not _is_kind(given, kind) or issubclass(given, recipe.OTHERS):
            needs = f", which needs a {kind.__name__}" if group in recipe.NEEDS else ""
            raise UserError(
                f"{group}: a {given.__name__} does not go with task={getattr(task, 'name', task.__name__)}{needs}; "
                f"leave out {group}=…"
            )
    built = recipe(config, run, trained)
    _check_sparse(built.model)
    check_room("model: its state takes", state_size(built.model), "make it smaller")
    return built


def _check_sparse(model: SegmentModel[Any]) -> None:
    """Refuse a choice of a model that is named after its backbone, if that has been given another kind of backbone."""
    choice = HydraConfig.get().runtime.choices.get("model")
    kinds = {"longformer": "longformer", "bigbird": "big_bird"}
    if choice in kinds and (kind := getattr(model.architecture, "model_type", None)) != kinds[choice]:
        raise UserError(
            f"model={choice}: reads all at once with a {choice} alone, and the backbone is a {kind}; leave out "
            "backbone=…, or give model=full_attention"
        )


def _check_unused(config: DictConfig) -> None:
    """Refuse what training on running text would not obey: it asks nothing, and has no stages."""
    if config.answer._target_ != "rmt_lightning.FactClassifier" or config.answer.get("all_questions"):
        raise UserError("answer: running text asks nothing; leave out answer=…")
    for name in ("lr", "steps"):
        values = config.optim.get(name)
        if isinstance(values, ListConfig) and len(values) > 1:
            raise UserError(f"optim.{name}={values}: running text has one stage, not {len(values)}; give one number")


def _asks_one(placement: Placement) -> bool:
    """Whether nothing else could be asked about the facts of a few samples."""
    return not any(placement.example("train", Key(1, number)).also for number in range(8))


def _is_kind(found: Any, kind: type) -> bool:
    return isinstance(found, type) and issubclass(found, kind)


def build_phases(config: DictConfig) -> Phases:
    """The phases of a run, in the order of its config.

    Raises:
        UserError: if something in the config is neither a phase nor another part of a run.
    """
    phases = [instantiate(config[group], _convert_="all") for group in phase_groups(config)]
    return Phases(phases, instantiate(config.optim, _convert_="all"), config.seed)


def phase_groups(config: DictConfig) -> list[str]:
    """Where phases stand in a config, in order: whatever is a `Phase` there.

    Raises:
        UserError: as of `build_phases`.
    """
    groups = []
    for name, part in config.items():
        kind = get_object(part._target_) if isinstance(part, DictConfig) and "_target_" in part else None
        if _is_kind(kind, Phase):
            groups.append(str(name))
        elif isinstance(part, DictConfig) and not (CONF / str(name)).is_dir() and not _is_kind(kind, Finetuning):
            raise UserError(f"{name!s}: is no part of a run; give a choice that conf/ has, or a phase of your own")
    return groups


def check_memory(recipe: Recipe) -> None:
    """Refuse what this machine cannot hold by far: weights with what AdamW keeps of them, and a batch.

    Of a batch count its token ids, one vector for each of a segment, and its first state.
    """
    check_weights("model", sum(part.numel() for part in recipe.module.parameters() if part.requires_grad), size=16)
    data, longest = recipe.data, max(phase.longest for phase in recipe.phases)
    of_tokens = data.segment_length * (8 * longest + 2 * recipe.model.width)
    needed = data.batch_size * (of_tokens + state_size(recipe.model))
    check_room(f"data.batch_size={data.batch_size}: a batch of {longest} segments takes at least", needed, "give less")


def _check_room(placement: Placement, segment_length: int, shortest: int) -> None:
    """Refuse what has next to no questions to begin with, for the shortest inputs have no room for the others."""
    text_length, task = placement.text_length, placement.task.name
    for split in ("train", "validation"):
        share = placement.fits(split, Key(shortest, 0))
        if share < _FEWEST and shortest > 1:
            raise UserError(
                f"data.segment_length: leaves room for {text_length} tokens of text: {share:.1%} of the questions of "
                f"task={task} fit into {shortest} segments; raise it, or curriculum.max_segments"
            )
        if share < _FEWEST:
            needed = [segment_length - text_length + placement.room_for(split, part) for part in (_FEWEST, 0.5)]
            raise UserError(
                f"data.segment_length: leaves room for {text_length} tokens of text, too small for the facts and the "
                f"question of task={task}: {share:.1%} of its questions fit into one segment; raise it to {needed[0]} "
                f"or more; {needed[1]} has room for half of them"
            )


def _check_noise(placement: Placement, max_segments: int) -> None:
    needed = max_segments * placement.text_length
    for split, corpus in placement.corpora.items():
        if len(corpus.tokens) < needed:
            raise UserError(
                f"noise: has {len(corpus.tokens)} tokens for {split}, fewer than the {needed} of one sample of "
                f"{max_segments} segments; give more text or lower curriculum.max_segments"
            )
