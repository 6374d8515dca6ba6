"""States as trees: each function on every kind of state, against the same done by hand tensor by tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rmt_lightning.models import state as tree
from rmt_lightning.models.armt import Association
from rmt_lightning.models.baselines.lstm import LSTMState
from rmt_lightning.models.baselines.memory_network import Sentences
from rmt_lightning.models.baselines.ntm import Machine
from rmt_lightning.models.layer_memory import LayerState
from rmt_lightning.models.recurrence import Segment
from rmt_lightning.models.transformer_xl import XLState


def make(kind: str, size: int, seed: int = 0) -> Any:
    def new(*shape: int) -> Tensor:
        return torch.randn(size, *shape, generator=torch.Generator().manual_seed(seed + sum(shape)))

    counts = torch.arange(size) + seed
    return {
        "memory": lambda: new(3, 4),
        "lstm": lambda: LSTMState(new(2, 4), new(2, 5)),
        "ntm": lambda: Machine(new(5, 2), new(1, 5), new(2, 5), new(1, 2), new(4), new(6)),
        "sentences": lambda: Sentences(new(3, 2, 4), counts),
        "transformer-xl": lambda: XLState((new(3, 4), new(3, 4)), counts, new(2, 4)),
        "text": lambda: Segment(counts[:, None].repeat(1, 3)),  # its mask is None
        "associations": lambda: LayerState((Association(new(1, 6, 2), new(1, 6)), Association(new(1, 6, 2), None))),
        "layers": lambda: ((new(2), new(3)), [new(4)], {"age": counts}),
    }[kind]()


KINDS = ("memory", "lstm", "ntm", "sentences", "transformer-xl", "associations", "text", "layers")
every_kind = pytest.mark.parametrize("kind", KINDS)


def assert_equal(found: Any, expected: Any, like: Any) -> None:
    """`expected` are leaves; the form is that of `like`."""
    assert type(found) is type(like)
    assert [part.dtype for part in tree.leaves(found)] == [part.dtype for part in tree.leaves(like)]
    for one, other in zip(tree.leaves(found), expected, strict=True):
        assert torch.equal(one, other)


@every_kind
def test_rows(kind: str) -> None:
    state, other = make(kind, 5), make(kind, 5, seed=9)
    parts, others = tree.leaves(state), tree.leaves(other)
    rows, mask = torch.tensor([3, 0]), torch.tensor([True, False, False, True, False])
    assert_equal(tree.take(state, rows), [torch.stack([part[3], part[0]]) for part in parts], state)
    assert_equal(tree.take(state, slice(1, 3)), [part[1:3] for part in parts], state)
    assert_equal(tree.take(state, mask), [part[[0, 3]] for part in parts], state)
    chosen = [torch.stack([b[0], a[1], a[2], b[3], a[4]]) for a, b in zip(parts, others, strict=True)]
    assert_equal(tree.where(mask, other, state), chosen, state)
    repeated = [torch.stack([row for row in part for _ in range(3)]) for part in parts]
    assert_equal(tree.repeat(state, 3), repeated, state)
    assert_equal(tree.concat([other, state]), [torch.cat(pair) for pair in zip(others, parts, strict=True)], state)
    assert_equal(tree.empty(state, 2), [torch.zeros_like(part[:2]) for part in parts], state)
    doubled = tree.map(lambda one, two: one + two, state, state)
    assert_equal(doubled, [part + part for part in parts], state)


@every_kind
def test_written_in_place(kind: str) -> None:
    state, new = make(kind, 5), make(kind, 2, seed=9)
    parts = tree.leaves(state)
    before = [part.clone() for part in parts]
    tree.put(state, torch.tensor([3, 1]), new)
    for part, old, (second, first) in zip(parts, before, tree.leaves(new), strict=True):
        assert torch.equal(part, torch.stack([old[0], first, old[2], second, old[4]]))
    tree.put(state, slice(1, 3), new)
    assert all(torch.equal(part[1:3], row) for part, row in zip(parts, tree.leaves(new), strict=True))


def test_what_has_grown_is_filled_up() -> None:
    rows = torch.tensor([True, False])
    new, old = (torch.ones(2, 3, 1), torch.ones(2, 3, dtype=torch.bool)), (torch.ones(2, 1, 1), torch.ones(2, 1) > 0)
    for one, other in ((new, old), (old, new)):
        values, known = tree.where(rows, one, other)
        assert values.shape == (2, 3, 1) and torch.equal(values[..., 0] == 1, known)
        assert sorted(known.sum(dim=1).tolist()) == [1, 3]


@every_kind
def test_the_state_of_each_row_at_a_time_of_its_own(kind: str) -> None:
    states = [make(kind, 3, seed=10 * time) for time in range(4)]
    columns = zip(*map(tree.leaves, states), strict=True)
    expected = [torch.stack([parts[2][0], parts[0][1], parts[3][2]]) for parts in columns]
    assert_equal(tree.at(states, torch.tensor([2, 0, 3])), expected, states[0])


@every_kind
def test_to_a_checkpoint_and_back(kind: str, tmp_path: Path) -> None:
    state = make(kind, 5)
    torch.save(tree.leaves(state), tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    assert_equal(tree.rebuild(make(kind, 2), loaded), tree.leaves(state), state)
    with pytest.raises(ValueError, match="9 tensors do not make"):
        tree.rebuild(state, loaded[:1] * 9)


def test_gradients() -> None:
    weight = torch.ones(3, 2, requires_grad=True)
    state = LSTMState(weight * 2, weight * 3)
    mask = torch.tensor([True, False, False])
    tree.where(mask, state, tree.detach(state)).cell.sum().backward()
    assert weight.grad is not None and weight.grad.tolist() == [[3, 3], [0, 0], [0, 0]]
    assert all(part.requires_grad for part in tree.leaves(tree.repeat(state, 2)))
    assert not any(part.requires_grad for part in tree.leaves((tree.detach(state), tree.empty(state, 4))))


def test_what_is_written_takes_the_precision_of_the_place() -> None:
    state = (torch.zeros(2, 1), torch.zeros(2, dtype=torch.long))
    tree.put(state, slice(1), (torch.ones(1, 1, dtype=torch.bfloat16), torch.ones(1, dtype=torch.int32)))
    assert [part.dtype for part in state] == [torch.float32, torch.long] and state[1].tolist() == [1, 0]
