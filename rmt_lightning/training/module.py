"""What every way of training a segment model has in common."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
import torch
from torch import Tensor

from rmt_lightning.models.segment_model import SegmentModel
from rmt_lightning.training.optimization import WarmupDecay


class Diverged(RuntimeError):
    """The loss is no longer a number."""


class SegmentModule(L.LightningModule):
    """A segment model and how it is optimised.

    Args:
        model: what is trained.
        optimization: how.
        seed: of dropout.
    """

    def __init__(self, model: SegmentModel[Any], optimization: WarmupDecay, seed: int) -> None:
        super().__init__()
        self.model = model
        self.optimization = optimization
        self.seed = seed
        self._clock = time.perf_counter()

    def on_train_epoch_start(self) -> None:
        self._clock = time.perf_counter()

    def on_train_batch_start(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        # Dropout is a function of (seed, step, rank), so that a resumed run draws what an uninterrupted one does.
        torch.manual_seed((self.seed * 1_000_003 + self.global_step) * 1_009 + self.global_rank)

    def checked(self, loss: Tensor) -> Tensor:
        """The loss, unless it is no number any more.

        Raises:
            Diverged: then.
        """
        if not torch.isfinite(loss):
            raise Diverged(
                f"the loss became {loss.item()} at step {self.global_step}; lower optim.lr or raise optim.warmup"
            )
        return loss

    def log_speed(self, tokens: int) -> None:
        """Log the speed of a step in which each device has read `tokens` tokens."""
        now = time.perf_counter()
        self.log("train/tokens_per_second", tokens * self.trainer.world_size / (now - self._clock))
        self._clock = now
