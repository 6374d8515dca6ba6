"""What models with memory tokens have in common: where these stand, and what becomes of them.

Shapes: B batch, M memory tokens, N tokens that a layer sees of a segment, L layers, H heads, D width of the hidden
states.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Generic, NamedTuple

import torch
from torch import Tensor, nn

from rmt_lightning.core.errors import UserError
from rmt_lightning.models.recurrence import State
from rmt_lightning.models.segment_model import WordModel
from rmt_lightning.models.update import Replace, Update


class Layout(NamedTuple):
    """What stands where among the tokens that a layer sees of a segment.

    Attributes:
        blocks: names and sizes, in order. One is called "text", and those of memory tokens end in "memory".
        written: the block whose last hidden states are what the segment writes.
        unread: the block whose tokens are seen, but see nothing themselves, if there is one: a cache.
    """

    blocks: tuple[tuple[str, int], ...]
    written: str
    unread: str = ""

    def place(self, name: str) -> slice:
        """Where the block of that name stands; the first one, if there are several."""
        start = 0
        for block, size in self.blocks:
            if block == name:
                return slice(start, start + size)
            start += size
        raise KeyError(name)

    @property
    def readers(self) -> Layout:
        """The same without the block that sees nothing."""
        return self._replace(blocks=tuple(block for block in self.blocks if block[0] != self.unread), unread="")


class MemoryTokens(WordModel[State], Generic[State]):
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
    def memory_of(self, state: State) -> Tensor:
        """The memory (B, M, D) in a state."""

    @abstractmethod
    def recorded(self) -> AbstractContextManager[list[Tensor]]:
        """While it is open, the list grows by the attention weights (L, B, H, N, N) of each segment that is read.

        Row i is how the token at place i of the `layout` distributes its attention; the rows of `unread` ones are zero.

        Raises:
            UserError: if the attention is sparse.
        """

    def make_update(self, update: Callable[[int], Update], width: int) -> Update:
        """An update for memory tokens of that width.

        Raises:
            UserError: if there are none of them, which only the published update does not mind, or if the update makes
                something else of them.
        """
        made = update(width)
        with torch.no_grad(), torch.random.fork_rng([]):
            memory = torch.zeros(2, self.memory_size, width)
            after = made(memory, memory)
        if not isinstance(after, Tensor) or after.shape != memory.shape:
            found = tuple(after.shape) if isinstance(after, Tensor) else type(after).__name__
            raise UserError(
                f"model.update: a {type(made).__name__} makes {found} of memories of shape {tuple(memory.shape)}; let "
                "it return one of the same shape"
            )
        if not self.memory_size and not isinstance(made, Replace):
            raise UserError("model.memory_size=0: leaves nothing to update; give 1 or more, or leave out model.update=")
        return made

    def next_memory(self, written: Tensor, memory: Tensor) -> Tensor:
        """The memory after a segment. Under autocast hidden states are bf16, while memory keeps its precision."""
        # A copy: what is cut out of the hidden states would keep all of them in memory.
        updated: Tensor = self.update(written.to(memory.dtype, copy=True), memory)
        return updated.to(memory.dtype)

    def trained_state(self) -> list[nn.Parameter]:
        return [self.memory, *self.update.parameters()]
