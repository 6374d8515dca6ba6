"""How well a language model predicts documents that it has not seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor

from rmt_lightning.tasks.facts import Split
from rmt_lightning.tasks.language import IGNORED, DocumentDataModule, TextScore


@dataclass(frozen=True)
class DocumentTest:
    """What to test at the end of a run.

    Attributes:
        documents: how many of the documents kept for the test; None for all.
    """

    documents: Annotated[int, Ge(1)] | None = None


@torch.inference_mode()
def evaluate_documents(
    nats: Callable[[dict[str, Tensor]], Tensor],
    data: DocumentDataModule,
    split: Split,
    documents: int | None,
    device: torch.device,
    on_batch: Callable[[], object] = lambda: None,
) -> dict[int, TextScore]:
    """The score of each document, by its number. Each is read from its start to its end.

    Args:
        nats: takes a batch of B documents, returns the negative log-likelihood of each (B,).
        data: where the documents come from.
        split: which of them.
        documents: how many at most.
        device: where batches are wanted.
        on_batch: called after each batch of documents.
    """
    scores = {}
    for batch in data.documents(split, documents):
        tokens = (batch["targets"] != IGNORED).sum(dim=(1, 2))
        found = nats({name: value.to(device) for name, value in batch.items()})
        for row in zip(batch["number"].tolist(), found.tolist(), tokens.tolist(), batch["bytes"].tolist(), strict=True):
            scores[row[0]] = TextScore(*row[1:])
        on_batch()
    return dict(sorted(scores.items()))


def total(scores: dict[int, TextScore]) -> TextScore:
    """The score of all documents together: of their tokens, not the mean of documents."""
    counts = [(score.nats, score.tokens, score.bytes) for score in scores.values()]
    return TextScore(*(sum(column) for column in zip(*counts, strict=True)))
