"""How the next memory comes out of what was written and the memory before.

Shapes: B batch, M memory tokens, D width of the hidden states.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn


class Update(nn.Module, ABC):
    """How the next memory comes out of what a segment has written and the memory before it.

    To add one, write a class whose constructor takes the width D, and what else it likes by name, and one yaml in
    conf/model.update/.
    """

    @abstractmethod
    def forward(self, written: Tensor, memory: Tensor) -> Tensor:
        """Two of (B, M, D) -> (B, M, D)."""


class Replace(Update):
    """What is written takes the place of what was there, as published (RMT-2022 and RMT-2023).

    Args:
        width: D.
    """

    def __init__(self, width: int) -> None:
        super().__init__()

    def forward(self, written: Tensor, memory: Tensor) -> Tensor:
        return written


class Gated(Update):
    """A learned gate decides for each number of each memory token how much of it is kept.

    ```
    g = sigmoid(W [written ∘ memory] + b)      memory' = g · memory + (1 - g) · written
    ```

    After Hutchins et al. 2022, arXiv 2203.07852, section 3, whose recurrence over blocks of text learns better with
    gates. It begins with b = 0, about half of each.

    Args:
        width: D.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(2 * width, width)
        nn.init.zeros_(self.gate.bias)

    def forward(self, written: Tensor, memory: Tensor) -> Tensor:
        kept = self.gate(torch.cat([written, memory], dim=-1)).sigmoid()
        return kept * memory + (1 - kept) * written
