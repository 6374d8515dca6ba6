"""A Hugging Face encoder behind a small interface: embeddings in, hidden states out.

Shapes: B batch, N tokens that the backbone sees, E width of the embeddings, D width of the hidden states.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoModel, BigBirdModel, LongformerModel, PreTrainedModel, PreTrainedTokenizerBase
from transformers.masking_utils import create_bidirectional_mask, create_bidirectional_sliding_window_mask

from rmt_lightning.core.errors import UserError
from rmt_lightning.models import bert
from rmt_lightning.models.backbone import ENCODERS, SPARSE, UNREAL, Layers, Transformer, alike, inside

# They tell of padding to whole windows and blocks, which changes nothing.
logging.getLogger(LongformerModel.__module__).setLevel(logging.ERROR)
logging.getLogger(BigBirdModel.__module__).setLevel(logging.ERROR)


class Encoder(Transformer):
    """What the recurrence needs of an encoder: embed token ids, turn embeddings into hidden states.

    Args:
        model: any Hugging Face encoder that takes `inputs_embeds`.
        tokenizer: tells which ids stand for [CLS] and [SEP], or else begin and end a text.

    Raises:
        UserError: if the tokenizer has no such tokens, or if the model does not give each token a state that depends on
            all tokens which the mask shows it, and on nothing else.
    """

    AUTO = AutoModel
    OTHERS = ENCODERS

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        model = inside(model)
        # A pooler would be computed for nothing, and DDP does not like parameters without gradient.
        if getattr(model, "pooler", None) is not None:
            model.register_module("pooler", None)
        cls = tokenizer.bos_token_id if tokenizer.cls_token_id is None else tokenizer.cls_token_id
        sep = tokenizer.eos_token_id if tokenizer.sep_token_id is None else tokenizer.sep_token_id
        if cls is None or sep is None:
            kind = model.config.model_type
            raise UserError(
                f"backbone: {kind} has no tokens to begin and to end a segment; choose {self.OTHERS}, "
                "or name them in its tokenizer_config.json (cls_token, sep_token)"
            )
        self.cls_token_id = int(cls)
        self.sep_token_id = int(sep)
        super().__init__(model, tokenizer)

    def _fault(self, words: Tensor) -> str | None:
        if self.model.config.model_type in SPARSE:
            return None
        size = words.shape[1] * 2 // 3
        text, other = words
        # The same text before other padding; and a text that shares but the first token.
        rows = torch.stack([text, torch.cat([text[:size], other[size:]]), torch.cat([text[:1], other[1:]])])
        mask = (torch.arange(words.shape[1], device=words.device) < size).long().expand(len(rows), -1)
        plain = self.model(input_ids=words[:1, :size])[0]
        embedded = self.embed(rows)
        # Memory is no word.
        embedded[2, 1] = embedded[2].mean(dim=0)
        hidden = self(embedded, mask)[:, :size]
        if hidden.shape[1:] != (size, self.width):
            return "gives no hidden state for each token"
        if not hidden.isfinite().all():
            return UNREAL
        if not alike(hidden[1], hidden[0], 1e-5):
            return "does not obey a mask: what it makes of a text depends on the padding after it"
        if not alike(hidden[0], plain[0]):
            return "makes of embeddings something else than of the words they stand for"
        if alike(hidden[2, 0], hidden[0, 0], 1e-6):
            return "lets its first token, which answers are read at, see nothing of a text"
        if self._has_windows:
            try:
                self(embedded, mask, slice(1, 2))
            except Exception:  # families fail in ways of their own
                return "has layers that see a window of a text, and cannot be told to see memory beside it"
        return None

    @property
    def _has_windows(self) -> bool:
        config = self.model.config
        kinds: list[str] | None = getattr(config, "layer_types", None)
        # Where there are no kinds of layers, all of them have the window.
        return "sliding_attention" in kinds if kinds else getattr(config, "sliding_window", None) is not None

    @property
    def max_positions(self) -> int:
        """How many tokens the backbone can see at once."""
        table = getattr(getattr(self.model, "embeddings", None), "position_embeddings", None)
        # RoBERTa and MPNet keep the first rows of the table for padding.
        padding = getattr(table, "padding_idx", None)
        known = super().max_positions - (0 if padding is None else padding + 1)
        if (config := self.model.config).model_type in SPARSE:
            # Inputs are padded to whole windows or blocks, and padding has positions too.
            sizes = config.attention_window if config.model_type == "longformer" else config.block_size
            known -= known % max([sizes] if isinstance(sizes, int) else sizes)
        return known

    def forward(
        self, embeddings: Tensor, attention_mask: Tensor | None, memory: slice = slice(0), rows: int | None = None
    ) -> Tensor:
        """What the last layer makes of embeddings.

        Args:
            embeddings: (B, N, E).
            attention_mask: (B, N), 1 for what may be seen; None for all.
            memory: which of the embeddings are memory. Where layers see a window of the text, it sees all, and all see
                it. (The first block of BigBird does.)
            rows: R, how many of the first tokens are read; None for N. Others are not computed if that can be helped.

        Returns:
            (B, R, D).
        """
        if bert.known(self.model):
            return bert.last_states(self.model, embeddings, attention_mask, rows)
        return self._whole(embeddings, attention_mask, memory)[:, :rows]

    def apart(self, embeddings: Tensor, attention_mask: Tensor | None, memory: slice = slice(0)) -> Layers:
        if bert.known(self.model):
            hidden, layers = bert.parts(self.model, embeddings, attention_mask)
            return Layers(hidden, tuple(layers), lambda hidden: hidden)
        return super().apart(embeddings, attention_mask, memory)

    def _whole(self, embeddings: Tensor, attention_mask: Tensor | None, memory: slice = slice(0)) -> Tensor:
        """(B, N, E), (B, N) -> (B, N, D), as the model itself does it."""
        options: dict[str, Tensor] = {}
        precision: AbstractContextManager[None] = nullcontext()
        if self.model.config.model_type == "longformer":
            # [CLS] sees all and is seen by all, as for classification in section 3.1 of arXiv 2004.05150. The tokens of
            # the question, which nothing marks as such, see their window, [CLS] and memory.
            sees_all = torch.zeros(embeddings.shape[:2], dtype=torch.long, device=embeddings.device)
            sees_all[:, 0] = sees_all[:, memory] = 1
            options = {"global_attention_mask": sees_all}
        if self.model.config.model_type == "big_bird":
            self._choose_attention(embeddings.shape[1])
            # Its sparse attention fails under autocast.
            precision = torch.autocast(embeddings.device.type, enabled=False)
        with precision:
            masks = self._masks(embeddings, attention_mask, memory)
            hidden: Tensor = self.model(inputs_embeds=embeddings, attention_mask=masks, **options)[0]
        return hidden

    def _masks(self, embeddings: Tensor, attention_mask: Tensor | None, memory: slice) -> Any:
        """The mask (B, N), or those of each kind of layers if they see a window of the text, and memory beside it."""
        config = self.model.config
        places = range(embeddings.shape[1])[memory]
        if not places or not self._has_windows:
            return attention_mask

        def is_memory(place: Tensor) -> Tensor:
            return (place >= places.start) & (place < places.stop)

        window = create_bidirectional_sliding_window_mask(
            config,
            embeddings,
            attention_mask,
            or_mask_function=lambda _batch, _head, reader, seen: is_memory(reader) | is_memory(seen),
        )
        if not getattr(config, "layer_types", None):
            return window
        full = create_bidirectional_mask(config, embeddings, attention_mask)
        return {"full_attention": full, "sliding_attention": window}

    def _choose_attention(self, length: int) -> None:
        """Sparse attention takes more than 5 blocks and 2 for each random one.

        BigBird falls back to full attention by itself, but never returns.
        """
        config = self.model.config
        fits = length > (5 + 2 * config.num_random_blocks) * config.block_size
        cast(BigBirdModel, self.model).set_attention_type(config.attention_type if fits else "original_full")
