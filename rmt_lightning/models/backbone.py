"""A Hugging Face encoder or causal language model behind one small interface.

Shapes: B batch, N tokens that the backbone sees, E width of the embeddings, D width of the hidden states, V vocabulary.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BigBirdModel,
    LongformerModel,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.utils import logging as hf_logging

from rmt_lightning.core.errors import UserError
from rmt_lightning.core.hub import out_of_reach

# They tell of padding to whole windows and blocks, which changes nothing.
logging.getLogger(LongformerModel.__module__).setLevel(logging.ERROR)
logging.getLogger(BigBirdModel.__module__).setLevel(logging.ERROR)


# They hand back windows around each token, or blocks, and pad inputs to whole ones.
SPARSE = ("longformer", "big_bird")


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


class Transformer(nn.Module):
    """What encoders and decoders have in common.

    Args:
        model: any Hugging Face model that takes `inputs_embeds`.
        tokenizer: the one that goes with it.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        # from_pretrained hands models over for inference, with dropout off.
        self.model = model.train()
        self.tokenizer = tokenizer

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
        return int(self.model.config.max_position_embeddings)

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

    def apart(self, *inputs: Tensor | None) -> Layers:
        """The parts of the forward pass that `forward` makes of these inputs. The embedding alone is computed.

        Raises:
            UserError: if the backbone cannot be taken apart.
        """
        size = self.model.config.num_hidden_layers
        stacks = [
            (owner, part)
            for owner in self.model.modules()
            for part in owner.children()
            if isinstance(part, nn.ModuleList) and len(part) == size
        ]
        if len(stacks) != 1 or self.model.config.model_type in SPARSE:
            raise UserError(
                f"backbone: the layers of {self.model.config.model_type} cannot be run one by one; choose an encoder "
                f"such as BERT, or {_DECODERS}"
            )
        ((owner, layers),) = stacks
        with _noted(layers) as calls:
            self(*inputs)
        after = [part for name in _AFTER_LAYERS if (part := getattr(owner, name, None)) is not None]
        return Layers(calls[0].given[0], tuple(calls), nn.Sequential(*after))


@dataclass(frozen=True)
class _Call:
    """A layer and how it was called, to be called so again with other hidden states (B, N, D)."""

    layer: nn.Module
    given: tuple[Any, ...]
    named: dict[str, Any]

    def __call__(self, hidden: Tensor) -> Tensor:
        made = self.layer(hidden, *self.given[1:], **self.named)
        output: Tensor = made[0] if isinstance(made, tuple) else made
        return output


class _AllNoted(Exception):
    """The last layer has been reached."""


@contextmanager
def _noted(layers: nn.ModuleList) -> Iterator[list[_Call]]:
    """While it is open, layers compute nothing; the list grows by how they are called. What follows is not reached.

    Families differ in what their layers take: masks, positions or rotations of them, relative biases. None of it
    depends on what the layers before have made of the text.
    """
    calls: list[_Call] = []

    def note(layer: nn.Module, *given: Any, **named: Any) -> Any:
        calls.append(_Call(layer, given, named))
        if layer is layers[-1]:
            raise _AllNoted
        return given

    for layer in layers:
        vars(layer)["forward"] = partial(note, layer)
    try:
        yield calls
    except _AllNoted:
        pass
    finally:
        for layer in layers:
            del vars(layer)["forward"]


# What follows the last layer, if there is such a thing, in order: a norm, then a projection in the OPT of 350M.
_AFTER_LAYERS = ("ln_f", "final_layer_norm", "final_norm", "norm", "project_out")


