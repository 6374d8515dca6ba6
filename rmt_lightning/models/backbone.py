"""What the recurrence needs of any Hugging Face model; each is tried before it is used.

Shapes: B batch, N tokens that the backbone sees, E width of the embeddings, D width of the hidden states.
"""

from __future__ import annotations

import copy
import random
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, ClassVar, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from rmt_lightning.core.errors import UserError
from rmt_lightning.models import adapters

# They hand back windows around each token, or blocks, and pad inputs to whole ones.
SPARSE = ("longformer", "big_bird")
# What to choose if a backbone does not serve.
ENCODERS = "an encoder such as BERT, RoBERTa, DistilBERT, ELECTRA, MPNet or ModernBERT"
DECODERS = "a causal language model such as GPT-2, OPT, GPT-NeoX, Llama or Qwen"
# What is wrong if its config or its weights are.
UNREAL = "makes of words what is no number, so its config or its weights are damaged"
_SPECIAL = ("pad", "bos", "eos", "cls", "sep", "mask", "unk")


class Step(Protocol):
    """A layer that has been told what may be seen and where tokens stand: a NamedTuple of that, and of the layer."""

    def __call__(self, hidden: Tensor, /) -> Tensor:
        """(B, N, D) -> (B, N, D)."""


class Layers(NamedTuple):
    """A forward pass in its parts: `finish(steps[-1](… steps[0](hidden)))` is what it returns.

    Attributes:
        hidden: (B, N, D) what the first layer is given: words and positions, embedded.
        steps: the layers.
        finish: what follows the last layer, such as a norm.
    """

    hidden: Tensor
    steps: tuple[Step, ...]
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
        adapters.check_kind(model)
        for name, weight in model.named_parameters():
            if not weight.sum(dtype=torch.float64).isfinite():
                raise UserError(f"backbone: its weights are damaged ({name} is not finite); give whole ones")
        self._try()
        if self.config is not model.config:
            # What sees images never gets a gradient, and DDP does not like that.
            parts = [part for part in model.modules() if getattr(part, "config", None) is self.config]
            reading = {id(weight) for part in [*parts, *_head(model)] for weight in part.parameters()}
            for weight in model.parameters():
                weight.requires_grad_(weight.requires_grad and id(weight) in reading)
        # from_pretrained hands models over for inference, with dropout off.
        model.train()

    def _try(self) -> None:
        """Raise a UserError if the model does not do what recurrence needs."""
        with tried(self.model):
            try:
                self._check_vocabulary()
                fault = self._fault(self.some_words(min(12, self.max_positions)))
            except UserError:
                raise
            except Exception as error:  # families fail in ways of their own
                fault = f"cannot be run on embeddings under a mask ({told(error)})"
        if fault:
            raise UserError(f"backbone: {self.model.config.model_type} {fault}; choose {self.OTHERS}")

    @abstractmethod
    def _fault(self, words: Tensor) -> str | None:
        """What is wrong with the model, if anything is; `words` are two rows of ids (2, N), alike nowhere."""

    def some_words(self, length: int) -> Tensor:
        """Two rows of ids without special ones (2, length), drawn at random; no word stands in both."""
        config, tokenizer = self.config, self.tokenizer
        special = {*tokenizer.all_special_ids, *(getattr(config, f"{name}_token_id", None) for name in _SPECIAL)}
        ordinary = [i for i in range(min(len(self._words.weight), 10_000)) if i not in special]
        drawn = torch.tensor(random.Random(0).sample(ordinary, len(ordinary)), device=self._words.weight.device)
        return drawn.repeat(2 * length)[: 2 * length].view(2, length)

    def _check_vocabulary(self) -> None:
        tokenizer, known = self.tokenizer, len(self._words.weight)
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
        """Raise a UserError unless its config and that of its adapters, which are saved, make what the weights fit."""
        with torch.device("meta"), torch.random.fork_rng([]):
            again = self.AUTO.from_config(copy.deepcopy(self.model.config))
            for adapter in adapters.adapters(self.model):
                try:
                    adapters.add(again, adapter)
                except Exception as error:  # kinds fail in ways of their own
                    raise UserError(
                        f"backbone: its adapters could not be put in again ({told(error)}); merge them with "
                        "merge_and_unload"
                    ) from None
        given, weights = ({name: x.shape for name, x in m.state_dict().items()} for m in (again, self.model))
        names = {name for name in given.keys() | weights.keys() if not name.startswith("pooler.")}
        if strange := sorted(name for name in names if given.get(name) != weights.get(name)):
            raise UserError(
                f"backbone: {len(strange)} of its weights, such as {strange[0]}, are not as its config tells, so it "
                "could not be opened again; merge adapters with merge_and_unload, and give what "
                f"{self.AUTO.__name__} makes of a config"
            )
        adapters.check_on(self.model, again)

    @property
    def config(self) -> PreTrainedConfig:
        """That of the part which reads text. Models that see images too, as larger Gemma 3 do, have others."""
        return self.model.config.get_text_config()

    @property
    def _words(self) -> nn.Embedding:
        return cast(nn.Embedding, self.model.get_input_embeddings())

    @property
    def layer_width(self) -> int:
        """That of the layers."""
        return int(self.config.hidden_size)

    @property
    def width(self) -> int:
        """D, that of what is made of a text."""
        return self.layer_width

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
        known = getattr(self.config, "max_position_embeddings", None)
        # Families whose positions are relative have no such number, or -1, as XLNet does.
        known = sys.maxsize if known is None or known < 0 else int(known)
        # Rotations of this kind are others for all texts of a batch as soon as one of them, or its padding, is longer.
        ropes = getattr(self.config, "rope_parameters", None) or {}
        kinds = [rope for rope in (ropes, *ropes.values()) if isinstance(rope, dict)]
        ends = [rope["original_max_position_embeddings"] for rope in kinds if rope.get("rope_type") == "longrope"]
        return min([known, *ends])

    @property
    def untied(self) -> list[nn.Parameter]:
        """The parameters that only words are read off with."""
        return []

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
        self.config.output_attentions = True
        try:
            yield weights
        finally:
            self.config.output_attentions = False
            model.set_attn_implementation(fast)
            hook.remove()

    def apart(self, *inputs: Any) -> Layers:
        """The parts of the forward pass that the model makes of these inputs. The embedding alone is computed.

        Raises:
            UserError: if the backbone cannot be taken apart.
        """
        if self._in_tuples is None:
            self._try_apart(*inputs)
        return self._apart(lambda: self._whole(*inputs))

    def _apart(self, run: Callable[[], Tensor]) -> Layers:
        """The parts of any forward pass."""
        layers = self._layers()
        with self._skipped(layers) as calls:
            run()

        def finish(hidden: Tensor) -> Tensor:
            finished: list[Tensor] = []
            with self._skipped(layers, hidden):
                finished.append(run())
            return finished[0]

        (hidden, _), *_ = calls
        return Layers(hidden, tuple(call for _, call in calls), finish)

    @abstractmethod
    def _whole(self, *inputs: Any) -> Tensor:
        """What the model itself makes of the inputs of `forward`, all of it: (B, N, D)."""

    def _layers(self) -> nn.ModuleList:
        size = self.config.num_hidden_layers
        (layers,) = (part for part in self.model.modules() if isinstance(part, nn.ModuleList) and len(part) == size)
        return layers

    def _try_apart(self, *inputs: Any) -> None:
        """Raise a UserError unless the parts make the whole."""
        kind, made, same = self.model.config.model_type, [], False
        # Families fail in ways of their own.
        with tried(self.model), suppress(Exception):
            hook = self._layers()[-1].register_forward_hook(lambda _layer, _given, output: made.append(output))
            whole = self._whole(*inputs)
            hook.remove()
            self._in_tuples = isinstance(made[0], tuple)
            parts = self._apart(lambda: self._whole(*inputs))
            hidden = parts.hidden
            for step in parts.steps:
                hidden = step(hidden)
            same = kind not in SPARSE and alike(parts.finish(hidden), whole)
        if not same:
            self._in_tuples = None
            raise UserError(
                f"backbone: the layers of {kind} cannot be run one by one; choose an encoder such as BERT, or "
                f"{DECODERS}"
            )

    @contextmanager
    def _skipped(self, layers: nn.ModuleList, result: Tensor | None = None) -> Iterator[list[tuple[Tensor, _Call]]]:
        """While it is open, layers compute nothing; the list grows by what they are given, and how they are called.

        Families differ in what their layers take: masks, positions or rotations of them, relative biases. None of it
        depends on what the layers before have made of the text.

        Args:
            layers: the layers.
            result: what the last one hands on, (B, N, D); None: what follows it is not reached.
        """
        calls: list[tuple[Tensor, _Call]] = []

        def note(layer: nn.Module, hidden: Tensor, *given: Any, **named: Any) -> Any:
            calls.append((hidden, _Call(layer, given, named)))
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


class _Call(NamedTuple):
    """A layer and how it was called, to be called so again with other hidden states (B, N, D)."""

    layer: nn.Module
    given: tuple[Any, ...]
    named: dict[str, Any]

    def __call__(self, hidden: Tensor) -> Tensor:
        made = self.layer(hidden, *self.given, **self.named)
        output: Tensor = made[0] if isinstance(made, tuple) else made
        return output


class _AllNoted(Exception):
    """The last layer has been reached."""


def _head(model: PreTrainedModel) -> list[nn.Module]:
    """What words are read off with, if anything is."""
    head = model.get_output_embeddings()
    return [] if head is None else [head]


def inside(model: PreTrainedModel) -> PreTrainedModel:
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
def tried(model: PreTrainedModel) -> Iterator[None]:
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


def alike(found: Tensor, expected: Tensor, rounding: float = 1e-4) -> bool:
    """Whether two ways to hidden states lead to the same ones, but for rounding, in single precision, and half."""
    if torch.finfo(found.dtype).bits < 32:
        rounding *= 500
    return bool((found - expected).abs().max() <= rounding * expected.abs().max())


def told(error: Exception) -> str:
    """What went wrong in another library, in a line."""
    told = " ".join(str(error).split())[:200]
    return told if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {told}"
