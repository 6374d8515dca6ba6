"""Where backbones come from: the Hugging Face Hub, a folder, or what a run has left of its own."""

from __future__ import annotations

import inspect
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.utils import CONFIG_NAME, find_adapter_config_file
from transformers.utils import logging as hf_logging

from rmt_lightning.core.errors import UserError
from rmt_lightning.core.files import check_readable
from rmt_lightning.core.hub import out_of_reach
from rmt_lightning.core.run_folder import ADAPTER, BACKBONE, TOKENIZER
from rmt_lightning.models import adapters
from rmt_lightning.models.backbone import Transformer, told
from rmt_lightning.models.configuration import MODEL_TYPE
from rmt_lightning.models.decoder import Decoder
from rmt_lightning.models.encoder import Encoder

log = logging.getLogger(__name__)
_DIGITS = re.compile(r"\d+")


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
    "encoder": "an encoder; choose backbone=tiny_roformer, minilm or bert_base_cased",
    "decoder": "a causal language model; choose backbone=tiny_gpt or gpt2",
}


def parts_for(
    constructor: Callable[..., Any], backbone: Backbone, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """What a model's constructor asks for by name: an `encoder`, a `decoder`, either as `backbone`, the `tokenizer`.

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
    if "backbone" in asked:
        parts["backbone"] = getattr(backbone, _kind(backbone))(tokenizer)
    return parts


def _kind(backbone: Backbone) -> str:
    """Whether it is an `encoder` or a `decoder`."""
    kinds = [kind for kind in _CHOICES if hasattr(backbone, kind)]
    if len(kinds) == 1:
        return kinds[0]
    # transformers would run BERT as a decoder, too.
    return "encoder" if backbone.config().model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES else "decoder"


def reads_backbone(constructor: Callable[..., Any]) -> bool:
    """Whether a model's constructor asks for more of a backbone than its tokenizer."""
    return not {*_CHOICES, "backbone"}.isdisjoint(inspect.signature(constructor).parameters)


def _usable(loaded: Any) -> Any:
    """What has been loaded. Some tokenizers whose files are damaged fail when they come upon a word that is new."""
    if isinstance(loaded, PreTrainedTokenizerBase):
        loaded("Mary \N{SNOWMAN}")
    return loaded


def _parts(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """A config, and those of the models inside, such as that of a vision model's text model."""
    yield config
    for name in config.sub_configs:
        if isinstance(part := getattr(config, name, None), PreTrainedConfig):
            yield from _parts(part)


def refuse_kernels(config: PreTrainedConfig, place: str) -> None:
    """Raise a UserError if a config names attention whose code would be fetched from the Hub, and executed."""
    for part in _parts(config):
        if "/" in (named := str(part._attn_implementation)):
            raise UserError(f"{place}: names code (attn_implementation={named}), which is not executed; take that out")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from warning, in tables and guesses: what matters of it is told once, by us."""
    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)


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
        # transformers would put them in, and train nothing else.
        if self._has_adapters:
            raise UserError(
                f"backbone.name={self.name}: holds adapters of PEFT (adapter_config.json); give a folder without, such "
                "as that of the model they belong to, or what merge_and_unload makes of both"
            )
        config: PreTrainedConfig = self._load(AutoConfig)
        if config.model_type == MODEL_TYPE:
            raise UserError(
                f"backbone.name={self.name}: holds a model of this package, which has a backbone inside; give a "
                "Hugging Face model, or go on with the run that it is from (resume=…)"
            )
        refuse_kernels(config, f"backbone.name={self.name}")
        return config

    def tokenizer(self, texts: Iterable[str]) -> PreTrainedTokenizerBase:
        # It tells what is wrong with the folder; for want of a config, transformers guesses a tokenizer.
        config = self.config()
        tokenizer: PreTrainedTokenizerBase = self._load(AutoTokenizer)
        # Without its files, transformers makes one that knows special tokens alone.
        words = len(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids))
        rows = getattr(config.get_text_config(), "vocab_size", 0)
        if words <= rows // 10:
            raise UserError(
                f"backbone.name={self.name}: its tokenizer knows {words} words, and the model {rows}; put the model's "
                "tokenizer.json and tokenizer_config.json beside its weights"
            )
        return tokenizer

    def encoder(self, tokenizer: PreTrainedTokenizerBase) -> Encoder:
        model, missing = self._weights(Encoder.AUTO)
        self._require(missing)
        return Encoder(model, tokenizer)

    def decoder(self, tokenizer: PreTrainedTokenizerBase) -> Decoder:
        kind = self.config().model_type
        # transformers would run BERT as a decoder that it was never trained to be.
        if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
            raise UserError(f"backbone.name={self.name}: {kind} is an encoder; choose {Decoder.OTHERS}")
        model, missing = self._weights(Decoder.AUTO)
        head = {id(weight) for weight in model.get_output_embeddings().parameters()}
        head -= {id(weight) for weight in model.get_input_embeddings().parameters()}
        unread = {name for name, weight in model.named_parameters() if id(weight) in head}
        self._require(missing - unread)
        decoder = Decoder(model, tokenizer)
        decoder.can_write = not missing & unread
        return decoder

    def _weights(self, auto_class: Any) -> tuple[PreTrainedModel, set[str]]:
        """The model, and the names of its trained weights that were not there, so that they are random."""
        if getattr(self.config(), "quantization_config", None):
            raise UserError(
                f"backbone.name={self.name}: its weights are quantized, and such cannot be trained; give the model "
                "that they were made from"
            )
        # from_pretrained would keep the checkpoint's precision; training needs full precision weights.
        model, found = self._load(
            auto_class, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
        )
        for name, given, needed in sorted(found["mismatched_keys"]):
            raise UserError(
                f"backbone.name={self.name}: its weights do not fit its config.json ({name} has shape "
                f"{tuple(given)}, not {tuple(needed)}); give a folder whose files belong together"
            )
        # Of other layers; a head that is of no use here is nothing to speak of.
        prefix = f"{model.base_model_prefix}."
        layers = {_DIGITS.sub("#", name.removeprefix(prefix)) for name, _ in model.named_parameters()}
        others = found["unexpected_keys"]
        if unused := sorted(name for name in others if _DIGITS.sub("#", name.removeprefix(prefix)) in layers):
            log.info(
                "backbone.name=%s: %d of its weights, such as %s, have no place in what its config.json tells of, and "
                "are left out", self.name, len(unused), unused[0],
            )  # fmt: skip
        # What is not trained, such as sines of positions, is what it must be without being loaded.
        trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
        return model, {name for name in found["missing_keys"] & trained if "pooler" not in name}

    def _require(self, missing: set[str]) -> None:
        if missing:
            raise UserError(
                f"backbone.name={self.name}: {len(missing)} of its weights are missing, such as {min(missing)}; give "
                "a folder whose weights belong to its config.json"
            )

    @property
    def _has_adapters(self) -> bool:
        # What is wrong with the name is told when something is loaded.
        with suppress(Exception):
            return bool(find_adapter_config_file(self.name, local_files_only=self._is_beyond))
        return False

    @property
    def _is_beyond(self) -> bool:
        """Whether it is on the Hub, and that cannot be asked: what was loaded before is in its cache."""
        return not Path(self.name).is_dir() and bool(out_of_reach(f"backbone.name={self.name}"))

    def _load(self, auto_class: Any, **options: Any) -> Any:
        if os.sep in self.name and self.name.count("/") != 1 and not Path(self.name).is_dir():
            raise UserError(f"backbone.name={self.name}: no such folder; give a folder or a Hugging Face Hub id")
        folder = Path(self.name)
        check_readable(folder, *folder.glob("*.json"), *folder.glob("*.safetensors"))
        hf_logging.disable_progress_bar()
        if self._is_beyond:
            options["local_files_only"] = True
        try:
            with _quiet():
                return _usable(auto_class.from_pretrained(self.name, trust_remote_code=False, **options))
        except Exception as error:  # each library raises classes of its own
            if "custom code" in str(error):
                raise UserError(
                    f"backbone.name={self.name}: brings code of its own, which is not executed; give a model that "
                    "transformers knows"
                ) from None
            if "Weights only load failed" in str(error):
                raise UserError(
                    f"backbone.name={self.name}: its pytorch_model.bin holds more than weights, which would have to be "
                    "executed; give a model.safetensors"
                ) from None
            # The Hub's checks of a config tell what is wrong in their last line.
            reason = str(error).splitlines()[-1].strip() if isinstance(error, StrictDataclassError) else told(error)
            hint = "give a folder that holds a model, or a Hugging Face Hub id while the network is there"
            if isinstance(error, OSError) and error.filename and not Path(self.name).is_dir():
                hint = "give a folder that can be written in HF_HOME, or one that holds a model"
            raise UserError(
                f"backbone.name={self.name}: cannot be loaded ({reason}); {hint}, or use backbone=tiny_roformer or "
                "tiny_gpt"
            ) from None


class Restored:
    """Tokenizer and architecture of an earlier run, whose weights are about to come from a checkpoint.

    Args:
        folder: holds what `save_pretrained` of each of `SavedModel.parts` has left.

    Raises:
        UserError: if they cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def config(self) -> PreTrainedConfig:
        config: PreTrainedConfig = self._load(AutoConfig, BACKBONE)
        refuse_kernels(config, f"{self.folder / BACKBONE}")
        return config

    def tokenizer(self, texts: Iterable[str]) -> PreTrainedTokenizerBase:
        tokenizer: PreTrainedTokenizerBase = self._load(AutoTokenizer, TOKENIZER)
        return tokenizer

    def encoder(self, tokenizer: PreTrainedTokenizerBase) -> Encoder:
        return Encoder(self._model(Encoder), tokenizer)

    def decoder(self, tokenizer: PreTrainedTokenizerBase) -> Decoder:
        return Decoder(self._model(Decoder), tokenizer)

    def _model(self, kind: type[Transformer]) -> PreTrainedModel:
        model: PreTrainedModel = kind.AUTO.from_config(self.config())
        if (self.folder / ADAPTER).is_dir():
            with self._whole(ADAPTER):
                adapters.add(model, adapters.saved(self.folder / ADAPTER))
        return model

    def _load(self, auto_class: Any, name: str) -> Any:
        with self._whole(name) as part, _quiet():
            return _usable(auto_class.from_pretrained(part, trust_remote_code=False))

    @contextmanager
    def _whole(self, name: str) -> Iterator[Path]:
        """Where a part stands. Tells if it is damaged or may not be read, if that is found out while it is open."""
        part = self.folder / name
        if name == TOKENIZER and not part.exists() and (self.folder / CONFIG_NAME).exists():
            # Runs have it in a folder; saved models at their top, where AutoTokenizer looks for it.
            part = self.folder
        if not part.is_dir():
            raise UserError(f"{self.folder}: has no {name}/, which its weights need; put it back")
        if name == TOKENIZER and not (part / TOKENIZER_CONFIG_FILE).is_file():
            # Without it some tokenizers open all the same, and know no special tokens.
            raise UserError(f"{self.folder}: holds no whole model ({TOKENIZER_CONFIG_FILE} is missing); put it back")
        check_readable(part, *part.glob("*"))
        # What is read of these is written where the model is saved next: no file of this machine belongs there.
        home = self.folder.resolve()
        # In the Hub's cache all files are links.
        home = home.parents[1] if home.parent.name == "snapshots" else home
        for path in (part, *part.rglob("*")):
            if path.is_symlink() and not path.resolve().is_relative_to(home):
                raise UserError(f"{path}: is a link that leads out of {self.folder}; put there what it leads to")
        try:
            yield part
        except UserError:
            raise
        except Exception as error:  # each library raises classes of its own
            raise UserError(
                f"{self.folder}: holds no whole model ({name}: {told(error)}); put back its {name}"
            ) from None
