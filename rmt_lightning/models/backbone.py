"""A Hugging Face encoder behind one small interface.

Shapes: B batch, N tokens that the backbone sees, E width of the embeddings, D width of the hidden states.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, Any, Protocol, cast

import torch
from annotated_types import Ge
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    BigBirdConfig,
    BigBirdModel,
    LongformerConfig,
    LongformerModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as hf_logging

from rmt_lightning.errors import UserError

# They tell of padding to whole windows and blocks, which changes nothing.
logging.getLogger(LongformerModel.__module__).setLevel(logging.ERROR)
logging.getLogger(BigBirdModel.__module__).setLevel(logging.ERROR)


class Encoder(nn.Module):
    """What the recurrence needs of an encoder: embed token ids, turn embeddings into hidden states.

    Args:
        model: any Hugging Face encoder that takes `inputs_embeds`.
        tokenizer: tells which ids stand for [CLS], [SEP] and padding.

    Raises:
        UserError: if the tokenizer has no such tokens.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        # A pooler would be computed for nothing, and DDP does not like parameters without gradient.
        if getattr(model, "pooler", None) is not None:
            model.register_module("pooler", None)
        # from_pretrained hands models over for inference, with dropout off.
        self.model = model.train()
        cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
        if cls is None or sep is None:
            raise UserError(
                f"backbone: {model.config.model_type} has no tokens to begin and to end a segment; choose an encoder "
                "such as BERT, RoBERTa, DistilBERT, ELECTRA, MPNet or ModernBERT"
            )
        self.cls_token_id = int(cls)
        self.sep_token_id = int(sep)

    @property
    def _words(self) -> nn.Embedding:
        return cast(nn.Embedding, self.model.get_input_embeddings())

    @property
    def width(self) -> int:
        """D."""
        return int(self.model.config.hidden_size)

    @property
    def embedding_width(self) -> int:
        """E. ELECTRA's is smaller than D."""
        return int(self._words.weight.shape[1])

    @property
    def embedding_scale(self) -> float:
        """Standard deviation of the word embeddings."""
        return float(self._words.weight.detach().std())

    @property
    def max_positions(self) -> int:
        """How many tokens the backbone can see at once."""
        positions = int(self.model.config.max_position_embeddings)
        table = getattr(getattr(self.model, "embeddings", None), "position_embeddings", None)
        # RoBERTa and MPNet keep the first rows of the table for padding.
        padding = getattr(table, "padding_idx", None)
        return positions if padding is None else positions - padding - 1

    def embed(self, input_ids: Tensor) -> Tensor:
        """Word embeddings, before positions are added: (B, N) -> (B, N, E)."""
        embedded: Tensor = self._words(input_ids)
        return embedded

    def forward(self, embeddings: Tensor, attention_mask: Tensor | None) -> Tensor:
        """(B, N, E), (B, N) with 1 for what may be seen -> (B, N, D)."""
        options: dict[str, Tensor] = {}
        precision: AbstractContextManager[None] = nullcontext()
        if self.model.config.model_type == "longformer":
            # [CLS] sees all and is seen by all, as for classification in section 3.1 of arXiv 2004.05150. The tokens of
            # the question, which nothing marks as such, see their window and [CLS].
            at_cls = torch.zeros(embeddings.shape[:2], dtype=torch.long, device=embeddings.device)
            at_cls[:, 0] = 1
            options = {"global_attention_mask": at_cls}
        if self.model.config.model_type == "big_bird":
            self._choose_attention(embeddings.shape[1])
            # Its sparse attention fails under autocast.
            precision = torch.autocast(embeddings.device.type, enabled=False)
        with precision:
            hidden: Tensor = self.model(inputs_embeds=embeddings, attention_mask=attention_mask, **options)[0]
        return hidden

    def _choose_attention(self, length: int) -> None:
        """Sparse attention takes more than 5 blocks and 2 for each random one.

        BigBird falls back to full attention by itself, but never returns.
        """
        config = self.model.config
        fits = length > (5 + 2 * config.num_random_blocks) * config.block_size
        cast(BigBirdModel, self.model).set_attention_type(config.attention_type if fits else "original_full")


