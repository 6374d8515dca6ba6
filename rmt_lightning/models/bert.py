"""The layers of BERT and its relatives, of the last of which only those rows need be computed that are read.

What a segment leaves behind stands in a few rows: its memory, and [CLS], where answers are read. Nobody reads what the
last layer would make of the text, and memory and [CLS] do not depend on it.

Shapes: B batch, N tokens that the backbone sees, R tokens whose last states are read, E width of the embeddings, D
width of the hidden states, H heads, K width of a head.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

# All of them know their layers by the names that BERT has given them.
_FAMILIES = ("bert", "camembert", "electra", "ernie", "roberta", "roformer", "xlm-roberta")


def known(model: PreTrainedModel) -> bool:
    """Whether `last_states` does what the model does, with its settings of this moment."""
    config = model.config
    return (
        config.model_type in _FAMILIES
        # A class from elsewhere may bear the name of a family, and do as it likes.
        and type(model).__module__.startswith("transformers.models.")
        and not config.is_decoder
        and not getattr(config, "rotary_value", False)
        # Attention of another kind has been chosen for a reason, such as to see its weights.
        and not config.output_attentions
        and (config._attn_implementation == "sdpa" or config.model_type == "roformer")
    )


def last_states(model: Any, embeddings: Tensor, mask: Tensor | None, rows: int | None) -> Tensor:
    """What the last layer makes of the first R rows, each of which sees all tokens that the mask shows.

    Args:
        model: one that is `known`.
        embeddings: (B, N, E).
        mask: (B, N), 1 for what may be seen; None for all.
        rows: R; None for N.

    Returns:
        (B, R, D).
    """
    hidden, layers = parts(model, embeddings, mask)
    for layer in layers[:-1]:
        hidden = layer(hidden)
    return layers[-1](hidden, rows)


def parts(model: Any, embeddings: Tensor, mask: Tensor | None) -> tuple[Tensor, list[Step]]:
    """What the first layer is given, and the layers: (B, N, D) and R, or None for N -> (B, R, D).

    Arguments as of `last_states`.
    """
    hidden = model.embeddings(inputs_embeds=embeddings)
    if hasattr(model, "embeddings_project"):
        hidden = model.embeddings_project(hidden)
    seen = None if mask is None else mask.bool()[:, None, None]
    turns = None
    if hasattr(model.encoder, "embed_positions"):
        turns = model.encoder.embed_positions(hidden.shape[:-1]).to(hidden.dtype)

    return hidden, [Step(layer, seen, turns) for layer in model.encoder.layer]


class Step(NamedTuple):
    """A layer, and what it is told of the tokens; arguments as of `_layer`."""

    layer: Any
    seen: Tensor | None
    turns: Tensor | None

    def __call__(self, hidden: Tensor, rows: int | None = None) -> Tensor:
        return _layer(self.layer, hidden[:, :rows], hidden, self.seen, self.turns)


def _layer(layer: Any, read: Tensor, hidden: Tensor, seen: Tensor | None, turns: Tensor | None) -> Tensor:
    """A layer (Devlin et al. 2019, arXiv 1810.04805): (B, R, D) rows that see (B, N, D) -> (B, R, D)."""
    attention = layer.attention.self

    def heads(projection: nn.Module, states: Tensor) -> Tensor:
        return projection(states).unflatten(-1, (attention.num_attention_heads, -1)).transpose(1, 2)

    query, key, value = heads(attention.query, read), heads(attention.key, hidden), heads(attention.value, hidden)
    if turns is not None:
        query, key = _turned(query, turns), _turned(key, turns)
    dropout = attention.dropout.p if attention.training else 0.0
    attended = nn.functional.scaled_dot_product_attention(query, key, value, seen, dropout)
    read = layer.attention.output(attended.transpose(1, 2).flatten(2), read)
    made: Tensor = layer.output(layer.intermediate(read), read)
    return made


def _turned(states: Tensor, turns: Tensor) -> Tensor:
    """Each pair of numbers turned by an angle that tells the place (Su et al. 2021, arXiv 2104.09864, section 3.4.2).

    Args:
        states: (B, H, R, K).
        turns: (N, K), the sines of the angles, K / 2 of them, then their cosines.
    """
    sine, cosine = turns[: states.shape[2]].chunk(2, dim=-1)
    first, second = states.unflatten(-1, (-1, 2)).unbind(dim=-1)
    pairs = (first * cosine - second * sine, second * cosine + first * sine)
    return torch.stack(pairs, dim=-1).flatten(-2)
