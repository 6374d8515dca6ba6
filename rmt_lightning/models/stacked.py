"""Layers of one form are run at once, each on inputs of its own: their weights are stacked, their products batched.

Shapes: G layers that are run at once, L layers that there are, B batch, N tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from rmt_lightning.models import state as tree


class UnlikeError(Exception):
    """Layers differ in more than their weights."""


class Stack:
    """All the layers of a model, to be run side by side. Gradients reach their own weights.

    Args:
        calls: L trees of modules, tensors and plain values that can be called with hidden states and a state.

    Raises:
        UnlikeError: if the modules differ in more than their weights, and their numbers among them.
    """

    def __init__(self, calls: Sequence[Any]) -> None:
        layers = [_Modules(filter(_is_module, tree.parts(call)[0])) for call in calls]
        if any(_form(layer) != _form(layers[0]) for layer in layers):
            raise UnlikeError
        self.first = layers[0]
        numbers = [dict(layer.named_parameters()) | dict(layer.named_buffers()) for layer in layers]
        self.weights = {name: torch.stack([own[name] for own in numbers]) for name in numbers[0]}

    def run(
        self, start: int, calls: Sequence[Any], hidden: Sequence[Tensor], states: Sequence[Any]
    ) -> tuple[list[Tensor], list[Any]]:
        """Call G layers in a row, of which the first has the number `start`: what each makes, and its state after.

        Args:
            start: from 0 to L - G.
            calls: what has been told to each.
            hidden: (B, N, D) each.
            states: trees of (B, …) each.

        Raises:
            UnlikeError: if they have been told plain values that differ.
        """
        forms = [tree.parts(call) for call in calls]
        parts, form = forms[0]
        modules = iter(self.first)
        parts = [next(modules) if _is_module(part) else part for part in parts]
        # Others are the same for all.
        own = {
            place: torch.stack(told)
            for place, told in enumerate(zip(*(found for found, _ in forms), strict=True))
            if not _is_module(parts[place]) and _differ(told)
        }
        befores = [torch.stack(leaves) for leaves in zip(*map(tree.leaves, states), strict=True)]

        def one(weights: Any, own: dict[int, Tensor], hidden: Tensor, before: list[Tensor]) -> Any:
            call: Any = tree.whole([own.get(place, part) for place, part in enumerate(parts)], form)
            with _Batched():
                given = (call, hidden, tree.rebuild(states[0], before))
                made, after = functional_call(self.first, weights, given, tie_weights=False)
            return made, tree.leaves(after)

        weights = {name: weight[start : start + len(calls)] for name, weight in self.weights.items()}
        # Dropout is drawn for each.
        made, afters = torch.vmap(one, randomness="different")(weights, own, torch.stack(list(hidden)), befores)
        each = zip(*(leaf.unbind() for leaf in afters), strict=True)
        return list(made.unbind()), [tree.rebuild(states[0], leaves) for leaves in each]


class _Modules(nn.ModuleList):
    """What a call is made of, to be called with other weights."""

    def forward(self, call: Callable[..., Any], *given: Any) -> Any:
        return call(*given)


def _is_module(part: Any) -> bool:
    return isinstance(part, nn.Module)


def _form(layer: nn.Module) -> list[Any]:
    """All that tells modules apart but the numbers in them."""
    form: list[Any] = []
    for name, part in layer.named_modules():
        plain = {key: x for key, x in vars(part).items() if isinstance(x, bool | int | float | str) or x is None}
        # They know where they stand.
        form.append((name, type(part), {key: x for key, x in plain.items() if not key.startswith("layer_i")}))
    numbers = [*layer.named_parameters(), *layer.named_buffers()]
    return [*form, *((name, part.shape, part.dtype) for name, part in numbers)]


def _differ(told: tuple[Any, ...]) -> bool:
    """Whether a tensor is another one for each layer; plain values may not be."""
    first, *others = told
    if all(isinstance(one, Tensor) for one in told):
        return any(one is not first for one in others)
    if any(isinstance(one, Tensor) or one != first for one in others):
        raise UnlikeError
    return False


class _Batched(TorchFunctionMode):
    """While it is open, what vmap would expand or run one by one is one product, and one attention, of all layers."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        batched: Any = {nn.functional.linear: _linear, nn.functional.scaled_dot_product_attention: _attention}
        return batched.get(function, function)(*args, **kwargs or {})


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    return _Linear.apply(input, weight, bias)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *options: Any, **named: Any
) -> Any:
    return _Attention.apply(query, key, value, attn_mask, options, named)


class _OfAll(torch.autograd.Function):
    """A function that is only ever run for several layers at once, by operations that know their gradients."""

    @staticmethod
    def forward(*_given: Any) -> Tensor:
        raise NotImplementedError

    @staticmethod
    def setup_context(_context: Any, _given: Any, _output: Any) -> None:
        """Nothing is kept: `vmap` stands for it."""


class _Linear(_OfAll):
    """(G, …, D) and (G, D', D) -> (G, …, D'), as a product of (G, B·N, D)."""

    @staticmethod
    def vmap(info: Any, dims: tuple[Any, ...], *given: Tensor | None) -> tuple[Tensor, int]:
        rows, weight, bias = (_stacked(part, dim, info.batch_size) for part, dim in zip(given, dims, strict=True))
        assert rows is not None and weight is not None
        flat = rows.reshape(len(rows), -1, rows.shape[-1])
        made = flat @ weight.mT if bias is None else torch.baddbmm(bias[:, None], flat, weight.mT)
        return made.view(*rows.shape[:-1], -1), 0


class _Attention(_OfAll):
    """(G, B, H, N, …) -> (G, B, H, N, …), as that of G·B texts."""

    @staticmethod
    def vmap(info: Any, dims: tuple[Any, ...], *given: Any) -> tuple[Tensor, int]:
        *parts, options, named = given
        query, key, value, mask = (
            _stacked(part, dim, info.batch_size) for part, dim in zip(parts, dims[:4], strict=True)
        )
        assert query is not None and key is not None and value is not None
        if mask is not None:
            mask = mask.expand(-1, query.shape[1], *mask.shape[2:]).flatten(0, 1)
        query, key, value = (part.flatten(0, 1) for part in (query, key, value))
        made = nn.functional.scaled_dot_product_attention(query, key, value, mask, *options, **named)
        return made.unflatten(0, (info.batch_size, -1)), 0


def _stacked(part: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """What is given to each of G layers: (G, …)."""
    if part is None:
        return None
    return part.expand(size, *part.shape) if dim is None else part.movedim(dim, 0)
