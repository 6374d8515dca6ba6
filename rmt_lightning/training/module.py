"""What every way of training a segment model has in common."""

from __future__ import annotations

import copy
import inspect
import math
import os
import time
import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from rmt_lightning.core.errors import UserError
from rmt_lightning.models.segment_model import SegmentModel
from rmt_lightning.tasks.datamodule import ShortEpochs
from rmt_lightning.training.optimization import WarmupDecay
from rmt_lightning.training.phases.phase import Phase, Phases

_BY_NAME = inspect.Parameter.POSITIONAL_OR_KEYWORD


def _try(name: str, metric: Metric, offered: Mapping[str, Any]) -> set[str]:
    """Measure once what a validation might have, before a run depends on it. Returns the names of what is found.

    Raises:
        UserError: if that cannot be measured, or is not one number.
    """
    asked = inspect.signature(metric.update).parameters.values()
    needed = {part.name for part in asked if part.default is part.empty and part.kind is _BY_NAME}
    if unknown := needed.difference(offered):
        raise UserError(f"metrics.{name}: its update asks for {', '.join(unknown)}; there are {', '.join(offered)}")
    try:
        with warnings.catch_warnings(action="ignore"):
            found = MetricCollection({name: copy.deepcopy(metric)}, compute_groups=False)
            found.update(**offered)
            values = found.compute()
    except Exception as error:  # each metric has its own way to say what it cannot measure
        shapes = ", ".join(f"{key} {tuple(value.shape)}" for key, value in offered.items() if isinstance(value, Tensor))
        reason = " ".join(f"{type(error).__name__} {error}".split())
        raise UserError(
            f"metrics.{name}: cannot be measured of {shapes} ({reason:.200}); change its settings, or leave it out"
        ) from None
    for value in values.values():
        if not isinstance(value, int | float | Tensor) or torch.as_tensor(value).numel() != 1:
            shape = f"{tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise UserError(
                f"metrics.{name}: is {shape}, and one number is logged; give it a setting such as average=macro, or "
                "leave it out"
            )
    return set(values)


def _optimization(steps: int | list[int]) -> WarmupDecay:
    """What conf/optim has by default."""
    return WarmupDecay(steps=steps, lr=1e-3, weight_decay=1e-2, warmup=0.02)


class Diverged(RuntimeError):
    """The loss is no longer a number."""


