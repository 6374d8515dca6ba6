"""Models whose layers can be run one by one, and the orders in which the cells of a text can be run.

Shapes: B batch, T segments, N tokens that a layer sees, L layers, D width of the hidden states.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, groupby
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rmt_lightning.core.errors import UserError
from rmt_lightning.models import state as tree
from rmt_lightning.models.recurrence import Segment, first_with_gradient
from rmt_lightning.models.segment_model import SegmentModel
from rmt_lightning.models.stacked import Stack

Schedule = Literal["vertical", "horizontal", "diagonal"]


class LayerMajor(Protocol):
    """A state that has a part for each layer: a tree of (B, …) each."""

    @property
    def layers(self) -> tuple[Any, ...]: ...


LayeredState = TypeVar("LayeredState", bound=LayerMajor)
Made = TypeVar("Made")


class Cell(Protocol):
    """A layer that has been told all that it has to know of a segment: a NamedTuple of that, modules among it."""

    def __call__(self, hidden: Tensor, before: Any, /) -> tuple[Tensor, Any]:
        """From what it is given of the segment (B, N, D) and its state before to what it makes and its state after."""


class LayeredModel(SegmentModel[LayeredState], Generic[LayeredState]):
    """A segment model whose layers can be run one by one, each with a state of its own.

    A cell is a layer of a segment. It takes what the layer below makes of this segment, and the state that the same
    layer has left after the segment before. A schedule is an order of cells:

    ```
    vertical      segment by segment
    horizontal    layer by layer, over all segments, which must be known beforehand
    diagonal      layer l of segment s together with all other cells of the same l + s, for which the layers must differ
                  in nothing but their weights (arXiv 2506.05229)
    ```

    They lead to the same results if all that a segment takes from the one before is the states of its layers, and what
    can be told `ahead`.
    """

    schedule: Schedule = "vertical"

    @abstractmethod
    def enter(self, segment: Segment, state: LayeredState) -> tuple[Tensor, Any]:
        """What the first layer is given of a segment, and what all of its cells share."""

    @abstractmethod
    def cell(self, number: int, shared: Any) -> Cell:
        """A layer, told what it has to know of a segment."""

    @abstractmethod
    def leave(
        self, hidden: Tensor, layers: tuple[Any, ...], state: LayeredState, shared: Any
    ) -> tuple[Tensor, LayeredState]:
        """What `read_segment` returns, from what the last layer has made and the states of all layers after it."""

    def ahead(self, state: LayeredState, shared: Any) -> LayeredState:
        """The state after a segment, before its layers are run: as it will be but for `layers`."""
        return state

    def read_segment(self, segment: Segment, state: LayeredState) -> tuple[Tensor, LayeredState]:
        hidden, shared = self.enter(segment, state)
        hidden, layers = self.through(hidden, state.layers, shared)
        return self.leave(hidden, layers, state, shared)

    def through(self, hidden: Tensor, layers: tuple[Any, ...], shared: Any) -> tuple[Tensor, tuple[Any, ...]]:
        """Run all layers, with their states before: what the last one makes, and their states after."""
        after = []
        for number, before in enumerate(layers):
            hidden, left = self.cell(number, shared)(hidden, before)
            after.append(left)
        return hidden, tuple(after)

    def choose(self, schedule: Schedule) -> None:
        """Read by a schedule from now on.

        Raises:
            UserError: if the layers differ, and so cannot be run at once.
        """
        self.schedule = schedule

    def run(self, segments: Iterable[Segment], state: LayeredState) -> Iterator[tuple[Tensor, LayeredState]]:
        """Those of which there is a list are read in the order of the `schedule`.

        Of others the end is not known: diagonal, if no gradient is asked for, reads them L - 1 ahead of what it yields;
        otherwise they are read one by one.
        """
        ordered = {"horizontal": horizontal, "diagonal": diagonal}.get(self.schedule)
        parts: Iterable[tuple[Callable[..., Any], Iterable[Segment]]]
        if ordered is not None and isinstance(segments, list):
            first = first_with_gradient(len(segments), self.bptt_depth) if torch.is_grad_enabled() else 0
            parts = [(torch.no_grad()(ordered), segments[:first]), (ordered, segments[first:])]
        elif ordered is diagonal and not torch.is_grad_enabled():
            # What is run at once is of one length, and padded or not.
            parts = ((diagonal, part) for _, part in groupby(segments, _form))
        else:
            yield from super().run(segments, state)
            return
        for schedule, part in parts:
            for hidden, after in schedule(self, part, state):
                state = after
                yield hidden, state


@dataclass
class _Reading(Generic[LayeredState]):
    """A segment on its way through the layers.

    Attributes:
        shared: what its cells share.
        rows: (B,) bool, those that have text; None if all have.
        state: the one before it, all but its layers.
        hidden: what the next layer is given.
        after: the states of those that have read it.
    """

    shared: Any
    rows: Tensor | None
    state: LayeredState
    hidden: Tensor
    after: list[Any] = field(default_factory=list)

    def cell(self, model: LayeredModel[LayeredState]) -> Cell:
        """The next one."""
        return _Kept(model.cell(len(self.after), self.shared), self.rows)

    def take(self, made: Tensor, after: Any) -> None:
        self.hidden = made
        self.after.append(after)

    def end(self, model: LayeredModel[LayeredState]) -> tuple[Tensor, LayeredState]:
        return model.leave(self.hidden, tuple(self.after), self.state, self.shared)


class _Kept(NamedTuple):
    """A cell whose rows without text keep their state."""

    cell: Cell
    rows: Tensor | None

    def __call__(self, hidden: Tensor, before: Any) -> tuple[Tensor, Any]:
        made, after = self.cell(hidden, before)
        return made, after if self.rows is None else tree.where(self.rows, after, before)


def _entered(
    model: LayeredModel[LayeredState], segments: Iterable[Segment], state: LayeredState
) -> Iterator[_Reading[LayeredState]]:
    for segment in segments:
        hidden, shared = model.enter(segment, state)
        rows = None if segment.attention_mask is None else segment.attention_mask.any(dim=1)
        yield _Reading(shared, rows, state, hidden)
        state = model.ahead(state, shared)


def horizontal(
    model: LayeredModel[LayeredState], segments: Sequence[Segment], state: LayeredState
) -> Iterator[tuple[Tensor, LayeredState]]:
    """Run a model layer by layer; with checkpointing each layer is computed again once, over all segments."""
    readings = list(_entered(model, segments, state))

    def layer(given: list[Tensor], left: Any, cells: list[Cell]) -> list[tuple[Tensor, Any]]:
        made = []
        for cell, hidden in zip(cells, given, strict=True):
            hidden, left = cell(hidden, left)
            made.append((hidden, left))
        return made

    for before in state.layers:
        given = [reading.hidden for reading in readings], before, [reading.cell(model) for reading in readings]
        for reading, made in zip(readings, _checkpointed(model, layer, *given), strict=True):
            reading.take(*made)
    for reading in readings:
        yield reading.end(model)


def diagonal(
    model: LayeredModel[LayeredState], segments: Iterable[Segment], state: LayeredState
) -> Iterator[tuple[Tensor, LayeredState]]:
    """Run all cells at once that can be: those whose layer and segment have the same sum, at most L of them."""
    left, stack = list(state.layers), None
    # From the last segment, which the first of their layers reads, to the first.
    readings: list[_Reading[LayeredState]] = []
    for new in chain(_entered(model, segments, state), [None] * (len(left) - 1 if segments else 0)):
        if new is not None:
            readings.insert(0, new)
            stack = stack or Stack([model.cell(number, new.shared) for number in range(len(left))])
        start = len(readings[0].after)
        numbers = slice(start, start + len(readings))
        assert stack is not None
        given = [reading.cell(model) for reading in readings], [reading.hidden for reading in readings], left[numbers]
        made, left[numbers] = _checkpointed(model, stack.run, start, *given)
        for reading, *result in zip(readings, made, left[numbers], strict=True):
            reading.take(*result)
        if numbers.stop == len(left):
            yield readings.pop().end(model)


def _form(segment: Segment) -> tuple[torch.Size, bool]:
    return segment.input_ids.shape, segment.attention_mask is None


def _checkpointed(model: LayeredModel[Any], function: Callable[..., Made], *given: Any) -> Made:
    if not model.gradient_checkpointing or not torch.is_grad_enabled():
        return function(*given)
    made: Made = checkpoint(function, *given, use_reentrant=False)
    return made


def refuse_schedule(schedule: Schedule) -> None:
    """Raise UserError unless it is the one of models whose memory comes out of the last layer."""
    if schedule != "vertical":
        raise UserError(
            f"model.schedule={schedule}: is for memory that each layer keeps for itself, and here the last layer of a "
            "segment makes what the first of the next one reads; leave it at vertical, or choose model=armt"
        )
