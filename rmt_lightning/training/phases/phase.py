"""What a run goes through, one phase after another: what a phase is, and what leads from each to the next.

To add a phase, write a `Phase` and one yaml with its `_target_` in a folder of conf/ that no other part uses; a run
goes through its phases in the order in which they stand in its config.

Shapes: B batch, T segments, A tokens of the longest answer.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from rmt_lightning.core.errors import UserError
from rmt_lightning.models.segment_model import SegmentModel
from rmt_lightning.tasks.datamodule import FactBatch, ShortEpochs
from rmt_lightning.training.optimization import WarmupDecay

log = logging.getLogger(__name__)

# What follows a validation: more of the same, the same with a fresh optimizer and schedule, or nothing.
Verdict = Literal["go on", "restart", "end"]


class Start(NamedTuple):
    """What a training step on facts begins with.

    Attributes:
        batch: what is read.
        state: what the model reads it with, or None for its first state.
    """

    batch: FactBatch
    state: Any = None


class Outcome(NamedTuple):
    """What came of a training step on facts.

    Attributes:
        right: (B,) bool, who answered the question that ends the input.
        states: T states, that before each segment.
    """

    right: Tensor
    states: list[Any]


class Progress(NamedTuple):
    """How far a phase has come.

    Attributes:
        told: what is being done and how well it goes, in a few words.
        done: steps done.
        steps: of so many.
    """

    told: str
    done: int
    steps: int


class Phase(Callback, ABC):
    """One part of a run: it says which samples come next, sees what came of each, and when it is over.

    A Trainer takes phases among its callbacks, and the module that it trains goes through them in their order.

    Attributes:
        name: in checkpoints, in W&B and on the command line.
        title: in tables and on pages.
        table: the csv file of its rows in the run folder, if it has any.
        first_step: optimizer step of the run at which it began; None before that.
        num_segments: of the longest inputs that it trains on at present.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    table: ClassVar[str | None] = None
    first_step: int | None = None
    num_segments: int = 1

    def prepare(self, module: L.LightningModule, data: Any, before: Phase | None) -> None:
        """Look at what it will work with, before anything is trained or written.

        Args:
            module: what is trained.
            data: where samples come from.
            before: the phase before it, prepared.

        Raises:
            UserError: if they do not go together.
        """

    @property
    def longest(self) -> int:
        """Segments of the longest inputs that it comes to."""
        return self.num_segments

    @property
    def last_step(self) -> int | None:
        """Optimizer step of the run that ends it, if that is known; a last phase ends there, not an epoch later."""
        return None

    @property
    def begins(self) -> bool:
        """Whether it is about to begin, with a fresh optimizer, rather than in the middle of something."""
        return self.first_step is None

    def begin(self, step: int) -> None:
        """Begin, at an optimizer step of the run."""
        self.first_step = step

    @abstractmethod
    def training_keys(self, data: Any, batch: int) -> list[Any]:
        """The keys of this device's samples in training batch number `batch`: a function of that number alone."""

    @abstractmethod
    def validation_keys(self, data: Any) -> Iterator[list[Any]]:
        """The keys of this device's share of a validation, batch by batch."""

    def optimization(self, default: WarmupDecay) -> tuple[WarmupDecay, int]:
        """How to train, and for which stage; `default` is the run's `optim`."""
        return default, 1

    def start(self, batch: FactBatch, model: SegmentModel[Any], random: torch.Generator) -> Start:
        """What a training step reads, and from which state on. `random` is a function of (seed, batch, rank)."""
        return Start(batch)

    def step(self, start: Start, outcome: Outcome, model: SegmentModel[Any], random: torch.Generator) -> None:
        """See what came of a training step, once the weights have changed."""

    @abstractmethod
    def validate(self, step: int, metrics: Mapping[str, Tensor], total: Callable[[Tensor], Tensor]) -> Verdict:
        """Decide what follows a validation.

        Args:
            step: optimizer steps of the run so far.
            metrics: what has been logged.
            total: sums a tensor over all ranks.
        """

    @property
    @abstractmethod
    def finished(self) -> bool:
        """Whether it is over, and the next phase may begin."""

    @property
    def stuck(self) -> bool:
        """Whether it has ended short of what it is for."""
        return False

    def advice(self, again: str) -> str:
        """Why it is stuck, and what to do about it; `again` is what goes on with the run."""
        return f"{self.title} did not come to its end; go on with {again}"

    @property
    def milestones(self) -> Sequence[str]:
        """What has been reached whose weights are worth keeping, by the names of their checkpoints."""
        return ()

    def logged(self) -> dict[str, float]:
        """What is logged of it with each validation."""
        return {}

    def derived(self, metrics: Mapping[str, Tensor]) -> dict[str, float]:
        """What is logged beside the metrics of a validation, and follows from them."""
        return {}

    @abstractmethod
    def progress(self, step: int, metrics: Mapping[str, Tensor]) -> Progress:
        """How far it has come, for a person who watches."""

    def rows(self) -> list[dict[str, Any]]:
        """What it has found so far, as the rows of a csv file, whose first column counts."""
        return []

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs to go on, in plain values."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""

    def tensors(self) -> list[Tensor]:
        """What else it needs, as tensors: those of this rank."""
        return []

    def load_tensors(self, tensors: list[Tensor]) -> None:
        """Go on from there too; not called if there were none."""


