"""What every way of training a segment model has in common."""

from __future__ import annotations

import copy
import inspect
import time
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar, cast

import lightning as L
import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from rmt_lightning.core.errors import UserError
from rmt_lightning.models.segment_model import SegmentModel
from rmt_lightning.tasks.datamodule import ShortEpochs
from rmt_lightning.training.phases.phase import Phases

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


class Diverged(RuntimeError):
    """The loss is no longer a number."""


class SegmentModule(L.LightningModule):
    """A segment model and how it is trained.

    Args:
        model: what is trained.
        phases: what it is led through; None if it is not trained.
        metrics: of validation, logged as val/<name>. The `update` of a metric is given what it asks for by name.
        offered: what a metric may ask for, as a validation might have it.

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
        metrics: Mapping[str, Metric],
        offered: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.model = model
        self._phases = phases
        self.metrics = MetricCollection(dict(metrics), prefix="val/", compute_groups=False)
        if phases is not None and self.DECISIVE not in metrics:
            raise UserError(
                f"metrics.{self.DECISIVE}: phases decide by it; leave it in, and leave out metrics=… if that was typed"
            )
        logged = set(self.LOGGED)
        for name, metric in metrics.items():
            found = _try(name, metric, offered)
            if twice := sorted(logged & found):
                raise UserError(
                    f"metrics.{name}: val/{twice[0]} is logged already; give it another name, or leave it out"
                )
            logged |= found
        self._clock = time.perf_counter()

    @property
    def phases(self) -> Phases:
        assert self._phases is not None, "a module without phases is not trained"
        return self._phases

    @property
    def data(self) -> ShortEpochs:
        """What Lightning attaches without declaring it."""
        return cast(ShortEpochs, cast(Any, self.trainer).datamodule)

    def configure_optimizers(self) -> Any:
        # In mixed precision Lightning takes a fused optimizer for one that unscales gradients, and clips none.
        mixed = str(self.trainer.precision).endswith("-mixed")
        return self.phases.build_optimizer(self.parameters(), fused=not mixed)

    def on_train_start(self) -> None:
        self._first_step = self.global_step

    def on_train_epoch_start(self) -> None:
        self._clock = time.perf_counter()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # Dropout is a function of (seed, batch, rank), so that a resumed run draws what an uninterrupted one does.
        torch.manual_seed(self.phases.number(self.global_rank))

    def on_validation_epoch_end(self) -> None:
        found = self.metrics.compute()
        self.log_dict(found | self.phases.current.derived(found))
        self.metrics.reset()

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
        phase, default = self.phases.current, self.phases.default
        if self.global_step == self._first_step:
            broken = [name for name, weight in self.named_parameters() if not weight.isfinite().all()]
            what = f"{broken[0]} is not finite" if broken else "the weights are finite, but overflow"
            return f"no step has been made since the start, where {what}: begin with other weights" + self._more_bits()
        if phase.optimization(default)[0] is default:
            return "lower optim.lr or raise optim.warmup" + self._more_bits()
        return f"lower the learning rate of the phase {phase.name}" + self._more_bits()

    def _more_bits(self) -> str:
        return "" if "16" not in str(self.trainer.precision) else ", or give trainer.precision=32-true"

    def log_speed(self, tokens: int) -> None:
        """Log the speed of a step in which each device has read `tokens` tokens."""
        now = time.perf_counter()
        self.log("train/tokens_per_second", tokens * self.trainer.world_size / (now - self._clock))
        self._clock = now