class SegmentModule(L.LightningModule):
    """A segment model and how it is trained.

    Args:
        model: what is trained.
        phases: what it is led through; None: the phases among the callbacks of its Trainer, if there are any.
        metrics: of validation, logged as val/<name>. The `update` of a metric is given what it asks for by name. None:
            what phases decide by.
        offered: what a metric may ask for, as a validation might have it that is led by some phases, or by none.
        optimization: of the weights, unless phases know; None: AdamW at a learning rate of 1e-3, as conf/optim
            has it.

    Raises:
        UserError: if the metric that phases decide by is missing, or one cannot be measured.
    """

    # The metric that phases decide by, and what a validation logs besides.
    DECISIVE: ClassVar[str]
    LOGGED: ClassVar[frozenset[str]] = frozenset()

    def __init__(
        self,
        model: SegmentModel[Any],
        phases: Phases | None,
        metrics: Mapping[str, Metric] | None,
        offered: Callable[[Phases | None], Mapping[str, Any]],
        optimization: WarmupDecay | None,
    ) -> None:
        super().__init__()
        self.model = model
        self.optimization = optimization
        self._given = metrics
        self._offered = offered
        self._clock = time.perf_counter()
        self._follow(phases)

    def _follow(self, phases: Phases | None) -> None:
        """Be led by these phases, and measure what they decide by."""
        self.led_by = phases
        metrics = self.default_metrics() if self._given is None else self._given
        self.metrics = MetricCollection({**metrics}, prefix="val/", compute_groups=False)
        if phases is not None and self.DECISIVE not in metrics:
            raise UserError(
                f"metrics.{self.DECISIVE}: phases decide by it; leave it in, and leave out metrics=… if that was typed"
            )
        logged = set(self.LOGGED)
        for name, metric in (self._given or {}).items():
            found = _try(name, metric, self._offered(phases))
            if twice := sorted(logged & found):
                raise UserError(
                    f"metrics.{name}: val/{twice[0]} is logged already; give it another name, or leave it out"
                )
            logged |= found

    @abstractmethod
    def default_metrics(self) -> dict[str, Metric]:
        """What is measured if nothing is given."""

    def configure_callbacks(self) -> Sequence[Callback]:
        """Take the phases among the callbacks of the Trainer as those that lead."""
        trainer: Any = self.trainer
        phases: list[Any] = [callback for callback in trainer.callbacks if isinstance(callback, Phase)]
        leading = next((callback for callback in trainer.callbacks if isinstance(callback, Phases)), None)
        if phases:
            trainer.callbacks = [callback for callback in trainer.callbacks if callback not in phases]
            steps = getattr(phases[0], "steps", None)
            default = self.optimization or _optimization(steps or 1000)
            self._follow(Phases(phases, default, seed=int(os.environ.get("PL_GLOBAL_SEED", 0))))
            return [cast(Phases, self.led_by)]
        if trainer.state.fn == TrainerFn.FITTING and leading is not self.led_by:
            self._follow(leading)
        return []

    @property
    def phases(self) -> Phases:
        assert self.led_by is not None, "a module without phases is not trained"
        return self.led_by

    @property
    def data(self) -> ShortEpochs:
        """What Lightning attaches without declaring it."""
        return cast(ShortEpochs, cast(Any, self.trainer).datamodule)

    def configure_optimizers(self) -> Any:
        # In mixed precision Lightning takes a fused optimizer for one that unscales gradients, and clips none.
        fused = not str(self.trainer.precision).endswith("-mixed")
        if self.led_by is not None:
            return self.led_by.build_optimizer(self.parameters(), fused)
        if math.isinf(steps := self.trainer.estimated_stepping_batches):
            raise UserError("max_epochs: says no end of training, over which the learning rate falls; give one")
        optimization = self.optimization or _optimization(int(steps))
        optimizer, schedule = optimization.build(self.parameters(), 1, fused)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_start(self) -> None:
        self._first_step = self.global_step

    def on_train_epoch_start(self) -> None:
        self._clock = time.perf_counter()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # Dropout is a function of (seed, batch, rank), so that a resumed run draws what an uninterrupted one does.
        if self.led_by is not None:
            torch.manual_seed(self.led_by.number(self.global_rank))

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        # Its norm is that before clipping, and costs a pass over all gradients.
        if (self.global_step + 1) % cast(Any, self.trainer).log_every_n_steps == 0:
            gradients = [weight.grad for weight in self.parameters() if weight.grad is not None]
            self.log("train/gradient_norm", nn.utils.get_total_norm(gradients))
            self.log("train/lr", optimizer.param_groups[0]["lr"])

    def on_validation_epoch_start(self) -> None:
        # What a validation by itself has left may not be written to in a training.
        self.metrics.reset()

    def on_validation_epoch_end(self) -> None:
        found = self.metrics.compute()
        self.log_dict(found | (self.led_by.current.derived(found) if self.led_by else {}))

    def on_test_start(self) -> None:
        metrics = self.default_metrics() if self._given is None else copy.deepcopy(dict(self._given))
        self.tested = MetricCollection({**metrics}, prefix="test/", compute_groups=False).to(self.device)

    def on_test_epoch_end(self) -> None:
        self.log_dict(self.tested.compute())
        self.tested.reset()

    def checked(self, loss: Tensor) -> Tensor:
        """The loss, unless it is no number any more.

        Raises:
            Diverged: then.
        """
        if not torch.isfinite(loss):
            raise Diverged(f"the loss became {loss.item()} at step {self.global_step}; {self._advice()}")
        return loss

    def _advice(self) -> str:
        """What may help against a loss that is no number."""
        if self.global_step == self._first_step:
            broken = [name for name, weight in self.named_parameters() if not weight.isfinite().all()]
            what = f"{broken[0]} is not finite" if broken else "the weights are finite, but overflow"
            return f"no step has been made since the start, where {what}: begin with other weights" + self._more_bits()
        phase = self.led_by.current if self.led_by else None
        if phase is None or phase.optimization(default := self.phases.default)[0] is default:
            return "lower optim.lr or raise optim.warmup" + self._more_bits()
        return f"lower the learning rate of the phase {phase.name}" + self._more_bits()

    def _more_bits(self) -> str:
        return "" if "16" not in str(self.trainer.precision) else ", or give trainer.precision=32-true"

    def log_speed(self, tokens: int) -> None:
        """Log the speed of a step in which each device has read `tokens` tokens."""
        now = time.perf_counter()
        self.log("train/tokens_per_second", tokens * self.trainer.world_size / (now - self._clock))
        self._clock = now
