"""The fact tasks as classification of the last segment, and what all ways to answer have in common.

Shapes: B batch, T segments, S text tokens of a segment, C answers, N longest number of segments.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torchmetrics import Metric

from rmt_lightning.core.errors import UserError
from rmt_lightning.models.segment_model import Reading, SegmentModel
from rmt_lightning.tasks.datamodule import data_of
from rmt_lightning.training.module import SegmentModule
from rmt_lightning.training.optimization import WarmupDecay


class SlicedAccuracy(Metric):
    """Counts right answers by number of segments and by distance from fact to question, summed over ranks.

    Args:
        longest: N.
    """

    full_state_update = False
    right: Tensor
    seen: Tensor

    def __init__(self, longest: int) -> None:
        super().__init__()
        # Both (N + 1, N): rows are numbers of segments, columns are distances.
        self.add_state("right", torch.zeros(longest + 1, longest, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("seen", torch.zeros(longest + 1, longest, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, correct: Tensor, num_segments: int, distance: Tensor) -> None:
        """Count a batch: correct (B,) bool, distance (B,)."""
        self.right[num_segments].index_add_(0, distance, correct.long())
        self.seen[num_segments].index_add_(0, distance, torch.ones_like(distance))

    def compute(self) -> dict[str, Tensor]:
        """Accuracy of every slice that has been seen."""
        slices = {f"segments_{n}": (self.right[n], self.seen[n]) for n in range(len(self.seen))}
        slices |= {f"distance_{d}": (self.right[:, d], self.seen[:, d]) for d in range(self.seen.shape[1])}
        return {name: right.sum() / seen.sum() for name, (right, seen) in slices.items() if seen.sum() > 0}


class FactModule(SegmentModule, ABC):
    """A recurrent model that learns to answer.

    Args:
        model: reads segments.
        answers: the C of them, which are saved in checkpoints.
        optimization: how to train.
        max_segments: N, the longest input in training and validation.
        seed: of dropout.
        all_questions: whether a training sample is asked all that the task could ask about its facts, or one question.
            Each more is one more reading of the last segment, and a gradient for facts that the first one leaves aside.

    Raises:
        UserError: if the model's bptt_depth is 0: one loss after the last segment teaches it nothing about memory.
    """

    def __init__(
        self,
        model: SegmentModel[Any],
        answers: Sequence[str],
        optimization: WarmupDecay,
        max_segments: int,
        seed: int = 0,
        all_questions: bool = False,
    ) -> None:
        if model.bptt_depth == 0:
            raise UserError("model.bptt_depth=0: memory would never learn; give 1 or more, or -1 for all segments")
        super().__init__(model, optimization, seed)
        self.answers = tuple(answers)
        self.all_questions = all_questions
        self.accuracy = SlicedAccuracy(max_segments)

    @abstractmethod
    def forward(self, input_ids: Any, attention_mask: Tensor | None = None) -> Tensor:
        """Scores (B, C or more), the largest of which stands for what is answered; takes whatever the model takes."""

    @abstractmethod
    def answer(self, end: Reading[Any], label: Tensor) -> tuple[Tensor, Tensor]:
        """The loss and which answers are right (B,), from what is known at the end; the label -1 asks nothing."""

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """The loss, which answers are right (B,), and the state before each segment, for those who carry states on.

        A batch may bring the state to start from. Right is who answers the question that ends the input.
        """
        state = batch["state"] if "state" in batch else self.model.initial_state(len(batch["label"]))
        states = [state]
        for reading in self.model.read(batch["input_ids"], state=state):
            states.append(reading.state)
        loss, right = self.answer(reading, batch["label"])
        others = batch["questions"].shape[1] - 1
        if self.all_questions and others:
            loss = (loss + others * self._loss_of_others(batch, reading, states[-2])) / (1 + others)
        self.checked(loss)
        self.log("train/loss", loss.detach())
        return {"loss": loss, "right": right, "states": states[:-1]}

    def _loss_of_others(self, batch: dict[str, Any], end: Reading[Any], state: Any) -> Tensor:
        """The mean loss of all questions but the first, each written over the end of what was read last, after `state`.

        Where one is shorter than the first, a word of that remains before it.
        """
        last = end.segment.input_ids[:, None]
        questions, answers = batch["questions"][:, 1:], batch["answers"][:, 1:]
        # Lessons have shorter segments, and full attention reads all of them as one.
        questions = nn.functional.pad(questions, (last.shape[2] - questions.shape[2], 0), value=-1)
        asked = torch.where(questions >= 0, questions, last).flatten(0, 1)
        before = tree_map_only(Tensor, lambda part: part.repeat_interleave(questions.shape[1], dim=0), state)
        return self.answer(next(self.model.read(asked[:, None], state=before)), answers.flatten())[0]

    def on_train_batch_end(self, outputs: Any, batch: dict[str, Tensor], batch_idx: int) -> None:
        samples, segments, _ = batch["input_ids"].shape
        self.log_speed(samples * segments * data_of(self.trainer).segment_length)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        correct = self(batch["input_ids"]).argmax(dim=1) == batch["label"]
        self.accuracy.update(correct, batch["input_ids"].shape[1], batch["distance"])

    def on_validation_epoch_end(self) -> None:
        accuracy = self.accuracy.compute()
        self.accuracy.reset()
        # The longest inputs of a validation are those of the stage.
        longest = max((name for name in accuracy if name.startswith("segments_")), key=lambda name: int(name[9:]))
        self.log("val/accuracy", accuracy[longest])
        self.log_dict({f"val/accuracy_{name}": value for name, value in accuracy.items()})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["answers"] = list(self.answers)

    def configure_optimizers(self) -> Any:
        optimizer, schedule = self.optimization.build(self.parameters(), data_of(self.trainer).num_segments)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class FactClassifier(FactModule):
    """A linear head reads the answer after the last segment. The arguments are those of `FactModule`."""

    def __init__(
        self,
        model: SegmentModel[Any],
        answers: Sequence[str],
        optimization: WarmupDecay,
        max_segments: int,
        seed: int = 0,
        all_questions: bool = False,
    ) -> None:
        super().__init__(model, answers, optimization, max_segments, seed, all_questions)
        self.head = nn.Linear(model.width, len(answers))

    def forward(self, input_ids: Any, attention_mask: Tensor | None = None) -> Tensor:
        """Scores (B, C) of the answers; takes whatever the model takes."""
        return self.score(self.model.encode(input_ids, attention_mask))

    def score(self, summary: Tensor) -> Tensor:
        """Scores (B, C) from what the model has read, (B, D)."""
        scores: Tensor = self.head(summary.to(self.head.weight.dtype))
        return scores

    def answer(self, end: Reading[Any], label: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.score(self.model.readout(end.hidden, end.segment))
        return nn.functional.cross_entropy(scores, label, ignore_index=-1), scores.argmax(dim=1) == label
