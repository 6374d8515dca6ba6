"""Language modelling: the loss of every segment, while the state is carried through the document.

Shapes: B batch, T segments, S text tokens of a segment, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from rmt_lightning.core.errors import UserError
from rmt_lightning.models import state as tree
from rmt_lightning.models.recurrence import Segment, unroll
from rmt_lightning.models.segment_model import SegmentModel, touch
from rmt_lightning.tasks.language import IGNORED
from rmt_lightning.training.metrics import TextLoss
from rmt_lightning.training.module import SegmentModule
from rmt_lightning.training.optimization import WarmupDecay
from rmt_lightning.training.phases.phase import Phases


class Piece(NamedTuple):
    """One segment of running text.

    Attributes:
        segment: what is read.
        targets: (B, S) the tokens to predict; IGNORED where there is none.
        starts: (B,) whether a document begins here.
    """

    segment: Segment
    targets: Tensor
    starts: Tensor


class LanguageModeler(SegmentModule):
    """Trains a causal segment model on running text (RMT-2022, section 4).

    A training step reads the next T segments of every row and adds up the losses of all of them. The state goes on
    into the next step without its gradient, and is the first one again where a document begins.

    With `bptt_depth` k of the model, the T segments are read in windows of k + 1, and the state enters a window without
    gradient. So the loss of a segment flows back over 0 to k borders, k / 2 on average; with k = 0 memory is passed on
    and never trained to be of use later, and -1 makes one window of all T.

    Args:
        model: turns a segment into hidden states, and these into scores of the next token.
        phases: what it is led through; None: the phases among the callbacks of its Trainer.
        metrics: of validation; they may ask for nats, num_tokens and num_bytes of documents, each (B,).
        optimization: of the weights, unless phases know.

    Raises:
        UserError: if the model does not predict tokens, or its state grows.
    """

    DECISIVE = "text"

    def __init__(
        self,
        model: SegmentModel[Any],
        phases: Phases | None = None,
        metrics: Mapping[str, Metric] | None = None,
        optimization: WarmupDecay | None = None,
    ) -> None:
        if not model.predicts:
            raise UserError(
                f"task=language_modeling: a {type(model).__name__} does not predict the next token; choose a causal "
                "model, such as model=transformer_xl"
            )
        if model.grows:
            raise UserError(
                f"task=language_modeling: the state of a {type(model).__name__} grows with each segment, and "
                "running text goes on and on; choose another model, such as model=rmt_decoder"
            )
        if (schedule := getattr(model, "schedule", "vertical")) != "vertical":
            raise UserError(
                f"model.schedule={schedule}: running text is read segment by segment, for documents begin anywhere in "
                "it; leave it at vertical"
            )
        counts = torch.tensor([3, 4])
        offered = {"nats": counts.float(), "num_tokens": counts, "num_bytes": 5 * counts}
        super().__init__(model, phases, metrics, lambda _: offered, optimization)
        # What the last training step has left; and a checkpoint: the rows of all ranks, one after another.
        self._state: Any = None
        self._saved: list[Tensor] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        if self._state is None:
            self._state = self._resumed_state(len(batch["starts"]))
        readings = list(self._read(batch, self._state))
        self._state = tree.detach(readings[-1][1])
        total = torch.stack([losses.sum() for losses, _ in readings]).sum()
        self.log("train/loss", total.detach() / (batch["targets"] != IGNORED).sum())
        # Every token weighs the same in every step and on every rank, however many of them are padding.
        return self.checked(total / batch["targets"].numel())

    def on_train_batch_end(self, outputs: Any, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log_speed(len(batch["starts"]) * batch["starts"].shape[1] * self.data.segment_length)

    def nats(self, batch: dict[str, Tensor]) -> Tensor:
        """Negative log-likelihood of whole documents, (B,)."""
        readings = self._read(batch, self.model.initial_state(len(batch["starts"])))
        return torch.stack([losses.sum(dim=1) for losses, _ in readings]).sum(dim=0)

    def default_metrics(self) -> dict[str, Metric]:
        return {"text": TextLoss()}

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._measure(batch, self.metrics)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._measure(batch, self.tested)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Negative log-likelihood of whole documents, (B,)."""
        return self.nats(batch)

    def _measure(self, batch: dict[str, Tensor], metrics: MetricCollection) -> None:
        tokens = (batch["targets"] != IGNORED).sum(dim=(1, 2))
        metrics.update(nats=self.nats(batch), num_tokens=tokens, num_bytes=batch["bytes"])

    def _read(self, batch: dict[str, Tensor], state: Any) -> Iterator[tuple[Tensor, Any]]:
        """Yield the losses (B, S) of each segment and the state after it."""
        parts = (batch[name].unbind(dim=1) for name in ("input_ids", "targets", "starts"))
        pieces = (
            Piece(Segment(ids, (targets != IGNORED).long()), targets, starts)
            for ids, targets, starts in zip(*parts, strict=True)
        )
        depth, checkpointing = self.model.bptt_depth, self.model.gradient_checkpointing
        size = batch["starts"].shape[1] if depth < 0 else depth + 1
        while window := list(islice(pieces, size)):
            segments = self.model.looked_up([piece.segment for piece in window])
            window = [piece._replace(segment=segment) for piece, segment in zip(window, segments, strict=True)]
            readings = unroll(self._step, window, tree.detach(state), checkpointing=checkpointing)
            for losses, state in readings:
                yield losses, state

    def _step(self, piece: Piece, state: Any) -> tuple[Tensor, Any]:
        """Read one segment, from the first state where a document begins: its losses in nats (B, S), the next state."""
        state = tree.where(piece.starts, self.model.initial_state(len(piece.starts)), state)
        hidden, state = self.model.step(piece.segment, state)
        hidden = touch(hidden, self.model.trained_state())
        scores = self.model.logits(hidden).flatten(0, 1)
        losses = nn.functional.cross_entropy(scores, piece.targets.flatten(), ignore_index=IGNORED, reduction="none")
        return losses.view_as(piece.targets), state

    def _resumed_state(self, batch_size: int) -> Any:
        """The state of this rank's rows. A row that the checkpoint does not know begins with the first state."""
        state = self.model.initial_state(batch_size)
        first = tree.leaves(state)
        offset = self.global_rank * batch_size
        for number, saved in enumerate(self.model.saved_state(self._saved) if self._saved else ()):
            mine = saved[offset : offset + batch_size].to(self.device)
            if mine.shape[1:] == first[number].shape[1:]:
                first[number] = torch.cat([mine, first[number][len(mine) :]])
        return tree.rebuild(state, first)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        leaves = tree.leaves(self._state)
        if self.trainer.world_size > 1:
            leaves = [leaf.flatten(0, 1) for leaf in cast(list[Tensor], self.all_gather(leaves))]
        checkpoint["state"] = leaves

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._saved = checkpoint["state"]
