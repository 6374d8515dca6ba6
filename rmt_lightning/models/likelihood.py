"""How likely a text is, read segment by segment in constant memory.

Shapes: B batch, N tokens, S text tokens of a segment, K tokens that are scored, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rmt_lightning.models.generation import Writer
from rmt_lightning.models.recurrence import Segment, text_mask


class Likelihood(NamedTuple):
    """How likely the scored tokens of texts are.

    Attributes:
        log: (B,) the sum of their log-probabilities.
        greedy: (B,) bool, whether each of them is the likeliest.
    """

    log: Tensor
    greedy: Tensor


@torch.no_grad()
def likelihood(model: Writer, input_ids: Tensor, start: Tensor, attention_mask: Tensor | None = None) -> Likelihood:
    """How likely texts are from some token on, each token given all before it.

    Segments begin where those of training on running text do: the first token, which is not predicted, begins the first
    segment. Only scored tokens are compared with the vocabulary.

    Args:
        model: any model with `step` and `logits`, in evaluation mode.
        input_ids: (B, N), of any length, padded at the end.
        start: (B,) the places of the first tokens that are scored, 1 or more.
        attention_mask: (B, N), 1 for text.
    """
    there = text_mask(input_ids, attention_mask)[:, 1:]
    scored = there.bool() & (torch.arange(there.shape[1], device=there.device) >= start[:, None] - 1)
    read, targets, state = input_ids[:, :-1], input_ids[:, 1:], model.initial_state(len(input_ids))
    log = torch.zeros(len(input_ids), dtype=torch.float64, device=input_ids.device)
    greedy = torch.ones_like(log, dtype=torch.bool)
    for first in range(0, read.shape[1], model.text_length):
        here = slice(first, first + model.text_length)
        hidden, state = model.step(Segment(read[:, here], there[:, here]), state)
        rows, places = scored[:, here].nonzero(as_tuple=True)
        if len(rows):
            scores = model.logits(hidden[rows, places]).float().log_softmax(dim=-1)
            target = targets[:, here][rows, places]
            log.index_add_(0, rows, scores.gather(1, target[:, None])[:, 0].double())
            greedy[rows[scores.argmax(dim=1) != target]] = False
    return Likelihood(log, greedy)