class Backbone(Protocol):
    """How a backbone comes into being."""

    def tokenizer(self, texts: Iterable[str]) -> PreTrainedTokenizerBase:
        """The backbone's tokenizer; one that has none of its own learns it from `texts`."""

    def encoder(self, tokenizer: PreTrainedTokenizerBase) -> Encoder:
        """The encoder, with the weights that training starts from."""


class TinyBert:
    """A small BERT with random weights, for two cores and a few minutes. Its tokenizer is trained on the text at hand.

    Args:
        width: D.
        layers: number of layers.
        heads: attention heads of a layer.
        max_positions: the longest segment.
        vocabulary_size: of the tokenizer.
        dropout: off by default: it costs a third of the speed, and the samples are never the same.
    """

    def __init__(
        self,
        width: Annotated[int, Ge(1)] = 128,
        layers: Annotated[int, Ge(1)] = 4,
        heads: Annotated[int, Ge(1)] = 4,
        max_positions: Annotated[int, Ge(1)] = 512,
        vocabulary_size: Annotated[int, Ge(300)] = 2000,
        dropout: Annotated[float, Ge(0)] = 0.0,
    ) -> None:
        if width % heads:
            raise UserError(f"backbone.width={width}: must be a multiple of backbone.heads={heads}")
        self.width = width
        self.layers = layers
        self.heads = heads
        self.max_positions = max_positions
        self.vocabulary_size = vocabulary_size
        self.dropout = dropout

    def tokenizer(self, texts: Iterable[str]) -> PreTrainedTokenizerBase:
        # Byte-level BPE knows every character, and comes out the same each time; the trainer of WordPiece does not.
        special = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
        tokenizer = Tokenizer(models.BPE())
        tokenizer.normalizer = normalizers.Lowercase()
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocabulary_size,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=list(special.values()),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)

    def encoder(self, tokenizer: PreTrainedTokenizerBase) -> Encoder:
        return Encoder(BertModel(BertConfig(**self._settings(tokenizer)), add_pooling_layer=False), tokenizer)

    def _settings(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """What the configs of BERT and its relatives have in common."""
        return {
            "vocab_size": len(tokenizer),
            "hidden_size": self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "intermediate_size": 4 * self.width,
            "max_position_embeddings": self.max_positions,
            "hidden_dropout_prob": self.dropout,
            "attention_probs_dropout_prob": self.dropout,
            "pad_token_id": tokenizer.pad_token_id,
        }


class TinyLongformer(TinyBert):
    """A small Longformer with random weights (Beltagy et al. 2020, arXiv 2004.05150).

    Tokens see `window` tokens around them; [CLS] sees all and is seen by all. Inputs are padded to whole windows.

    Args:
        window: tokens of the sliding window, half of them on each side.
        width, layers, heads, max_positions, vocabulary_size, dropout: as in `TinyBert`.

    Raises:
        UserError: if the window is odd, or positions do not hold a whole number of windows.
    """

    def __init__(
        self,
        width: Annotated[int, Ge(1)] = 128,
        layers: Annotated[int, Ge(1)] = 4,
        heads: Annotated[int, Ge(1)] = 4,
        max_positions: Annotated[int, Ge(1)] = 1024,
        window: Annotated[int, Ge(2)] = 64,
        vocabulary_size: Annotated[int, Ge(300)] = 2000,
        dropout: Annotated[float, Ge(0)] = 0.0,
    ) -> None:
        super().__init__(width, layers, heads, max_positions, vocabulary_size, dropout)
        if window % 2 or max_positions % window:
            raise UserError(f"backbone.window={window}: must be even and divide backbone.max_positions={max_positions}")
        self.window = window

    def encoder(self, tokenizer: PreTrainedTokenizerBase) -> Encoder:
        settings = self._settings(tokenizer)
        # Its positions begin behind that of padding, as RoBERTa's do.
        settings["max_position_embeddings"] += settings["pad_token_id"] + 1
        config = LongformerConfig(**settings, attention_window=self.window)
        return Encoder(LongformerModel(config, add_pooling_layer=False), tokenizer)


class TinyBigBird(TinyBert):
    """A small BigBird with random weights (Zaheer et al. 2020, arXiv 2007.14062).

    A block of tokens sees itself, its two neighbours, the first block, the last one and `random_blocks` others, drawn
    once for each length. Inputs of up to 5 + 2 random_blocks blocks are read with full attention. Hugging Face draws
    random blocks in training only, in evaluation the first block stands for each of them; and it puts all weights of
    attention together again, so that memory grows with the square of the input all the same.

    Args:
        block_size: tokens of a block.
        random_blocks: random blocks that each block sees.
        width, layers, heads, max_positions, vocabulary_size, dropout: as in `TinyBert`.

    Raises:
        UserError: if positions do not hold a whole number of blocks.
    """

    def __init__(
        self,
        width: Annotated[int, Ge(1)] = 128,
        layers: Annotated[int, Ge(1)] = 4,
        heads: Annotated[int, Ge(1)] = 4,
        max_positions: Annotated[int, Ge(1)] = 1024,
        block_size: Annotated[int, Ge(1)] = 16,
        random_blocks: Annotated[int, Ge(1)] = 1,
        vocabulary_size: Annotated[int, Ge(300)] = 2000,
        dropout: Annotated[float, Ge(0)] = 0.0,
    ) -> None:
        super().__init__(width, layers, heads, max_positions, vocabulary_size, dropout)
        if max_positions % block_size:
            raise UserError(f"backbone.block_size={block_size}: must divide backbone.max_positions={max_positions}")
        self.block_size = block_size
        self.random_blocks = random_blocks

    def encoder(self, tokenizer: PreTrainedTokenizerBase) -> Encoder:
        config = BigBirdConfig(
            **self._settings(tokenizer), block_size=self.block_size, num_random_blocks=self.random_blocks
        )
        return Encoder(BigBirdModel(config, add_pooling_layer=False), tokenizer)


class Pretrained:
    """An encoder with pretrained weights.

    Args:
        name: an id on the Hugging Face Hub, or a folder with config, weights and tokenizer.

    Raises:
        UserError: if there is no such model, or the Hub cannot be reached.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def tokenizer(self, texts: Iterable[str]) -> PreTrainedTokenizerBase:
        tokenizer: PreTrainedTokenizerBase = self._load(AutoTokenizer)
        return tokenizer

    def encoder(self, tokenizer: PreTrainedTokenizerBase) -> Encoder:
        # from_pretrained would keep the checkpoint's precision; training needs full precision weights.
        return Encoder(self._load(AutoModel, dtype=torch.float32), tokenizer)

    def _load(self, auto_class: Any, **options: Any) -> Any:
        if os.sep in self.name and self.name.count("/") != 1 and not Path(self.name).is_dir():
            raise UserError(f"backbone.name={self.name}: no such folder; give a folder or a Hugging Face Hub id")
        hf_logging.disable_progress_bar()
        try:
            return auto_class.from_pretrained(self.name, **options)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"backbone.name={self.name}: cannot be loaded ({reason}); give a folder that holds a model, or a "
                "Hugging Face Hub id while the network is there, or use backbone=tiny_bert"
            ) from None


class Restored:
    """Tokenizer and architecture of an earlier run, whose weights are about to come from a checkpoint.

    Args:
        tokenizer_folder: what `tokenizer.save_pretrained` has left.
        config_folder: what `model.config.save_pretrained` has left.
    """

    def __init__(self, tokenizer_folder: Path, config_folder: Path) -> None:
        self.tokenizer_folder = tokenizer_folder
        self.config_folder = config_folder

    def tokenizer(self, texts: Iterable[str]) -> PreTrainedTokenizerBase:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(self.tokenizer_folder)
        return tokenizer

    def encoder(self, tokenizer: PreTrainedTokenizerBase) -> Encoder:
        return Encoder(AutoModel.from_config(AutoConfig.from_pretrained(self.config_folder)), tokenizer)
