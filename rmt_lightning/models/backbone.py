"""A Hugging Face encoder or causal language model behind one small interface.

Shapes: B batch, N tokens that the backbone sees, E width of the embeddings, D width of the hidden states, V vocabulary.
"""

from __future__ import annotations

import copy
import inspect
import logging
import random
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BigBirdModel,
    Cache,
    LongformerModel,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.masking_utils import (
    create_bidirectional_mask,
    create_bidirectional_sliding_window_mask,
    create_masks_for_generate,
)

from rmt_lightning.core.errors import UserError
from rmt_lightning.models import bert

# They tell of padding to whole windows and blocks, which changes nothing.
logging.getLogger(LongformerModel.__module__).setLevel(logging.ERROR)
logging.getLogger(BigBirdModel.__module__).setLevel(logging.ERROR)


# They hand back windows around each token, or blocks, and pad inputs to whole ones.
SPARSE = ("longformer", "big_bird")
_SPECIAL = ("pad", "bos", "eos", "cls", "sep", "mask", "unk")


class Layers(NamedTuple):
    """A forward pass in its parts: `finish(steps[-1](… steps[0](hidden)))` is what it returns.

    Attributes:
        hidden: (B, N, D) what the first layer is given: words and positions, embedded.
        steps: the layers, (B, N, D) -> (B, N, D) each; they have been told what may be seen and where tokens stand.
        finish: what follows the last layer, such as a norm.
    """

    hidden: Tensor
    steps: tuple[Callable[[Tensor], Tensor], ...]
    finish: Callable[[Tensor], Tensor]


