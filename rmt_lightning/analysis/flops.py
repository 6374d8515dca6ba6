"""FLOPs of a forward pass, by arithmetic: full attention to a whole input, and RMT, which reads it in segments.

The formula is that of Hoffmann et al. 2022 (arXiv 2203.15556, appendix F), where a multiplication and an addition are
two FLOPs and a softmax takes three for each score. Places that a causal mask hides are counted; biases, norms,
activations and positions are not. One term is left out: to look up an embedding multiplies nothing, so 2·s·V·d stands
once, for the logits, not twice. Only so do the numbers of RMT-2023, figure 3, come out: full attention to 4,096 × 512
tokens takes ×295 (OPT-125M) and ×29 (OPT-175B) the FLOPs of RMT. With both terms it would be ×229 and ×29.

Symbols are the paper's: s tokens, d width, f width of the feed-forward layer, h heads, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rmt_lightning.core.errors import UserError


@dataclass(frozen=True)
class Shape:
    """What the FLOPs of a transformer depend on.

    Attributes:
        name: what it is called in tables.
        layers: how many.
        width: d.
        feed_forward: f.
        heads: h, for queries.
        head_width: of each of them; d/h as a rule.
        key_value_heads: h, unless queries share keys and values (Ainslie et al. 2023, arXiv 2305.13245).
        embedding_width: d, unless embeddings are projected to it, and hidden states back before the logits.
        vocabulary: V of a language model's logits; 0 for an encoder, which has none.
        gated: whether a third matrix gates the feed-forward layer (Shazeer 2020, arXiv 2002.05202).
        local_layers: how many of the layers see a window instead of the whole input.
        window: how many tokens they see.
    """

    name: str
    layers: int
    width: int
    feed_forward: int
    heads: int
    head_width: int
    key_value_heads: int
    embedding_width: int
    vocabulary: int
    gated: bool = False
    local_layers: int = 0
    window: int = 0


def _opt(size: str, layers: int, heads: int, width: int, embedding_width: int) -> Shape:
    return Shape(f"OPT-{size}", layers, width, 4 * width, heads, width // heads, heads, embedding_width, 50_272)


# Zhang et al. 2022 (arXiv 2205.01068), table 1; vocabulary and embedding widths as released. 350M alone has narrower
# embeddings than hidden states.
OPT = (
    _opt("125M", 12, 12, 768, 768),
    _opt("350M", 24, 16, 1024, 512),
    _opt("1.3B", 24, 32, 2048, 2048),
    _opt("2.7B", 32, 32, 2560, 2560),
    _opt("6.7B", 32, 32, 4096, 4096),
    _opt("13B", 40, 40, 5120, 5120),
    _opt("30B", 48, 56, 7168, 7168),
    _opt("66B", 64, 72, 9216, 9216),
    _opt("175B", 96, 96, 12288, 12288),
)


def flop_terms(shape: Shape, tokens: int) -> dict[str, int]:
    """What the FLOPs of a forward pass over one sequence consist of, over all layers (Hoffmann et al., appendix F).

    Args:
        shape: of the transformer.
        tokens: s.
    """
    s, d, layers = tokens, shape.width, shape.layers
    queries = shape.heads * shape.head_width
    keys = shape.key_value_heads * shape.head_width
    # How many keys all queries of a head see, over all layers.
    seen = s * ((layers - shape.local_layers) * s + shape.local_layers * min(s, shape.window))
    projection = 2 * s * d * shape.embedding_width if shape.embedding_width != d else 0
    decoder = shape.vocabulary > 0
    return {
        "embedding projection": projection,
        "queries, keys and values": 2 * s * d * (queries + 2 * keys) * layers,
        "attention scores": 2 * seen * queries,
        "softmax": 3 * seen * shape.heads,
        "weighted values": 2 * seen * queries,
        "output projection": 2 * s * queries * d * layers,
        "feed-forward": 2 * s * d * shape.feed_forward * (3 if shape.gated else 2) * layers,
        "logits": decoder * (projection + 2 * s * shape.embedding_width * shape.vocabulary),
    }


def forward_flops(shape: Shape, tokens: int) -> int:
    """FLOPs of a forward pass over one sequence of `tokens`."""
    return sum(flop_terms(shape, tokens).values())


def compare(
    shapes: Sequence[Shape], tokens: Sequence[int], segment_length: int, text_length: int
) -> list[dict[str, Any]]:
    """Full attention against RMT, a row for each shape and length of the input.

    Args:
        shapes: the transformers.
        tokens: lengths of the input; rows come in ascending order.
        segment_length: how many tokens RMT sees of each segment; a segment that is not full costs as much.
        text_length: how many of them are input. RMT-2023, figure 3, counts all: memory costs nothing.

    Returns:
        Rows of model, tokens, segments, the FLOPs of full_attention and of rmt, and their ratio.
    """
    rows = []
    for shape in shapes:
        for count in sorted(set(tokens)):
            segments = -(-count // text_length)
            full, rmt = forward_flops(shape, count), segments * forward_flops(shape, segment_length)
            rows.append(
                {"model": shape.name, "tokens": count, "segments": segments}
                | {"full_attention": full, "rmt": rmt, "ratio": full / rmt}
            )
    return rows


@dataclass(frozen=True)
class _Family:
    """How an architecture of Hugging Face differs from a BERT, and what its config calls things."""

    decoder: bool = False
    gated: bool = False
    feed_forward: str = "intermediate_size"
    embedding_width: str = "hidden_size"


_FAMILIES = {
    "bert": _Family(),
    "camembert": _Family(),
    "distilbert": _Family(feed_forward="hidden_dim"),
    "electra": _Family(embedding_width="embedding_size"),
    "modernbert": _Family(gated=True),
    "mpnet": _Family(),
    "roberta": _Family(),
    "xlm-roberta": _Family(),
    "gemma": _Family(decoder=True, gated=True),
    "gpt2": _Family(decoder=True, feed_forward="n_inner"),
    "gpt_neox": _Family(decoder=True),
    "llama": _Family(decoder=True, gated=True),
    "mistral": _Family(decoder=True, gated=True),
    "opt": _Family(decoder=True, feed_forward="ffn_dim", embedding_width="word_embed_proj_dim"),
    "qwen2": _Family(decoder=True, gated=True),
    "qwen3": _Family(decoder=True, gated=True),
}


def read_shape(config: Any) -> Shape:
    """The shape that a Hugging Face config describes.

    Args:
        config: a `transformers.PretrainedConfig`.

    Raises:
        UserError: if the architecture is none of those whose fields are understood.
    """
    family = _FAMILIES.get(config.model_type)
    if family is None:
        raise UserError(
            f"backbone: the FLOPs of {config.model_type} are not known; choose one of {', '.join(_FAMILIES)}"
        )
    width, heads = _size(config, "hidden_size"), _size(config, "num_attention_heads")
    local_layers, window = _local_attention(config)
    return Shape(
        name=Path(config.name_or_path).name or config.model_type,
        layers=_size(config, "num_hidden_layers"),
        width=width,
        feed_forward=_size(config, family.feed_forward, default=4 * width),
        heads=heads,
        head_width=_size(config, "head_dim", default=width // heads),
        key_value_heads=_size(config, "num_key_value_heads", default=heads),
        embedding_width=_size(config, family.embedding_width),
        vocabulary=_size(config, "vocab_size") if family.decoder else 0,
        gated=family.gated,
        local_layers=local_layers,
        window=window,
    )


def _size(config: Any, key: str, default: int = 0) -> int:
    size = getattr(config, key, None)
    size = default if size is None else size
    if size < 1:
        raise UserError(f"backbone: its config says {key}={size}, which must be 1 or more; choose another backbone")
    return int(size)


def _local_attention(config: Any) -> tuple[int, int]:
    """How many layers see a window only, and how many tokens that is."""
    window = getattr(config, "sliding_window", None)
    if not window:
        return 0, 0
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    # ModernBERT looks to both sides.
    return kinds.count("sliding_attention"), 2 * window + 1 if config.model_type == "modernbert" else window