class Encoder(Transformer):
    """What the recurrence needs of an encoder: embed token ids, turn embeddings into hidden states.

    Args:
        model: any Hugging Face encoder that takes `inputs_embeds`.
        tokenizer: tells which ids stand for [CLS], [SEP] and padding.

    Raises:
        UserError: if the tokenizer has no such tokens.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        # A pooler would be computed for nothing, and DDP does not like parameters without gradient.
        if getattr(model, "pooler", None) is not None:
            model.register_module("pooler", None)
        super().__init__(model, tokenizer)
        cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
        if cls is None or sep is None:
            raise UserError(
                f"backbone: {model.config.model_type} has no tokens to begin and to end a segment; choose an encoder "
                "such as BERT, RoBERTa, DistilBERT, ELECTRA, MPNet or ModernBERT"
            )
        self.cls_token_id = int(cls)
        self.sep_token_id = int(sep)

    @property
    def max_positions(self) -> int:
        """How many tokens the backbone can see at once."""
        table = getattr(getattr(self.model, "embeddings", None), "position_embeddings", None)
        # RoBERTa and MPNet keep the first rows of the table for padding.
        padding = getattr(table, "padding_idx", None)
        return super().max_positions if padding is None else super().max_positions - padding - 1

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


class Decoder(Transformer):
    """What the recurrence needs of a causal language model: hidden states under a mask of its own, and next words.

    Args:
        model: any Hugging Face causal language model with scaled-dot-product attention, such as GPT-2, OPT, GPT-NeoX,
            Llama or Qwen.
        tokenizer: the one that goes with it.

    Raises:
        UserError: if the model cannot be told which tokens see which, or where they stand, or if it reads words off its
            last states by more than a linear map.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        kind, attention = model.config.model_type, model.config._attn_implementation
        # Other kinds of attention may ignore a mask of four dimensions without a word.
        if attention != "sdpa":
            raise UserError(
                f"backbone: {kind} comes with {attention} attention, and memory needs scaled-dot-product attention "
                f"(sdpa); choose {_DECODERS}"
            )
        if "position_ids" not in inspect.signature(model.base_model.forward).parameters:
            raise UserError(f"backbone: {kind} cannot be told the positions of tokens; choose {_DECODERS}")
        if not _reads_words_linearly(model):
            raise UserError(
                f"backbone: {kind} scales or bounds its scores of words, and only plain ones are read; "
                f"choose {_DECODERS}"
            )
        super().__init__(model, tokenizer)

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

    def forward(self, embeddings: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        """What the last layer makes of embeddings.

        Args:
            embeddings: (B, N, E).
            attention_mask: (B or 1, 1, N, N), added to the attention scores: row q holds 0 for what q may see.
            position_ids: (B or 1, N).

        Returns:
            (B, N, D).
        """
        hidden: Tensor = self.model.base_model(
            inputs_embeds=embeddings, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
        )[0]
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the words that may come next: (…, D) -> (…, V)."""
        scores: Tensor = self._to_words(hidden)
        return scores


@torch.no_grad()
def _reads_words_linearly(model: PreTrainedModel) -> bool:
    """Whether its scores are what `Decoder.logits` makes of them; those of Gemma 2, Cohere and Granite are not."""
    tokens = torch.tensor([[1, 2, 3]], device=model.device)
    was_training = model.training
    model.eval()
    scores = model(input_ids=tokens).logits
    linear = model.get_output_embeddings()(model.base_model(input_ids=tokens)[0])
    model.train(was_training)
    return torch.allclose(scores, linear, rtol=1e-3, atol=1e-5)


_DECODERS = "a causal language model such as GPT-2, OPT, GPT-NeoX, Llama or Qwen"


class Backbone(Protocol):
    """How a backbone comes into being."""

    def config(self) -> PreTrainedConfig:
        """Its architecture, which can be had without text and without weights."""

    def tokenizer(self, texts: Iterable[str]) -> PreTrainedTokenizerBase:
        """The backbone's tokenizer; one that has none of its own learns it from `texts`."""

    # Beside it, at least one of the following, with the weights that training starts from:
    #   encoder(tokenizer) -> Encoder
    #   decoder(tokenizer) -> Decoder


_CHOICES = {
    "encoder": "an encoder; choose backbone=tiny_bert, minilm or bert_base_cased",
    "decoder": "a causal language model; choose backbone=tiny_gpt or gpt2",
}


def parts_for(
    constructor: Callable[..., Any], backbone: Backbone, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """What a model's constructor asks for by name: an `encoder`, a `decoder`, the `tokenizer`.

    Raises:
        UserError: if the backbone is of the other kind.
    """
    asked = inspect.signature(constructor).parameters
    parts: dict[str, Any] = {"tokenizer": tokenizer} if "tokenizer" in asked else {}
    for kind, choice in _CHOICES.items():
        if kind in asked:
            if not hasattr(backbone, kind):
                raise UserError(f"backbone: {constructor.__name__} needs {choice}")
            parts[kind] = getattr(backbone, kind)(tokenizer)
    return parts


class Pretrained:
    """An encoder or causal language model with pretrained weights.

    Args:
        name: an id on the Hugging Face Hub, or a folder with config, weights and tokenizer.

    Raises:
        UserError: if there is no such model, or the Hub cannot be reached.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def config(self) -> PreTrainedConfig:
        config: PreTrainedConfig = self._load(AutoConfig)
        return config

    def tokenizer(self, texts: Iterable[str]) -> PreTrainedTokenizerBase:
        tokenizer: PreTrainedTokenizerBase = self._load(AutoTokenizer)
        return tokenizer

    def encoder(self, tokenizer: PreTrainedTokenizerBase) -> Encoder:
        # from_pretrained would keep the checkpoint's precision; training needs full precision weights.
        return Encoder(self._load(AutoModel, dtype=torch.float32), tokenizer)

    def decoder(self, tokenizer: PreTrainedTokenizerBase) -> Decoder:
        kind = self._load(AutoConfig).model_type
        # transformers would run BERT as a decoder that it was never trained to be.
        if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
            raise UserError(f"backbone.name={self.name}: {kind} is an encoder; choose {_DECODERS}")
        return Decoder(self._load(AutoModelForCausalLM, dtype=torch.float32), tokenizer)

    def _load(self, auto_class: Any, **options: Any) -> Any:
        if os.sep in self.name and self.name.count("/") != 1 and not Path(self.name).is_dir():
            raise UserError(f"backbone.name={self.name}: no such folder; give a folder or a Hugging Face Hub id")
        hf_logging.disable_progress_bar()
        if not Path(self.name).is_dir() and out_of_reach(f"backbone.name={self.name}"):
            # What was loaded before is in the Hub's cache.
            options["local_files_only"] = True
        try:
            return auto_class.from_pretrained(self.name, trust_remote_code=False, **options)
        except (OSError, ValueError, StrictDataclassError) as error:
            if "custom code" in str(error):
                raise UserError(
                    f"backbone.name={self.name}: brings code of its own, which is not executed; give a model that "
                    "transformers knows"
                ) from None
            # The Hub's checks of a config tell what is wrong in their last line.
            reason = str(error).splitlines()[-1 if isinstance(error, StrictDataclassError) else 0].strip()
            raise UserError(
                f"backbone.name={self.name}: cannot be loaded ({reason}); give a folder that holds a model, or a "
                "Hugging Face Hub id while the network is there, or use backbone=tiny_bert or tiny_gpt"
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

    def config(self) -> PreTrainedConfig:
        config: PreTrainedConfig = AutoConfig.from_pretrained(self.config_folder, trust_remote_code=False)
        return config

    def tokenizer(self, texts: Iterable[str]) -> PreTrainedTokenizerBase:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            self.tokenizer_folder, trust_remote_code=False
        )
        return tokenizer

    def encoder(self, tokenizer: PreTrainedTokenizerBase) -> Encoder:
        return Encoder(AutoModel.from_config(self.config()), tokenizer)

    def decoder(self, tokenizer: PreTrainedTokenizerBase) -> Decoder:
        return Decoder(AutoModelForCausalLM.from_config(self.config()), tokenizer)
