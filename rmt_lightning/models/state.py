"""States are trees of tensors whose first dimension is the batch; here alone they are taken apart and put together.

A state is a tensor, or a tuple, NamedTuple, list or dict of states. What is no tensor, such as the None of a segment
without padding, is left as it is. Meant to be imported as `from rmt_lightning.models import state as tree`.

Shapes: B batch, T segments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

State = TypeVar("State")


def map(function: Callable[..., Any], state: State, *others: State) -> State:
    """The state whose tensors are what a function makes of those at the same place in one state or several."""
    return tree_map(lambda part, *rest: function(part, *rest) if isinstance(part, Tensor) else part, state, *others)


def where(rows: Tensor, new: State, old: State) -> State:
    """`new` in the rows that are chosen, (B,) bool, and `old` in the others.

    What has grown meanwhile, (B, N, …), is filled up with zeros in the others.
    """

    def choose(one: Tensor, other: Tensor) -> Tensor:
        if one.dim() > 1 and (longest := max(one.shape[1], other.shape[1])) > min(one.shape[1], other.shape[1]):
            one, other = (_filled(part, longest) for part in (one, other))
        return torch.where(rows.view(-1, *[1] * (one.dim() - 1)), one, other)

    return map(choose, new, old)


def _filled(part: Tensor, length: int) -> Tensor:
    missing = part.new_zeros(len(part), length - part.shape[1], *part.shape[2:])
    return torch.cat([part, missing], dim=1)


def take(state: State, rows: Tensor | slice) -> State:
    """Some of the rows, by their numbers, a mask or a slice."""
    return map(lambda part: part[rows], state)


def put(state: State, rows: Tensor | slice, new: State) -> None:
    """Write over some of the rows, in place and in the precision that is there."""
    map(lambda part, other: part.__setitem__(rows, other.to(part)), state, new)


def repeat(state: State, times: int) -> State:
    """Each row so many times, one copy after the other."""
    return map(lambda part: part.repeat_interleave(times, dim=0), state)


def concat(states: Sequence[State]) -> State:
    """The rows of all states, one after the other."""
    return map(lambda *parts: torch.cat(parts), *states)


def at(states: Sequence[State], number: Tensor) -> State:
    """Of T states, for each row the one with a number, (B,) from 0 to T - 1."""
    rows = torch.arange(len(number), device=number.device)
    return map(lambda *parts: torch.stack(parts)[number, rows], *states)


def empty(like: State, size: int) -> State:
    """Zeros for a batch of another size, without gradient."""
    return map(lambda part: part.detach().new_zeros(size, *part.shape[1:]), like)


def detach(state: State) -> State:
    """The same without its gradient."""
    return map(Tensor.detach, state)


def size(state: State) -> int:
    """How many bytes it takes."""
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves(state))


def leaves(state: Any) -> list[Tensor]:
    """The tensors of a state in order: what a checkpoint keeps, for it opens no classes."""
    return [part for part in tree_leaves(state) if isinstance(part, Tensor)]


def parts(of: Any) -> tuple[list[Any], Any]:
    """All that stands in a tree, whatever it is, and the form of the tree."""
    return tree_flatten(of)


def whole(parts: Sequence[Any], form: Any) -> Any:
    """The tree of a form in which these `parts` stand."""
    return tree_unflatten(parts, form)


def rebuild(like: State, leaves: Sequence[Tensor]) -> State:
    """The state of the same form as `like` whose `leaves` these are.

    Raises:
        ValueError: if there are more or fewer of them.
    """
    there, form = tree_flatten(like)
    if len(leaves) != sum(isinstance(part, Tensor) for part in there):
        raise ValueError(f"{len(leaves)} tensors do not make a {type(like).__name__}")
    given = iter(leaves)
    made: State = tree_unflatten([next(given) if isinstance(part, Tensor) else part for part in there], form)
    return made