class Phases(Callback):
    """Leads a run through its phases. It is what the data module asks for keys, and the module for a start.

    Batches are numbered from the start of the run. The number travels in checkpoints, so whatever interrupts training,
    the next batch is the one that would have come next. Must stand before the checkpoints in the list of callbacks, so
    that they save what has been decided.

    Args:
        phases: at least one, in order.
        optimization: how weights are trained, unless a phase says otherwise.
        seed: of what phases draw at random in a step.

    Raises:
        UserError: if two of them have the same name.
    """

    def __init__(self, phases: Sequence[Phase], optimization: WarmupDecay, seed: int) -> None:
        super().__init__()
        self.phases = list(phases)
        _check_names(self.phases)
        self.default = optimization
        self.seed = seed
        # What it has been prepared for.
        self._data: ShortEpochs | None = None
        # Batches that this device has trained on, and optimizer steps of the run before this start of it.
        self.consumed = 0
        self._steps = 0
        self._current = 0

    def __iter__(self) -> Iterator[Phase]:
        return iter(self.phases)

    @property
    def current(self) -> Phase:
        """The phase that the run is in."""
        return self.phases[self._current]

    @property
    def finished(self) -> bool:
        """Whether all phases are over."""
        return all(phase.finished for phase in self.phases)

    def prepare(self, module: L.LightningModule, data: ShortEpochs) -> None:
        """Let each phase look at what it will work with.

        Raises:
            UserError: if something does not go together.
        """
        self._data, before = data, None
        for phase in self.phases:
            phase.prepare(module, data, before)
            before = phase

    # What the data module asks.

    def training_keys(self, data: ShortEpochs) -> Iterator[list[Any]]:
        end = self.consumed - self.consumed % data.steps_per_epoch + data.steps_per_epoch
        yield from (self.current.training_keys(data, batch) for batch in range(self.consumed, end))

    def validation_keys(self, data: ShortEpochs) -> Iterator[list[Any]]:
        yield from self.current.validation_keys(data)

    # What the module asks.

    def build_optimizer(self, parameters: Iterable[nn.Parameter], fused: bool = False) -> Any:
        """A fresh optimizer and its schedule, as Lightning wants them."""
        optimization, stage = self.current.optimization(self.default)
        optimizer, schedule = optimization.build(parameters, stage, fused)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def number(self, rank: int) -> int:
        """A number for each (seed, batch, rank), to draw at random by, so that a resumed run draws the same."""
        return (self.seed * 1_000_003 + self.consumed) * 1_009 + rank

    def start(self, batch: FactBatch, model: SegmentModel[Any], rank: int) -> Start:
        """What the training step on a batch begins with."""
        self._random = torch.Generator().manual_seed(self.number(rank))
        self._start = self.current.start(batch, model, self._random)
        return self._start

    # What Lightning tells.

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Look at the data, unless a run has done so before.

        Raises:
            UserError: if there are loaders instead of a data module, or Lightning would choose samples too.
        """
        data = getattr(trainer, "datamodule", None)
        if not isinstance(data, ShortEpochs):
            raise UserError(
                f"{type(self.current).__name__}: chooses samples, which loaders cannot be asked for; give a "
                "FactDataModule, TextDataModule or DocumentDataModule, or leave it out of the callbacks"
            )
        if trainer.world_size > 1 and trainer._accelerator_connector.use_distributed_sampler:
            raise UserError(
                "use_distributed_sampler=True: phases share samples out themselves; give Trainer(…, "
                "use_distributed_sampler=False)"
            )
        if data is not self._data:
            self.prepare(pl_module, data)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.finished:
            raise UserError(f"{type(self.current).__name__}: is over; give a new one, or one that goes on for longer")
        # Restored by now, but nothing has been read yet: loader workers begin before on_train_start.
        self._begins = self.current.begins
        if self._begins:
            self.current.begin(self._steps)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._begins and trainer.ckpt_path:
            # Lightning has restored the optimizer of what was before.
            trainer.strategy.setup_optimizers(trainer)
        elif trainer.ckpt_path:
            self._take_settings(trainer, pl_module)

    def _take_settings(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Give a restored optimizer the settings of the present config: what was typed on resuming takes effect."""
        fresh: Any = module.configure_optimizers()
        if not isinstance(fresh, dict) or len(trainer.optimizers) > 1:
            # Of somebody's own making.
            return
        settings, schedule = fresh["optimizer"], fresh["lr_scheduler"]["scheduler"]
        (optimizer,), (config,) = trainer.optimizers, trainer.lr_scheduler_configs
        restored: Any = config.scheduler
        restored.base_lrs, restored.lr_lambdas = schedule.base_lrs, schedule.lr_lambdas
        for group, wanted in zip(optimizer.param_groups, settings.param_groups, strict=True):
            group.update({name: value for name, value in wanted.items() if name != "params"})
            for parameter in group["params"] if group["fused"] else ():
                # One that is fused counts its steps on the device, and may have been saved by one that is not.
                if "step" in (counted := optimizer.state[parameter]):
                    counted["step"] = counted["step"].to(parameter.device)
        for group, lr, scale in zip(optimizer.param_groups, restored.base_lrs, restored.lr_lambdas, strict=True):
            group["lr"] = lr * scale(restored.last_epoch)

    @torch.no_grad()
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if "outcome" in outputs:
            self.current.step(self._start, outputs["outcome"], pl_module.model, self._random)
        self.consumed += 1
        if self.current is self.phases[-1] and trainer.global_step == self.current.last_step:
            # Lightning then validates at once, within an epoch too.
            trainer.should_stop = True

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pl_module.log_dict(self.current.logged())

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        def total(counts: Tensor) -> Tensor:
            return trainer.strategy.reduce(counts.to(pl_module.device), reduce_op="sum").cpu()

        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        verdict = self.current.validate(trainer.global_step, trainer.callback_metrics, total)
        if verdict not in get_args(Verdict):
            raise UserError(
                f"{type(self.current).__name__}: decides {verdict!r} after a validation; allowed: "
                f"{', '.join(get_args(Verdict))}"
            )
        if verdict == "end" and self.current.finished and self._current + 1 < len(self.phases):
            self._current += 1
            self.current.begin(trainer.global_step)
            verdict = "restart"
        if verdict == "restart":
            trainer.strategy.setup_optimizers(trainer)
            # What seemed to be the last step is not.
            trainer.should_stop = False
        if verdict == "end":
            trainer.should_stop = True

    # Checkpoints hold the tensors of all ranks, so that a resumed run goes on as an uninterrupted one does.

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["phases"] = {"consumed": self.consumed} | {phase.name: phase.state_dict() for phase in self.phases}

        def of_all_ranks(part: Tensor) -> Tensor:
            return trainer.strategy.all_gather(part.to(pl_module.device)).view(trainer.world_size, *part.shape).cpu()

        begun = [phase for phase in self.phases if phase.first_step is not None]
        checkpoint["tensors"] = {phase.name: [of_all_ranks(part) for part in phase.tensors()] for phase in begun}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self.load(checkpoint)
        for phase in self.phases:
            if saved := checkpoint["tensors"].get(phase.name):
                rank = trainer.global_rank % len(saved[0])
                phase.load_tensors([part[rank].to(pl_module.device) for part in saved])

    def load(self, checkpoint: dict[str, Any]) -> None:
        """Take up what a checkpoint tells of phases, once prepared. Those that it does not know have yet to begin."""
        self._steps = checkpoint["global_step"]
        self.consumed = checkpoint["phases"]["consumed"]
        for phase in self.phases:
            if phase.name in checkpoint["phases"]:
                phase.load_state_dict(checkpoint["phases"][phase.name])
        unfinished = [number for number, phase in enumerate(self.phases) if not phase.finished]
        self._current = min(unfinished, default=len(self.phases) - 1)


def _check_names(phases: Sequence[Phase]) -> None:
    """Raise UserError unless each has a title, and a name of its own, by which checkpoints know it."""
    # By that they know the number of batches.
    taken = {"consumed"}
    for phase in phases:
        kind, name = type(phase).__name__, getattr(phase, "name", None)
        if not isinstance(name, str) or not isinstance(getattr(phase, "title", None), str):
            raise UserError(f"{kind}: has no name or no title, as every phase has; give it both")
        if name in taken:
            raise UserError(f"{kind}: its name, {name}, is that of another phase; give it one of its own")
        taken.add(name)
