"""Small backbones with random weights, for two cores and a few minutes."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tokenizers
from annotated_types import Ge, Le, Lt
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BigBirdConfig,
    GPT2Config,
    LongformerConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    RoFormerConfig,
)

from rmt_lightning.core.errors import UserError
from rmt_lightning.core.files import write_atomically
from rmt_lightning.models.decoder import Decoder
from rmt_lightning.models.encoder import Encoder
from rmt_lightning.models.machine import check_weights

_LONG_WORD = re.compile(r"\S{1000}(?=\S)")


@dataclass(frozen=True)
class TrainingText:
    """Text that a tokenizer may be trained on. What comes of it is kept: making and reading it anew takes seconds.

    Attributes:
        texts: not read before they are needed.
        fingerprint: a name for their content.
        cache_dir: where trained tokenizers are kept.
    """

    texts: Iterable[str]
    fingerprint: Callable[[], str]
    cache_dir: str

    def __iter__(self) -> Iterator[str]:
        return iter(self.texts)

    def trained(self, settings: str, train: Callable[[], Tokenizer]) -> Tokenizer:
        """What `train` makes of the text with these settings, or has made of it before.

        A cache that cannot be used, or is damaged, does not matter.
        """
        key = hashlib.sha256(f"{self.fingerprint()}|{settings}|v1".encode()).hexdigest()[:32]
        # RuntimeError: where home is, is unknown.
        with suppress(OSError, RuntimeError):
            place = self._place(key)
            # Reading a pipe or a device has no end.
            checksum, _, content = (place.read_bytes() if place.is_file() else b"").partition(b"\n")
            if content and hashlib.sha256(content).hexdigest().encode() == checksum:
                return Tokenizer.from_str(content.decode())
        tokenizer = train()
        content = tokenizer.to_str().encode()
        with suppress(OSError, RuntimeError):
            write_atomically(self._place(key), hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
        return tokenizer

    def _place(self, key: str) -> Path:
        return Path(self.cache_dir).expanduser() / "tokenizers" / key


class Tiny:
    """A small model with random weights, for two cores and a few minutes. Its tokenizer is trained on the text at hand.

    Args:
        width: D.
        layers: number of layers.
        heads: attention heads of a layer.
        max_positions: the longest segment.
        vocabulary_size: of the tokenizer.
        dropout: off by default: it costs a third of the speed, and the samples are never the same.
        initializer_range: standard deviation of the random weights. BERT's 0.02 was made for 768 wide.
    """

    def __init__(
        self,
        width: Annotated[int, Ge(1), Le(2**15)] = 128,
        layers: Annotated[int, Ge(1), Le(1000)] = 4,
        heads: Annotated[int, Ge(1)] = 4,
        max_positions: Annotated[int, Ge(1), Le(2**20)] = 512,
        vocabulary_size: Annotated[int, Ge(300), Le(2**20)] = 2000,
        dropout: Annotated[float, Ge(0), Lt(1)] = 0.0,
        initializer_range: Annotated[float, Ge(1e-3), Le(100)] = 0.02,
    ) -> None:
        if width % heads:
            raise UserError(f"backbone.width={width}: must be a multiple of backbone.heads={heads}")
        check_weights("backbone", width * (12 * width * layers + vocabulary_size + max_positions))
        self.width = width
        self.layers = layers
        self.heads = heads
        self.max_positions = max_positions
        self.vocabulary_size = vocabulary_size
        self.dropout = dropout
        self.initializer_range = float(initializer_range)

    def _train_tokenizer(
        self, texts: Iterable[str], normalizer: normalizers.Normalizer | None, special: dict[str, str]
    ) -> PreTrainedTokenizerBase:
        if isinstance(texts, str):
            raise UserError("texts: is a single text, whose letters are no texts; give a list")
        # Byte-level BPE knows every character, and comes out the same each time; the trainer of WordPiece does not.
        tokenizer = Tokenizer(models.BPE())
        tokenizer.normalizer = normalizer
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = decoders.ByteLevel()
        settings = f"{tokenizers.__version__} {self.vocabulary_size} {special} {tokenizer.to_str()}"

        def train() -> Tokenizer:
            trainer = trainers.BpeTrainer(
                vocab_size=self.vocabulary_size,
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                special_tokens=list(special.values()),
                show_progress=False,
            )
            # A document of noise is a list of sentences.
            whole = (piece for text in texts for piece in ([text] if isinstance(text, str) else text))
            # The time it takes grows with the square of the longest word.
            tokenizer.train_from_iterator((_LONG_WORD.sub(r"\g<0> ", text) for text in whole), trainer)
            return tokenizer

        trained = texts.trained(settings, train) if isinstance(texts, TrainingText) else train()
        return PreTrainedTokenizerFast(tokenizer_object=trained, **special)


class TinyBert(Tiny):
    """A small BERT; its arguments are those of `Tiny`."""

    def config(self) -> PreTrainedConfig:
        return BertConfig(**self._settings())

    def _settings(self) -> dict[str, Any]:
        """What the configs of BERT and its relatives have in common."""
        return {
            "vocab_size": self.vocabulary_size,
            "hidden_size": self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "intermediate_size": 4 * self.width,
            "max_position_embeddings": self.max_positions,
            "initializer_range": self.initializer_range,
            "hidden_dropout_prob": self.dropout,
            "attention_probs_dropout_prob": self.dropout,
            # The tokenizer's first token.
            "pad_token_id": 0,
        }

    def tokenizer(self, texts: Iterable[str]) -> PreTrainedTokenizerBase:
        special = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
        return self._train_tokenizer(texts, normalizers.Lowercase(), special)

    def encoder(self, tokenizer: PreTrainedTokenizerBase) -> Encoder:
        config = self.config()
        config.vocab_size = len(tokenizer)
        # RoFormer has no pooling layer to leave out.
        options = {} if config.model_type == "roformer" else {"add_pooling_layer": False}
        return Encoder(AutoModel.from_config(config, **options), tokenizer)


class TinyRoFormer(TinyBert):
    """A small RoFormer: BERT with rotary positions (Su et al. 2021, arXiv 2104.09864).

    Facts stand anywhere in the noise. A table of positions learns at each place anew how the words of a sentence belong
    together; rotary positions tell how far two words are apart. Its arguments are those of `Tiny`.
    """

    def config(self) -> PreTrainedConfig:
        return RoFormerConfig(**self._settings(), embedding_size=self.width)


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
        width: Annotated[int, Ge(1), Le(2**15)] = 128,
        layers: Annotated[int, Ge(1), Le(1000)] = 4,
        heads: Annotated[int, Ge(1)] = 4,
        max_positions: Annotated[int, Ge(1), Le(2**20)] = 1024,
        window: Annotated[int, Ge(2)] = 64,
        vocabulary_size: Annotated[int, Ge(300), Le(2**20)] = 2000,
        dropout: Annotated[float, Ge(0), Lt(1)] = 0.0,
    ) -> None:
        super().__init__(width, layers, heads, max_positions, vocabulary_size, dropout)
        if window % 2 or max_positions % window:
            raise UserError(f"backbone.window={window}: must be even and divide backbone.max_positions={max_positions}")
        self.window = window

    def config(self) -> PreTrainedConfig:
        settings = self._settings()
        # Its positions begin after that of padding, as RoBERTa's do.
        settings["max_position_embeddings"] += settings["pad_token_id"] + 1
        return LongformerConfig(**settings, attention_window=self.window)


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
        UserError: if positions do not hold a whole number of blocks, or too few to leave any out.
    """

    def __init__(
        self,
        width: Annotated[int, Ge(1), Le(2**15)] = 128,
        layers: Annotated[int, Ge(1), Le(1000)] = 4,
        heads: Annotated[int, Ge(1)] = 4,
        max_positions: Annotated[int, Ge(1), Le(2**20)] = 1024,
        block_size: Annotated[int, Ge(1)] = 16,
        random_blocks: Annotated[int, Ge(1)] = 1,
        vocabulary_size: Annotated[int, Ge(300), Le(2**20)] = 2000,
        dropout: Annotated[float, Ge(0), Lt(1)] = 0.0,
    ) -> None:
        super().__init__(width, layers, heads, max_positions, vocabulary_size, dropout)
        if max_positions % block_size:
            raise UserError(f"backbone.block_size={block_size}: must divide backbone.max_positions={max_positions}")
        if (5 + 2 * random_blocks) * block_size >= max_positions:
            raise UserError(
                f"backbone.random_blocks={random_blocks}: with blocks of {block_size} tokens, no input within "
                f"backbone.max_positions={max_positions} is long enough to be read sparsely; give less"
            )
        self.block_size = block_size
        self.random_blocks = random_blocks

    def config(self) -> PreTrainedConfig:
        return BigBirdConfig(**self._settings(), block_size=self.block_size, num_random_blocks=self.random_blocks)


class TinyGPT(Tiny):
    """A small GPT-2; its arguments are those of `Tiny`. Its tokenizer keeps capitals, since it has to write."""

    def tokenizer(self, texts: Iterable[str]) -> PreTrainedTokenizerBase:
        return self._train_tokenizer(texts, None, {"pad_token": "[PAD]", "eos_token": "[EOS]"})

    def config(self) -> PreTrainedConfig:
        return GPT2Config(
            vocab_size=self.vocabulary_size,
            n_embd=self.width,
            n_layer=self.layers,
            n_head=self.heads,
            n_positions=self.max_positions,
            initializer_range=self.initializer_range,
            embd_pdrop=self.dropout,
            attn_pdrop=self.dropout,
            resid_pdrop=self.dropout,
            bos_token_id=None,
            eos_token_id=None,
        )

    def decoder(self, tokenizer: PreTrainedTokenizerBase) -> Decoder:
        config = self.config()
        config.vocab_size, config.pad_token_id = len(tokenizer), tokenizer.pad_token_id
        config.bos_token_id = config.eos_token_id = tokenizer.eos_token_id
        return Decoder(AutoModelForCausalLM.from_config(config), tokenizer)
