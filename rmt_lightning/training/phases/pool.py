"""Memories on their way from step to step: what is known of them, and the pool in which they wait.

Shapes: B batch, S text tokens of a segment, P memories in the pool, L segments of the longest inputs, Q questions about
a sample, A tokens of the longest answer.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rmt_lightning.models import state as tree


class Memories(NamedTuple):
    """Memories on their way, and what is known of them.

    Attributes:
        state: a tree of (B, …).
        waits: (B,) for how many of the last segments of their stories they wait.
        story: (B, L, S) all that their samples tell, from the first fact on, its end at the end; -1 is noise.
        gap: (B,) segments from the last fact to the question.
        questions: (B, Q, S) the question that ends the story, and all others.
        answers: (B, Q, A) to them.
    """

    state: Any
    waits: Tensor
    story: Tensor
    gap: Tensor
    questions: Tensor
    answers: Tensor


class Plan(NamedTuple):
    """What is to become of the samples of a batch; fields as in `Memories` and `FactBatch`.

    Attributes:
        late: (B,) bool, whether an old memory is told facts that it does not know yet.
    """

    story: Tensor
    gap: Tensor
    questions: Tensor
    answers: Tensor
    first_told: Tensor
    border: Tensor
    late: Tensor


class Pool:
    """Places for memories, or other trees of (P, …), with their ages in segments; age -1 marks a free place.

    Args:
        size: P.
        like: what is to be kept, for some batch.
    """

    def __init__(self, size: int, like: Any) -> None:
        self.content = tree.empty(like, size)
        self.age = torch.full((size,), -1, device=tree.leaves(like)[0].device)

    def draw(self, count: int, random: torch.Generator, among: Tensor | bool = True) -> Tensor:
        """The places of at most `count` memories, of all or `among` some (P,)."""
        wanted = (self.age >= 0) & among
        order = torch.randperm(len(self.age), generator=random).to(self.age.device)
        return order[wanted[order]][:count]

    def take(self, places: Tensor) -> Any:
        return tree.take(self.content, places)

    def put_back(self, places: Tensor, content: Any, age: Tensor, kept: Tensor) -> None:
        """Give places what is in them now, or free those that are not kept."""
        tree.put(self.content, places, content)
        self.age[places] = torch.where(kept, age, -1)

    def admit(self, content: Any, age: Tensor, wanted: Tensor) -> None:
        """Let in what is wanted, as far as there is room."""
        free = torch.nonzero(self.age < 0).flatten()
        rows = torch.nonzero(wanted).flatten()[: len(free)]
        self.put_back(free[: len(rows)], tree.take(content, rows), age[rows], wanted[rows])

    def to(self, device: torch.device) -> None:
        self.age, self.content = self.age.to(device), tree.map(lambda part: part.to(device), self.content)

    def tensors(self) -> list[Tensor]:
        return [self.age, *tree.leaves(self.content)]

    def load(self, tensors: list[Tensor]) -> None:
        """Take in what another pool has held, as far as there is room; nothing if it was of another kind."""
        own = self.tensors()
        if [part.shape[1:] for part in tensors] != [part.shape[1:] for part in own]:
            return
        for here, saved in zip(own, tensors, strict=True):
            here[: len(saved)] = saved[: len(here)]
