"""What models with memory tokens have in common: where these stand, and how the next memory comes about.

Shapes: B batch, S text tokens of a segment, M memory tokens, D width of the hidden states.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rmt_lightning.core.errors import UserError


class Layout(NamedTuple):
    """What stands where among the tokens that a layer sees of a segment.

    Attributes:
        blocks: names and sizes, in order. One is called "text", and those of memory tokens end in "memory".
        written: the block whose last hidden states are what the segment writes.
    """

    blocks: tuple[tuple[str, int], ...]
    written: str

    def place(self, name: str) -> slice:
        """Where the block of that name stands; the first one, if there are several."""
        start = 0
        for block, size in self.blocks:
            if block == name:
                return slice(start, start + size)
            start += size
        raise KeyError(name)


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


class MemoryTokens(ABC):
    """A model whose state is or holds a memory, (B, M, D), which stands among the tokens of the next segment."""

    memory: nn.Parameter
    update: Update

    @property
    def memory_size(self) -> int:
        return self.memory.shape[0]

    @abstractmethod
    def layout(self, length: int) -> Layout:
        """What a layer sees of a segment with so many tokens of text."""

    @abstractmethod
    def memory_of(self, state: Any) -> Tensor:
        """The memory (B, M, D) in a state."""

    def make_update(self, update: Callable[[int], Update], width: int) -> Update:
        """An update for memory tokens of that width.

        Raises:
            UserError: if there are none of them, which only the published update does not mind.
        """
        made = update(width)
        if not self.memory_size and not isinstance(made, Replace):
            raise UserError("model.memory_size=0: leaves nothing to update; give 1 or more, or leave out model.update=")
        return made

    def next_memory(self, written: Tensor, memory: Tensor) -> Tensor:
        """The memory after a segment. Under autocast hidden states are bf16, while memory keeps its precision."""
        updated: Tensor = self.update(written.to(memory.dtype), memory)
        return updated.to(memory.dtype)

    def trained_state(self) -> list[nn.Parameter]:
        return [self.memory, *self.update.parameters()]
