"""The fact tasks: one answer after the last segment. A linear head chooses it.

Shapes: B batch, T segments, S text tokens of a segment, N tokens of the longest text, C answers, A tokens of the
longest answer, Q questions about a sample.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torchmetrics import MeanMetric, Metric, MetricCollection

from rmt_lightning.core.errors import UserError
from rmt_lightning.core.tokens import plain_ids, token_ids
from rmt_lightning.models import state as tree
from rmt_lightning.models.recurrence import Segment
from rmt_lightning.models.segment_model import Reading, SegmentModel
from rmt_lightning.tasks.datamodule import FactBatch, SampleDataModule
from rmt_lightning.tasks.labeled_texts import TextBatch, TextDataModule
from rmt_lightning.training.metrics import Answered, SlicedAccuracy
from rmt_lightning.training.module import SegmentModule
from rmt_lightning.training.optimization import WarmupDecay
from rmt_lightning.training.phases.phase import Outcome, Phases

# With how many answers metrics are tried: of open ones there may be very many.
_TRIED = 256


class Judgment(NamedTuple):
    """How the end of some inputs has been answered.

    Attributes:
        loss: the mean over those that ask something.
        scores: (B, C), the largest of which stands for what is answered.
        right: (B,) bool.
    """

    loss: Tensor
    scores: Tensor
    right: Tensor


def _validated(answers: int, phases: Phases | None) -> dict[str, Any]:
    """What the longest validation may have for metrics: each answer, or some of many, is wanted twice, given once."""
    longest = max((phase.longest for phase in phases or ()), default=1)
    tried = min(answers, _TRIED)
    target = torch.arange(tried).repeat(2)
    given = torch.cat([target[:tried], (target[tried:] + 1) % tried])
    scores = nn.functional.one_hot(given, answers).float()
    distance = torch.full_like(target, longest - 1)
    return {"right": given == target, "num_segments": longest, "distance": distance, "preds": scores, "target": target}


class Asked(NamedTuple):
    """Inputs with the answers that are wanted.

    Attributes:
        inputs: what the model reads.
        answer: (B, A) token ids, with -1 after their ends.
        num_segments: T.
        distance: (B,) segments between the first fact that is needed and the end.
    """

    inputs: Tensor | list[Segment]
    answer: Tensor
    num_segments: int
    distance: Tensor


class FactModule(SegmentModule, ABC):
    """A recurrent model that learns to answer.

    It is trained, validated and tested on the batches of a `FactDataModule` or a `TextDataModule`, or on those of any
    loader that are texts and labels: a list of B texts and one of B answers, or their places among the C answers.
    `Trainer.predict` takes lists of texts without labels too, and returns a list of answers for each batch.

    Args:
        model: reads segments.
        answers: the C texts that it may answer with, which are saved in checkpoints.
        phases: what it is led through; None: the phases among the callbacks of its Trainer, if there are any.
        metrics: of validation; they may ask for right (B,), num_segments, distance (B,), preds (B, C), target (B,).
        all_questions: whether a training sample is asked all that the task could ask about its facts, or one question.
            Each more is one more reading of the last segment, and a gradient for facts that the first one leaves aside.
        optimization: of the weights, unless phases know.

    Raises:
        UserError: if the model's bptt_depth is 0: one loss after the last segment teaches it nothing about memory; or
            if the tokenizer cannot tell two answers apart, or there is but one text instead of several.
    """

    DECISIVE = "accuracy"
    LOGGED = frozenset({"loss"})
    # Whether answers are written, not chosen.
    WRITES: ClassVar[bool] = False
    answer_ids: Tensor

    def __init__(
        self,
        model: SegmentModel[Any],
        answers: Sequence[str],
        phases: Phases | None = None,
        metrics: Mapping[str, Metric] | None = None,
        all_questions: bool = False,
        optimization: WarmupDecay | None = None,
    ) -> None:
        if model.bptt_depth == 0:
            raise UserError("model.bptt_depth=0: memory would never learn; give 1 or more, or -1 for all segments")
        if isinstance(answers, str):
            raise UserError(f"answers={answers}: is a single text; give a list of those that are chosen from")
        super().__init__(model, phases, metrics, partial(_validated, len(answers)), optimization)
        self.answers = tuple(answers)
        self.all_questions = all_questions
        self.val_loss = MeanMetric()
        assert model.tokenizer is not None
        self._tokenizer = model.tokenizer
        rows = [torch.tensor(row, dtype=torch.long) for row in token_ids(model.tokenizer, list(answers))]
        known: dict[tuple[int, ...], str] = {(): "nothing"}
        for answer, row in zip(answers, rows, strict=True):
            other = known.setdefault(tuple(row.tolist()), answer)
            # Who writes what looks alike has written both.
            if other is not answer and not (self.WRITES and row.numel()):
                raise UserError(
                    f"backbone: its tokenizer cannot tell two of the answers apart, {other} and {answer}; choose "
                    "another backbone, or other answers"
                )
        # (C, A), with -1 after their ends, as the data has them.
        self.register_buffer("answer_ids", nn.utils.rnn.pad_sequence(rows, True, -1), persistent=False)

    def classes(self, answer: Tensor) -> Tensor:
        """Which of the C answers each one is, (B, A) token ids -> (B,); -1 where that is none of them."""
        longest = max(answer.shape[1], self.answer_ids.shape[1])
        given, known = (
            nn.functional.pad(ids, (0, longest - ids.shape[1]), value=-1) for ids in (answer, self.answer_ids)
        )
        same = (given[:, None] == known).all(dim=2)
        return torch.where(same.any(dim=1), same.int().argmax(dim=1), -1)

    @abstractmethod
    def forward(self, input_ids: Any, attention_mask: Tensor | None = None) -> Tensor:
        """Scores (B, C or more), the largest of which stands for what is answered; takes whatever the model takes."""

    def say(self, segments: Iterable[Segment]) -> list[str | None]:
        """What is answered to inputs that come segment by segment, in words; None if that is no answer."""
        known = dict(enumerate(self.answers))
        return [known.get(best) for best in self(segments).argmax(dim=1).tolist()]

    @abstractmethod
    def judge(self, end: Reading[Any], answer: Tensor) -> Judgment:
        """How inputs, of which this is the end, are answered, if this is the answer (B, A); -1 asks nothing."""

    def default_metrics(self) -> dict[str, Metric]:
        by_length = self.led_by or isinstance(getattr(self._trainer, "datamodule", None), SampleDataModule)
        return {"accuracy": SlicedAccuracy() if by_length else Answered()}

    def setup(self, stage: str) -> None:
        """Look at the labels of a data module before they are trained on.

        Raises:
            UserError: if one is no answer.
        """
        data = getattr(self.trainer, "datamodule", None)
        for split, labels in data.placement.labels.items() if isinstance(data, TextDataModule) else ():
            for number, label in enumerate(labels):
                self._class(label, f"{split}[{number}]")

    def _class(self, label: Any, where: str) -> int:
        """The place of a label among the answers."""
        if isinstance(label, str) and label in self.answers:
            return self.answers.index(label)
        if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(self.answers):
            return label
        raise UserError(
            f"{where}: has the label {label!r:.40}; give one of {', '.join(self.answers[:8])}"
            f"{' …' if len(self.answers) > 8 else ''}, or its place from 0 to {len(self.answers) - 1}"
        )

    def _texts(self, texts: Sequence[str]) -> list[Segment]:
        """Texts, cut into segments."""
        if not texts or not all(isinstance(text, str) for text in texts):
            raise UserError(f"batch: holds {texts!r:.60}; give a list of texts, or texts and labels")
        ids = [torch.tensor(row, device=self.device) for row in plain_ids(self._tokenizer, list(texts))]
        mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
        return self.model.cut(pad_sequence(ids, batch_first=True), mask)

    def _asked(self, batch: Any) -> Asked:
        """What a batch asks, of any of the kinds that there are."""
        if isinstance(batch, FactBatch):
            return Asked(batch.input_ids, batch.answer, batch.input_ids.shape[1], batch.distance)
        if not isinstance(batch, Sequence) or len(batch) < 2 or isinstance(batch[0], str):
            raise UserError(f"batch: is {batch!r:.60}; give texts and labels, such as a loader of pairs makes of them")
        texts, labels = batch[:2]
        segments = self._texts(texts)
        labels = labels.tolist() if isinstance(labels, Tensor) else labels
        classes = [self._class(label, f"batch, row {row}") for row, label in enumerate(labels)]
        longest = batch.num_segments if isinstance(batch, TextBatch) else len(segments)
        return Asked(segments, self.answer_ids[classes], longest, torch.full((len(texts),), longest - 1))

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """The loss, and the `Outcome` for the phase."""
        state = None
        if self.led_by is not None:
            batch, state = self.led_by.start(batch, self.model, self.global_rank)
        asked = self._asked(batch)
        if state is None:
            state = self.model.initial_state(len(asked.answer))
        states = [state]
        for reading in self.model.read(asked.inputs, state=state):
            states.append(reading.state)
        verdict = self.judge(reading, asked.answer)
        loss = verdict.loss
        if self.all_questions and isinstance(batch, FactBatch) and (others := batch.questions.shape[1] - 1):
            loss = (loss + others * self._loss_of_others(batch, reading, states[-2])) / (1 + others)
        self.checked(loss)
        self.log("train/loss", loss.detach(), batch_size=len(asked.answer))
        return {"loss": loss, "outcome": Outcome(verdict.right, states[:-1])}

    def _loss_of_others(self, batch: FactBatch, end: Reading[Any], state: Any) -> Tensor:
        """The mean loss of all questions but the first, each written over the end of what was read last, after `state`.

        Where one is shorter than the first, a word of that remains before it.
        """
        last = end.segment.input_ids[:, None]
        questions, answers = batch.questions[:, 1:], batch.answers[:, 1:]
        # Lessons have shorter segments, and full attention reads all of them as one.
        questions = nn.functional.pad(questions, (last.shape[2] - questions.shape[2], 0), value=-1)
        asked = torch.where(questions >= 0, questions, last).flatten(0, 1)
        before = tree.repeat(state, questions.shape[1])
        return self.judge(next(self.model.read(asked[:, None], state=before)), answers.flatten(0, 1)).loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if isinstance(batch, FactBatch):
            samples, segments, _ = batch.input_ids.shape
            self.log_speed(samples * segments * self.data.segment_length)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        loss, count = self._measure(batch, self.metrics)
        self.val_loss.update(loss, weight=count)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._measure(batch, self.tested)

    def predict_step(self, batch: Any, batch_idx: int) -> list[str | None]:
        """What is answered to each of a batch; None if that is no answer."""
        # A list of texts in place of a loader yields one after another.
        batch = [batch] if isinstance(batch, str) else batch
        texts = not isinstance(batch, FactBatch) and len(batch) and isinstance(batch[0], str)
        inputs: Any = self._texts(batch) if texts else self._asked(batch).inputs
        return self.say(inputs)

    def _measure(self, batch: Any, metrics: MetricCollection) -> tuple[Tensor, int]:
        """Let metrics count a batch. Returns its loss, and how many inputs there are."""
        asked = self._asked(batch)
        for reading in self.model.read(asked.inputs):  # noqa: B007
            pass
        loss, scores, right = self.judge(reading, asked.answer)
        metrics.update(
            right=right,
            num_segments=asked.num_segments,
            distance=asked.distance.to(right.device),
            preds=scores,
            target=self.classes(asked.answer),
        )
        return loss, len(right)

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self.val_loss.reset()

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        self.log("val/loss", self.val_loss.compute())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["answers"] = list(self.answers)


class FactClassifier(FactModule):
    """A linear head chooses the answer after the last segment. The arguments are those of `FactModule`."""

    def __init__(
        self,
        model: SegmentModel[Any],
        answers: Sequence[str],
        phases: Phases | None = None,
        metrics: Mapping[str, Metric] | None = None,
        all_questions: bool = False,
        optimization: WarmupDecay | None = None,
    ) -> None:
        super().__init__(model, answers, phases, metrics, all_questions, optimization)
        self.head = nn.Linear(model.width, len(answers))

    def forward(self, input_ids: Any, attention_mask: Tensor | None = None) -> Tensor:
        """Scores (B, C) of the answers; takes whatever the model takes."""
        return self.score(self.model.encode(input_ids, attention_mask))

    def score(self, summary: Tensor) -> Tensor:
        """Scores (B, C) from what the model has read, (B, D)."""
        scores: Tensor = self.head(summary.to(self.head.weight.dtype))
        return scores

    def judge(self, end: Reading[Any], answer: Tensor) -> Judgment:
        scores, target = self.score(self.model.readout(end.hidden, end.segment)), self.classes(answer)
        loss = nn.functional.cross_entropy(scores, target, ignore_index=-1)
        return Judgment(loss, scores, scores.argmax(dim=1) == target)
