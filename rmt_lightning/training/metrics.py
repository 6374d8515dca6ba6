"""What a validation measures, beside the loss. Any metric of torchmetrics may stand beside these (see conf/metrics/).

Shapes: B batch, N longest number of segments.
"""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Ge, Le
from torch import Tensor
from torchmetrics import Metric

from rmt_lightning.tasks.language import TextScore


class SlicedAccuracy(Metric):
    """Accuracy on the longest inputs, and by number of segments and by distance from fact to question.

    Args:
        longest: N.
    """

    full_state_update = False
    rights: Tensor
    seen: Tensor

    def __init__(self, longest: Annotated[int, Ge(1), Le(4096)]) -> None:
        super().__init__()
        # Both (N + 1, N): rows are numbers of segments, columns are distances.
        self.add_state("rights", torch.zeros(longest + 1, longest, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("seen", torch.zeros(longest + 1, longest, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, right: Tensor, num_segments: int, distance: Tensor) -> None:
        """Count a batch: right (B,) bool, distance (B,)."""
        self.rights[num_segments].index_add_(0, distance, right.long())
        self.seen[num_segments].index_add_(0, distance, torch.ones_like(distance))

    def compute(self) -> dict[str, Tensor]:
        """Accuracy of every slice that has been seen, and of the longest one."""
        slices = {f"segments_{n}": (self.rights[n], self.seen[n]) for n in range(len(self.seen))}
        slices |= {f"distance_{d}": (self.rights[:, d], self.seen[:, d]) for d in range(self.seen.shape[1])}
        found = {f"accuracy_{name}": right.sum() / seen.sum() for name, (right, seen) in slices.items() if seen.any()}
        longest = max(n for n in range(len(self.seen)) if self.seen[n].any())
        return {"accuracy": found[f"accuracy_segments_{longest}"]} | found


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
