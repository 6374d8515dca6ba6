"""What a validation measures, beside the loss. Any metric of torchmetrics may stand beside these (see conf/metrics/).

Shapes: B batch, N longest number of segments.
"""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Ge, Le
from torch import Tensor
from torchmetrics import Metric

from rmt_lightning.tasks.datamodule import MOST_SEGMENTS
from rmt_lightning.tasks.language import TextScore


class SlicedAccuracy(Metric):
    """Accuracy on the longest inputs, and by number of segments and by distance from fact to question.

    Args:
        longest: N.
    """

    full_state_update = False
    segments: Tensor
    distances: Tensor

    def __init__(self, longest: Annotated[int, Ge(1), Le(MOST_SEGMENTS)] = MOST_SEGMENTS) -> None:
        super().__init__()
        # How many were right, and how many there were: (2, N + 1) by number of segments, (2, N) by distance.
        self.add_state("segments", torch.zeros(2, longest + 1, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("distances", torch.zeros(2, longest, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, right: Tensor, num_segments: int, distance: Tensor) -> None:
        """Count a batch: right (B,) bool, distance (B,)."""
        counts = torch.stack([right.long(), torch.ones_like(distance)])
        self.segments[:, num_segments] += counts.sum(dim=1)
        self.distances.index_add_(1, distance, counts)

    def compute(self) -> dict[str, Tensor]:
        """Accuracy of every slice that has been seen, and of the longest one."""
        found = {}
        for kind, (right, seen) in (("segments", self.segments), ("distance", self.distances)):
            for number in seen.nonzero().flatten().tolist():
                found[f"accuracy_{kind}_{number}"] = right[number] / seen[number]
        longest = int(self.segments[1].nonzero().max())
        return {"accuracy": found[f"accuracy_segments_{longest}"]} | found


class Answered(Metric):
    """The share of right answers."""

    full_state_update = False
    counts: Tensor

    def __init__(self) -> None:
        super().__init__()
        # How many were right, and how many there were.
        self.add_state("counts", torch.zeros(2, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, right: Tensor) -> None:
        """Count a batch: right (B,) bool."""
        self.counts += torch.stack([right.sum(), torch.tensor(len(right), device=right.device)])

    def compute(self) -> Tensor:
        return self.counts[0] / self.counts[1]


class TextLoss(Metric):
    """How well documents have been predicted: loss, perplexity and bits per byte."""

    full_state_update = False
    total: Tensor
    tokens: Tensor
    bytes: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("bytes", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, nats: Tensor, num_tokens: Tensor, num_bytes: Tensor) -> None:
        """Count documents: each (B,)."""
        self.total += nats.sum()
        self.tokens += num_tokens.sum()
        self.bytes += num_bytes.sum()

    def compute(self) -> dict[str, Tensor]:
        score = TextScore(self.total.item(), int(self.tokens), int(self.bytes))
        return {name: torch.tensor(getattr(score, name)) for name in ("loss", "perplexity", "bits_per_byte")}
