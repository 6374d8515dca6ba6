"""Models whose layers can be run one by one, and the orders in which the cells of a text can be run.

Shapes: B batch, T segments, N tokens that a layer sees, L layers, D width of the hidden states.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Generic, Literal, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rmt_lightning.core.errors import UserError
from rmt_lightning.models import state as tree
from rmt_lightning.models.recurrence import Segment, first_with_gradient
from rmt_lightning.models.segment_model import SegmentModel

Schedule = Literal["vertical", "horizontal"]


class LayerMajor(Protocol):
    """A state that has a part for each layer: a tree of (B, …) each."""

    @property
    def layers(self) -> tuple[Any, ...]: ...


LayeredState = TypeVar("LayeredState", bound=LayerMajor)


class Cell(Protocol):
    """A layer that has been told all that it has to know of a segment: a NamedTuple of that, modules among it."""

    def __call__(self, hidden: Tensor, before: Any, /) -> tuple[Tensor, Any]:
        """From what it is given of the segment (B, N, D) and its state before to what it makes and its state after."""


class LayeredModel(SegmentModel[LayeredState], Generic[LayeredState]):
    """A segment model whose layers can be run one by one, each with a state of its own.

    A cell is a layer of a segment. It takes what the layer below makes of this segment, and the state that the same
    layer has left after the segment before. A schedule is an order of cells:

    ```
    vertical      segment by segment: all that a text needs whose end is not known
    horizontal    layer by layer, over all segments
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

    def run(self, segments: Iterable[Segment], state: LayeredState) -> Iterator[tuple[Tensor, LayeredState]]:
        """Those of which there is a list are read in the order of the `schedule`."""
        if self.schedule == "vertical" or not isinstance(segments, list):
            yield from super().run(segments, state)
            return
        first = first_with_gradient(len(segments), self.bptt_depth) if torch.is_grad_enabled() else 0
        for schedule, part in ((torch.no_grad()(horizontal), segments[:first]), (horizontal, segments[first:])):
            for hidden, after in schedule(self, part, state):
                state = after
                yield hidden, state


def horizontal(
    model: LayeredModel[LayeredState], segments: Sequence[Segment], state: LayeredState
) -> Iterator[tuple[Tensor, LayeredState]]:
    """Run a model layer by layer; with checkpointing each layer is computed again once, over all segments."""
    read = list(_entered(model, segments, state))
    given = [hidden for hidden, _, _ in read]
    layers = []

    def layer(number: int, given: list[Tensor], left: Any) -> tuple[list[Tensor], list[Any]]:
        made, states = [], []
        for segment, hidden, (_, shared, _) in zip(segments, given, read, strict=True):
            hidden, after = model.cell(number, shared)(hidden, left)
            left = kept(segment, after, left)
            made.append(hidden)
            states.append(left)
        return made, states

    for number, before in enumerate(state.layers):
        if model.gradient_checkpointing and torch.is_grad_enabled():
            given, states = checkpoint(layer, number, given, before, use_reentrant=False)
        else:
            given, states = layer(number, given, before)
        layers.append(states)
    for hidden, (_, shared, before), *after in zip(given, read, *layers, strict=True):
        yield model.leave(hidden, tuple(after), before, shared)


def _entered(
    model: LayeredModel[LayeredState], segments: Iterable[Segment], state: LayeredState
) -> Iterator[tuple[Tensor, Any, LayeredState]]:
    """Of each segment what `enter` returns, and the state before it, all but its layers."""
    for segment in segments:
        hidden, shared = model.enter(segment, state)
        yield hidden, shared, state
        state = kept(segment, model.ahead(state, shared), state)


def refuse_schedule(schedule: Schedule) -> None:
    """Raise UserError unless it is the one of models whose memory comes out of the last layer."""
    if schedule != "vertical":
        raise UserError(
            f"model.schedule={schedule}: is for memory that each layer keeps for itself, and here the last layer of a "
            "segment makes what the first of the next one reads; leave it at vertical, or choose model=armt"
        )


def kept(segment: Segment, after: Any, before: Any) -> Any:
    """The state after a segment: rows without text keep theirs."""
    if segment.attention_mask is None or after is before:
        return after
    return tree.where(segment.attention_mask.any(dim=1), after, before)
