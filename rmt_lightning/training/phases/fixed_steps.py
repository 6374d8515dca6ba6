"""No curriculum: a number of steps on running text."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any

import lightning as L
from annotated_types import Ge
from torch import Tensor

from rmt_lightning.core.errors import UserError
from rmt_lightning.tasks.language import DocumentDataModule
from rmt_lightning.training.phases.phase import Phase, Progress, Verdict

log = logging.getLogger(__name__)


class FixedSteps(Phase):
    """Training on running text ends after a number of steps, with a validation.

    Args:
        steps: optimizer steps.
    """

    name = "fixed_steps"
    title = "Fixed steps"

    def __init__(self, steps: Annotated[int, Ge(1)]) -> None:
        self.steps = steps
        # (optimizer step, perplexity) of every validation
        self.history: list[tuple[int, float]] = []

    def prepare(self, module: L.LightningModule, data: DocumentDataModule, before: Phase | None) -> None:
        if not isinstance(data, DocumentDataModule):
            raise UserError(
                "FixedSteps: is for running text, of a DocumentDataModule; give a SegmentCurriculum instead"
            )
        self.num_segments = data.num_segments

    def training_keys(self, data: DocumentDataModule, batch: int) -> list[tuple[int, int]]:
        return [(row, batch * data.num_segments) for row in data.rows]

    def validation_keys(self, data: DocumentDataModule) -> Iterator[list[int]]:
        yield from data.validation_batches()

    @property
    def last_step(self) -> int:
        return (self.first_step or 0) + self.steps

    @property
    def finished(self) -> bool:
        return bool(self.history) and self.history[-1][0] - (self.first_step or 0) >= self.steps

    def validate(self, step: int, metrics: Mapping[str, Tensor], total: Callable[[Tensor], Tensor]) -> Verdict:
        perplexity, bits = (float(metrics[f"val/{name}"]) for name in ("perplexity", "bits_per_byte"))
        self.history.append((step, perplexity))
        log.info("step %d: perplexity %.2f, %.4f bits per byte", step, perplexity, bits)
        return "end" if self.finished else "go on"

    def progress(self, step: int, metrics: Mapping[str, Tensor]) -> Progress:
        perplexity = f"{self.history[-1][1]:.2f}" if self.history else "–"
        return Progress(f"perplexity {perplexity}", step - (self.first_step or 0), self.steps)

    def state_dict(self) -> dict[str, Any]:
        return {"first_step": self.first_step, "history": self.history}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.first_step, self.history = state["first_step"], state["history"]