class Transformer(nn.Module, ABC):
    """What encoders and decoders have in common.

    Families differ in what they do with embeddings, masks and positions, and no flag tells. So each model is tried
    before it is used, on a few tokens.

    Args:
        model: any Hugging Face model that takes `inputs_embeds`, also one that PEFT has put adapters into.
        tokenizer: the one that goes with it.

    Raises:
        UserError: if weights are no numbers, if the tokenizer knows more words than the model, or if the model does not
            do as it is told.
    """

    # How the model comes out of its config, and what serves instead of one that does not.
    AUTO: ClassVar[Any]
    OTHERS: ClassVar[str]

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        # Whether layers hand on tuples, which is not known before they have been taken apart.
        self._in_tuples: bool | None = None
        for name, weight in model.named_parameters():
            if not weight.sum(dtype=torch.float64).isfinite():
                raise UserError(f"backbone: its weights are damaged ({name} is not finite); give whole ones")
        self._try()
        # from_pretrained hands models over for inference, with dropout off.
        model.train()

    def _try(self) -> None:
        """Raise a UserError if the model does not do what recurrence needs."""
        with _tried(self.model):
            try:
                self._check_vocabulary()
                fault = self._fault(self._some_words(min(12, self.max_positions)))
            except UserError:
                raise
            except Exception as error:  # families fail in ways of their own
                fault = f"cannot be run on embeddings ({told(error)})"
        if fault:
            raise UserError(f"backbone: {self.model.config.model_type} {fault}; choose {self.OTHERS}")

    @abstractmethod
    def _fault(self, words: Tensor) -> str | None:
        """What is wrong with the model, if anything is; `words` are two rows of ids (2, N), alike nowhere."""

    def _some_words(self, length: int) -> Tensor:
        """Two rows of ids without special ones (2, length), drawn at random; no word stands in both."""
        config, tokenizer = self.model.config, self.tokenizer
        special = {*tokenizer.all_special_ids, *(getattr(config, f"{name}_token_id", None) for name in _SPECIAL)}
        ordinary = [i for i in range(min(self._words.num_embeddings, 10_000)) if i not in special]
        drawn = torch.tensor(random.Random(0).sample(ordinary, len(ordinary)), device=self._words.weight.device)
        return drawn.repeat(2 * length)[: 2 * length].view(2, length)

    def _check_vocabulary(self) -> None:
        tokenizer, known = self.tokenizer, self._words.num_embeddings
        # A special token that no text holds, such as one for images, may have no embedding.
        unused = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} - {
            tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id
        }  # fmt: skip
        if beyond := sum(i >= known and i not in unused for i in tokenizer.get_vocab().values()):
            raise UserError(
                f"backbone: its tokenizer has {beyond} tokens beyond the {known} that its embedding has rows for; give "
                "the tokenizer that belongs to the model, or resize the embedding"
            )

    def check_told_by_config(self) -> None:
        """Raise a UserError unless the config alone, which is what is saved, makes a model that the weights fit."""
        with torch.device("meta"), torch.random.fork_rng([]):
            again = self.AUTO.from_config(copy.deepcopy(self.model.config))
        told, weights = ({name: x.shape for name, x in m.state_dict().items()} for m in (again, self.model))
        names = {name for name in told.keys() | weights.keys() if not name.startswith("pooler.")}
        if strange := sorted(name for name in names if told.get(name) != weights.get(name)):
            raise UserError(
                f"backbone: {len(strange)} of its weights, such as {strange[0]}, are not as its config tells, so it "
                "could not be opened again; merge adapters with merge_and_unload, and give what "
                f"{self.AUTO.__name__} makes of a config"
            )

    @property
    def _words(self) -> nn.Embedding:
        return cast(nn.Embedding, self.model.get_input_embeddings())

    @property
    def width(self) -> int:
        """D."""
        return int(self.model.config.hidden_size)

    @property
    def embedding_width(self) -> int:
        """E. That of ELECTRA is smaller than D."""
        return int(self._words.weight.shape[1])

    @property
    def embedding_scale(self) -> float:
        """Standard deviation of the word embeddings."""
        return float(self._words.weight.detach().std())

    @property
    def max_positions(self) -> int:
        """How many tokens the backbone can see at once."""
        known = getattr(self.model.config, "max_position_embeddings", None)
        # Families whose positions are relative have no such number, or -1, as XLNet does.
        return sys.maxsize if known is None or known < 0 else int(known)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Word embeddings, before positions are added: (B, N) -> (B, N, E)."""
        embedded: Tensor = self._words(input_ids)
        return embedded

    @contextmanager
    def recorded(self) -> Iterator[list[Tensor]]:
        """While it is open, the list grows by the attention weights (L, B, H, N, N) of each forward pass.

        The backbone's fast attention does not keep its weights, so it is replaced by the plain one for that time.

        Raises:
            UserError: if the backbone's attention is sparse.
        """
        model = self.model
        if model.config.model_type in SPARSE:
            raise UserError(
                f"backbone: the sparse attention of {model.config.model_type} keeps no whole maps; give a run with "
                "another encoder, such as BERT"
            )
        weights: list[Tensor] = []

        def keep(_model: object, _args: object, output: Any) -> None:
            stacked = torch.stack(output.attentions).detach().cpu()
            # numpy knows no bfloat16.
            weights.append(stacked.to(torch.promote_types(stacked.dtype, torch.float32)))

        fast = model.config._attn_implementation
        hook = model.base_model.register_forward_hook(keep)
        model.set_attn_implementation("eager")
        model.config.output_attentions = True
        try:
            yield weights
        finally:
            model.config.output_attentions = False
            model.set_attn_implementation(fast)
            hook.remove()

    def apart(self, *inputs: Any) -> Layers:
        """The parts of the forward pass that the model makes of these inputs. The embedding alone is computed.

        Raises:
            UserError: if the backbone cannot be taken apart.
        """
        if self._in_tuples is None:
            self._try_apart(*inputs)
        return self._apart(*inputs)

    def _apart(self, *inputs: Any) -> Layers:
        layers = self._layers()
        with self._skipped(layers) as calls:
            self._whole(*inputs)

        def finish(hidden: Tensor) -> Tensor:
            finished: list[Tensor] = []
            with self._skipped(layers, hidden):
                finished.append(self._whole(*inputs))
            return finished[0]

        return Layers(calls[0].hidden, tuple(calls), finish)

    @abstractmethod
    def _whole(self, *inputs: Any) -> Tensor:
        """What the model itself makes of the inputs of `forward`, all of it: (B, N, D)."""

    def _layers(self) -> nn.ModuleList:
        size = self.model.config.num_hidden_layers
        (layers,) = (part for part in self.model.modules() if isinstance(part, nn.ModuleList) and len(part) == size)
        return layers

    def _try_apart(self, *inputs: Any) -> None:
        """Raise a UserError unless the parts make the whole."""
        kind, made, same = self.model.config.model_type, [], False
        # Families fail in ways of their own.
        with _tried(self.model), suppress(Exception):
            hook = self._layers()[-1].register_forward_hook(lambda _layer, _given, output: made.append(output))
            whole = self._whole(*inputs)
            hook.remove()
            self._in_tuples = isinstance(made[0], tuple)
            parts = self._apart(*inputs)
            hidden = parts.hidden
            for step in parts.steps:
                hidden = step(hidden)
            same = kind not in SPARSE and _alike(parts.finish(hidden), whole)
        if not same:
            self._in_tuples = None
            raise UserError(
                f"backbone: the layers of {kind} cannot be run one by one; choose an encoder such as BERT, or "
                f"{Decoder.OTHERS}"
            )

    @contextmanager
    def _skipped(self, layers: nn.ModuleList, result: Tensor | None = None) -> Iterator[list[_Call]]:
        """While it is open, layers compute nothing; the list grows by how they are called.

        Families differ in what their layers take: masks, positions or rotations of them, relative biases. None of it
        depends on what the layers before have made of the text.

        Args:
            layers: the layers.
            result: what the last one hands on, (B, N, D); None: what follows it is not reached.
        """
        calls: list[_Call] = []

        def note(layer: nn.Module, hidden: Tensor, *given: Any, **named: Any) -> Any:
            calls.append(_Call(layer, hidden, given, named))
            if layer is layers[-1]:
                if result is None:
                    raise _AllNoted
                hidden = result
            return (hidden,) if self._in_tuples else hidden

        for layer in layers:
            vars(layer)["forward"] = partial(note, layer)
        try:
            yield calls
        except _AllNoted:
            pass
        finally:
            for layer in layers:
                del vars(layer)["forward"]


@dataclass(frozen=True)
class _Call:
    """A layer and how it was called, to be called so again with other hidden states (B, N, D)."""

    layer: nn.Module
    hidden: Tensor
    given: tuple[Any, ...]
    named: dict[str, Any]

    def __call__(self, hidden: Tensor) -> Tensor:
        made = self.layer(hidden, *self.given, **self.named)
        output: Tensor = made[0] if isinstance(made, tuple) else made
        return output


class _AllNoted(Exception):
    """The last layer has been reached."""


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
    OTHERS = "an encoder such as BERT, RoBERTa, DistilBERT, ELECTRA, MPNet or ModernBERT"

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        model = _inside(model)
        # A pooler would be computed for nothing, and DDP does not like parameters without gradient.
        if getattr(model, "pooler", None) is not None:
            model.register_module("pooler", None)
        cls = tokenizer.bos_token_id if tokenizer.cls_token_id is None else tokenizer.cls_token_id
        sep = tokenizer.eos_token_id if tokenizer.sep_token_id is None else tokenizer.sep_token_id
        if cls is None or sep is None:
            raise UserError(
                f"backbone: {model.config.model_type} has no tokens to begin and to end a segment; choose {self.OTHERS}"
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
        if not _alike(hidden[1], hidden[0], 1e-5):
            return "does not obey a mask: what it makes of a text depends on the padding after it"
        if not _alike(hidden[0], plain[0]):
            return "makes of embeddings something else than of the words they stand for"
        if _alike(hidden[2, 0], hidden[0, 0], 1e-6):
            return "lets its first token, which answers are read at, see nothing of a text"
        if self._has_windows:
            try:
                self(embedded, mask, slice(1, 2))
            except Exception:  # families fail in ways of their own
                return "has layers that see a window of a text, and cannot be told to see memory beside it"
        return None

    @property
    def _has_windows(self) -> bool:
        return "sliding_attention" in (getattr(self.model.config, "layer_types", None) or ())

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
        """The mask (B, N), or those of each kind of layers if some see a window of the text, and memory beside it."""
        config = self.model.config
        places = range(embeddings.shape[1])[memory]
        if not places or not self._has_windows:
            return attention_mask

        def is_memory(place: Tensor) -> Tensor:
            return (place >= places.start) & (place < places.stop)

        return {
            "full_attention": create_bidirectional_mask(config, embeddings, attention_mask),
            "sliding_attention": create_bidirectional_sliding_window_mask(
                config,
                embeddings,
                attention_mask,
                or_mask_function=lambda _batch, _head, reader, seen: is_memory(reader) | is_memory(seen),
            ),
        }

    def _choose_attention(self, length: int) -> None:
        """Sparse attention takes more than 5 blocks and 2 for each random one.

        BigBird falls back to full attention by itself, but never returns.
        """
        config = self.model.config
        fits = length > (5 + 2 * config.num_random_blocks) * config.block_size
        cast(BigBirdModel, self.model).set_attention_type(config.attention_type if fits else "original_full")


class SegmentCache(Cache):
    """Keys and values of a segment that is read piece by piece, each in the slot that its token's position tells.

    So rows may be of unequal length. What a row has not filled yet, or still holds from before, is hidden from it.

    Args:
        size: how many positions there are.
    """

    # Where the tokens stand that are being read, (B, N), and how many slots they see at most.
    places: Tensor
    end: int

    def __init__(self, size: int) -> None:
        super().__init__(layers=[])
        self.size = size
        self._kept: list[tuple[Tensor, ...]] = []

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_args: Any, **_named: Any
    ) -> tuple[Tensor, Tensor]:
        """Keep those of new tokens (B, H, N, …), and hand back all that are seen (B, H, end, …)."""
        new = key_states, value_states
        if layer_idx == len(self._kept):
            self._kept.append(tuple(part.new_zeros(*part.shape[:2], self.size, part.shape[3]) for part in new))
        keys, values = self._kept[layer_idx]
        for kept, part in zip((keys, values), new, strict=True):
            kept.scatter_(2, self.places[:, None, :, None].expand_as(part), part)
        return keys[:, :, : self.end], values[:, :, : self.end]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions are told, not counted."""
        return 0


class Decoder(Transformer):
    """What the recurrence needs of a causal language model: hidden states under a mask of its own, and next words.

    Args:
        model: any Hugging Face causal language model with scaled-dot-product attention, such as GPT-2, OPT, GPT-NeoX,
            Llama or Qwen.
        tokenizer: the one that goes with it.

    Raises:
        UserError: if the model cannot be told which tokens see which, or where they stand, or if it reads words off its
            last states by more than a linear map.

    Attributes:
        can_write: whether the weights that words are read off with have been trained.
    """

    AUTO = AutoModelForCausalLM
    OTHERS = "a causal language model such as GPT-2, OPT, GPT-NeoX, Llama or Qwen"
    can_write = True

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        model = _inside(model)
        kind, attention = model.config.model_type, model.config._attn_implementation
        # Other kinds of attention may ignore a mask of four dimensions without a word.
        if attention != "sdpa":
            raise UserError(
                f"backbone: {kind} comes with {attention} attention, and memory needs scaled-dot-product attention "
                f"(sdpa); choose {self.OTHERS}"
            )
        if "position_ids" not in inspect.signature(model.base_model.forward).parameters:
            raise UserError(f"backbone: {kind} cannot be told the positions of tokens; choose {self.OTHERS}")
        if model.get_output_embeddings() is None:
            raise UserError(f"backbone: {kind} comes without what words are read off with; give AutoModelForCausalLM")
        super().__init__(model, tokenizer)
        # Whether pieces make the whole, by its size, which is not known before it is tried.
        self._in_pieces: dict[int, bool] = {}

    def _fault(self, words: Tensor) -> str | None:
        length = words.shape[1]
        size, half = length * 3 // 4, length * 3 // 8
        text, other = words[0, :size], words[1]
        places = torch.arange(length, device=words.device)
        hole = (places >= half) & (places < half + length - size)
        # The same text around a hole with one filling and another; and two texts that share but the first token, which
        # sees all the others.
        rows = words[:1].repeat(4, 1)
        rows[:2, ~hole] = text
        rows[1, hole] = other[hole]
        rows[3, 1:] = other[1:]
        visible = places.new_ones(4, length, length, dtype=torch.bool)
        visible[:2] = visible[:2].tril() & ~hole | torch.eye(length, dtype=torch.bool, device=words.device)
        positions = places.repeat(4, 1)
        positions[:2, ~hole] = places[:size]
        with _windows(self.model.config, length):
            plain = text_states = self.model.base_model(input_ids=text[None])[0][0]
            scores = self.model(input_ids=text[None, :3]).logits[0]
            embedded = self.embed(rows)
            # Memory is no word.
            embedded[2:, 1] = embedded[2].mean(dim=0)
            hidden = self(embedded, visible, positions, slice(0, 1))
        if not (_alike(hidden[1, ~hole], hidden[0, ~hole], 1e-5) and _alike(hidden[0, ~hole], plain)):
            return "does not obey masks and positions: what it makes of a text depends on what is hidden from it"
        if _alike(hidden[3, 0], hidden[2, 0], 1e-6):
            return "lets no token see a later one, as those of memory must"
        with _windows(self.model.config, 3) as windowed:
            if windowed:
                plain = self.model.base_model(input_ids=text[None])[0][0]
                hidden = self(
                    self.embed(text[None]), visible[2:3, :size, :size].tril(), places[None, :size], slice(0, size)
                )
                if not _alike(hidden[0], plain):
                    return "sees a window of a text otherwise than its masks tell"
        # Those of Gemma 2, Cohere and Granite are not.
        if not torch.allclose(scores, self._to_words(text_states[:3]), rtol=1e-3, atol=1e-5):
            return "scales or bounds its scores of words, and only plain ones are read"
        return None

    @property
    def _to_words(self) -> nn.Linear:
        return cast(nn.Linear, self.model.get_output_embeddings())

    @property
    def width(self) -> int:
        """D, that of the states which words are read from. In the OPT of 350M it is smaller than the layers are."""
        return self._to_words.in_features

    @property
    def untied(self) -> list[nn.Parameter]:
        """The parameters that only `logits` uses: none if words are read off with the embeddings that write them."""
        return [weight for weight in self._to_words.parameters() if weight is not self._words.weight]

    def forward(self, embeddings: Tensor, visible: Tensor, position_ids: Tensor, text: slice) -> Tensor:
        """What the last layer makes of embeddings.

        Args:
            embeddings: (B, N, E).
            visible: (B or 1, N, N) bool: row q tells what q may see.
            position_ids: (B or 1, N).
            text: which of the embeddings are text. Where layers see a window of the text, they see all else beside it.

        Returns:
            (B, N, D).
        """
        return self._whole(embeddings, visible, position_ids, text)

    def _whole(self, embeddings: Tensor, visible: Tensor, position_ids: Tensor, text: slice) -> Tensor:
        hidden: Tensor = self.model.base_model(
            inputs_embeds=embeddings,
            attention_mask=self._masks(visible, embeddings, text),
            position_ids=position_ids,
            use_cache=False,
        )[0]
        return hidden

    def reads_pieces(self, size: int) -> bool:
        """Whether a segment of so many tokens may be read by `go_on`."""
        if self.model.training or self.model.config.output_attentions:
            # Dropout would stay with a token, layers that compute activations again take no cache, and maps of
            # attention are those of whole segments.
            return False
        if size not in self._in_pieces:
            self._in_pieces[size] = self._try_pieces(size)
        return self._in_pieces[size]

    def _try_pieces(self, size: int) -> bool:
        words = self._some_words(6)
        # The last one stands at the end, for there are rotations that depend on how far a text reaches.
        places, seen = (words.new_tensor([x, x]) for x in ((0, 1, 2, 3, 4, size - 1), (2, 2, 3, 4, 5, 5)))
        # Families fail in ways of their own.
        with _tried(self.model), suppress(Exception):
            embedded, cache = self.embed(words), SegmentCache(size)
            whole = self(embedded, torch.arange(6, device=words.device) < seen[..., None], places, slice(2, 6))
            made = [
                self.go_on(embedded[:, piece], places[:, piece], seen[:, piece], cache)
                for piece in (slice(4), slice(4, 5), slice(5, 6))
            ]
            unbounded = self._windows(embedded[:1, :1].expand(-1, size, -1)) is None
            return unbounded and _alike(torch.cat(made, dim=1), whole)
        return False

    def go_on(self, embeddings: Tensor, position_ids: Tensor, seen: Tensor, cache: SegmentCache) -> Tensor:
        """What `forward` makes of some tokens of a segment, if those before them have been read into a cache.

        Args:
            embeddings: (B, N, E) of the new tokens.
            position_ids: (B, N).
            seen: (B, N), how many positions each of them sees, counted from the first one.
            cache: takes up what is read.

        Returns:
            (B, N, D).
        """
        cache.places, cache.end = position_ids, int(seen.max())
        visible = torch.arange(cache.end, device=seen.device) < seen[..., None]
        hidden: Tensor = self.model.base_model(
            inputs_embeds=embeddings,
            attention_mask=_added(visible, embeddings.dtype),
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )[0]
        return hidden

    def _windows(self, text: Tensor) -> dict[str, Tensor | None] | None:
        """(1, 1, S, S), what each kind of layers sees of a text (1, S, E) alone; None for all that came before."""
        own = create_masks_for_generate(self.model.config, text, None, None)
        windows = own if isinstance(own, dict) else {"all": own}
        return None if all(window is None or window.dim() != 4 for window in windows.values()) else windows

    def _masks(self, visible: Tensor, embeddings: Tensor, text: slice) -> Tensor | dict[str, Tensor]:
        """What is added to the scores, (B or 1, 1, N, N): 0 for what may be seen; by kinds of layers if they differ."""
        windows = self._windows(embeddings[:1, text])
        if windows is None:
            return _added(visible, embeddings.dtype)
        masks = {}
        for kind, window in windows.items():
            seen = torch.ones_like(visible[:1])
            if window is not None:
                seen[:, text, text] = window[:, 0] if window.dtype == torch.bool else window[:, 0] == 0
            masks[kind] = _added(visible & seen, embeddings.dtype)
        return masks.get("all", masks)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the words that may come next: (…, D) -> (…, V)."""
        if not self.can_write:
            raise UserError(
                "backbone.name: its folder has no weights that words are read off with, so it can only classify; "
                "choose answer=classify, or give the folder of a whole language model"
            )
        scores: Tensor = self._to_words(hidden)
        return scores


def _inside(model: PreTrainedModel) -> PreTrainedModel:
    """The model that PEFT has put adapters into, without the wrapper, which hides how it is called."""
    unwrap: Callable[[], PreTrainedModel] | None = getattr(model, "get_base_model", None)
    if unwrap is None:
        return model
    inside = unwrap()
    kept = {id(weight) for weight in inside.parameters()}
    if any(id(weight) not in kept for weight in model.parameters()):
        raise UserError(
            f"backbone: {inside.config.model_type} comes with trained parts beside its layers, such as prompts, which "
            "would be lost; give adapters within layers, such as LoRA"
        )
    return inside


@contextmanager
def _tried(model: PreTrainedModel) -> Iterator[None]:
    """While it is open, the model can be run without a trace: no gradient, no random number, no dropout."""
    modes = [(module, module.training) for module in model.modules()]
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices):
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training


@contextmanager
def _windows(config: PreTrainedConfig, size: int) -> Iterator[bool]:
    """While it is open, layers that see a window of text see so many tokens. Whether there are such layers."""
    config = config.get_text_config()
    kept = {name: getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")}
    kept = {name: value for name, value in kept.items() if value is not None}
    try:
        for name in kept:
            setattr(config, name, size)
        yield bool(kept)
    finally:
        for name, value in kept.items():
            setattr(config, name, value)


def _added(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to scores so that only what is visible counts: (B, N, N) bool -> (B, 1, N, N)."""
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill(~visible, torch.finfo(dtype).min)[:, None]


def _alike(found: Tensor, expected: Tensor, rounding: float = 1e-4) -> bool:
    """Whether two ways to hidden states lead to the same ones, but for rounding, in single precision, and half."""
    if torch.finfo(found.dtype).bits < 32:
        rounding *= 500
    return bool((found - expected).abs().max() <= rounding * expected.abs().max())


def told(error: Exception) -> str:
    """What went wrong in another library, in a line."""
    told = " ".join(str(error).split())[:200]
    return told if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {told}"
