"""Models in and out of folders and the Hugging Face Hub. Nothing that is read is ever executed.

A folder holds config.json (the class and the arguments of its constructor), model.safetensors (the weights), the
tokenizer's files (of earlier versions in tokenizer/) and, if there is a Hugging Face model inside, backbone/ (its
config) and perhaps adapter/ (what PEFT has put into it).
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Self, cast

import torch
from huggingface_hub import ModelCard, ModelHubMixin, snapshot_download
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.tokenization_utils_base import (
    ADDED_TOKENS_FILE,
    FULL_TOKENIZER_FILE,
    SPECIAL_TOKENS_MAP_FILE,
    TOKENIZER_CONFIG_FILE,
)
from transformers.utils import CHAT_TEMPLATE_FILE

from rmt_lightning.core.errors import UserError
from rmt_lightning.core.files import check_readable, own_file, removed
from rmt_lightning.core.hub import out_of_reach
from rmt_lightning.core.names import public_name
from rmt_lightning.core.quoting import one_line
from rmt_lightning.core.run_folder import ADAPTER, BACKBONE, TOKENIZER, refuse_pipes
from rmt_lightning.models import adapters
from rmt_lightning.models.backbone import Transformer
from rmt_lightning.models.card import card
from rmt_lightning.models.configuration import MODEL_TYPE
from rmt_lightning.models.sources import Restored, parts_for
from rmt_lightning.models.update import Update

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
HEAD = "head.safetensors"
# The mixin writes it if there is none.
README = "README.md"
# Files that any tokenizer may have.
_FILES = (
    FULL_TOKENIZER_FILE, TOKENIZER_CONFIG_FILE, SPECIAL_TOKENS_MAP_FILE, ADDED_TOKENS_FILE, CHAT_TEMPLATE_FILE,
)  # fmt: skip


def _described(part: Any) -> dict[str, Any]:
    """A class that a model was given, or a partial of one, as plain values: its public name and its arguments."""
    kind, arguments = (part.func, part.keywords) if isinstance(part, partial) else (part, {})
    return {"class": public_name(f"{kind.__module__}.{kind.__qualname__}"), **arguments}


class SavedModel(ModelHubMixin, library_name="rmt_lightning"):
    """Gives a module `save_pretrained(folder)`, `push_to_hub(id)` and `from_pretrained(folder or id)`.

    The mixin of huggingface_hub notes the arguments that the module is built with.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        # The mixin asks each class anew how arguments that are no plain values are noted.
        super().__init_subclass__(coders=dict.fromkeys((type, partial), (_described, _described)), **options)

    # Of the backbone, or of the model itself.
    tokenizer: PreTrainedTokenizerBase | None = None

    @property
    def architecture(self) -> PreTrainedConfig | None:
        """The config of the Hugging Face model inside, if there is one: what its weights alone do not tell."""
        return None

    @property
    def arguments(self) -> dict[str, Any]:
        """Those of the constructor that are plain values, or described by some."""
        return cast(dict[str, Any], self._hub_mixin_config or {})

    @property
    def parts(self) -> dict[str, Any]:
        """What its weights alone do not tell, by the folder that `save_pretrained` of each is given."""
        adapter = next((found for backbone in self._backbones for found in adapters.adapters(backbone)), None)
        named = {TOKENIZER: self.tokenizer, BACKBONE: self.architecture, ADAPTER: adapter}
        return {name: part for name, part in named.items() if part is not None}

    @property
    def _backbones(self) -> list[nn.Module]:
        assert isinstance(self, nn.Module)
        return [part.model for part in self.modules() if isinstance(part, Transformer)]

    def generate_model_card(self, **told: Any) -> ModelCard:
        """The page of the model, README.md; `told` is what `card` takes: title, sections, license, language …

        `save_pretrained` and `push_to_hub` are given it as `model_card_kwargs`.
        """
        return card(cast(Any, self), (), **told)

    def _save_pretrained(self, save_directory: Path) -> None:
        assert isinstance(self, nn.Module)
        check_reopens(self)
        for name in (WEIGHTS, README):
            own_file(save_directory / name)
        name = public_name(f"{type(self).__module__}.{type(self).__qualname__}")
        kinds = (weight.dtype for weight in self.parameters() if weight.is_floating_point())
        dtype = str(next(kinds, torch.float32)).removeprefix("torch.")
        # What an earlier model has left there would be taken for a part of this one.
        for part in (TOKENIZER, BACKBONE, ADAPTER, HEAD, *_tokenizer_files(self.tokenizer)):
            removed(save_directory / part)
        write_config(
            save_directory, {"model_type": MODEL_TYPE, "dtype": dtype, "model": name, "arguments": self.arguments}
        )
        for name, part in self.parts.items():
            # That of the tokenizer is the folder itself, where AutoTokenizer looks for it.
            part.save_pretrained(save_directory / name if name != TOKENIZER else save_directory)
        for backbone in self._backbones:
            if list(adapters.adapters(backbone)):
                adapters.save_weights(backbone, save_directory / ADAPTER)
        save_model(self, str(save_directory / WEIGHTS))
        for weights in (save_directory / WEIGHTS, save_directory / ADAPTER / adapters.WEIGHTS):
            # safetensors leaves files that nobody else may read.
            if weights.exists():
                shutil.copymode(save_directory / CONFIG, weights)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> Self:
        """Open what `save_pretrained` or `push_to_hub` has left, ready for use (`eval` mode).

        Args:
            pretrained_model_name_or_path: a folder, or an id on the Hugging Face Hub.
            options: of `huggingface_hub.snapshot_download`: revision, token, cache_dir …

        Raises:
            UserError: if there is no such folder or id, or it holds another model than this class.
        """
        with opened(pretrained_model_name_or_path, **options) as folder:
            config = read_config(folder)
            named = _named(config.pop("model"), cls, folder)
            # Earlier versions wrote nothing else.
            settings = config["arguments"] if "model_type" in config else config
            for name, value in settings.items():
                if isinstance(value, dict) and "class" in value:
                    part = _named(value.pop("class"), Update, folder)
                    settings[name] = partial(part, **value) if value else part
            saved = Restored(folder)
            tokenizer = saved.tokenizer([])
            model = named(**parts_for(named, saved, tokenizer), **settings)
            load_model(model, folder / WEIGHTS)
            model.eval()
            return model


def read_config(folder: Path) -> dict[str, Any]:
    """What the config.json of a saved model says."""
    config: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    return config


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """Make that the config.json of a saved model."""
    (folder / CONFIG).write_text(json.dumps(config, indent=2))


def _tokenizer_files(tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
    """The names of the files that a tokenizer may consist of."""
    return [*_FILES, *getattr(tokenizer, "vocab_files_names", {}).values()]


def check_reopens(model: nn.Module) -> None:
    """Raise a UserError if a backbone inside could not be built again from its config, or weights cannot be written."""
    for part in model.modules():
        if isinstance(part, Transformer):
            part.check_told_by_config()
    # safetensors writes tensors alone, and no parts of those that are not written themselves.
    weights = model.state_dict()
    if strange := [name for name, value in weights.items() if not isinstance(value, Tensor)]:
        raise UserError(f"model: its {strange[0]} is no tensor, and cannot be saved; make it a buffer, or leave it out")
    written = {value.data_ptr() for value in weights.values() if value.untyped_storage().nbytes() == value.nbytes}
    for name, value in weights.items():
        if value.untyped_storage().data_ptr() not in written:
            raise UserError(f"model: its {name} is a part of a larger tensor, and cannot be saved; make it a clone()")


def _named(path: str, kind: type, folder: Path) -> Any:
    """The class that a config names: one of this package, or one that the program has imported itself."""
    module, _, name = public_name(path).rpartition(".")
    named = getattr(sys.modules.get(module), name, None)
    if named is None:
        raise UserError(f"{folder}: holds a model of class {path}; import {module} before opening it")
    if not (isinstance(named, type) and issubclass(named, kind)):
        raise UserError(f"{folder}: holds a {name} and no {kind.__name__}; open it with {name}.from_pretrained")
    return named


@contextmanager
def opened(name_or_path: str | Path, **options: Any) -> Iterator[Path]:
    """The folder of that name, or a copy of what the Hugging Face Hub has under it.

    Raises:
        UserError: if there is neither, or what is in it cannot be read.
    """
    folder = Path(name_or_path)
    if not os.path.isdir(folder):
        folder = _download(str(name_or_path), **options)
    refuse_pipes(folder)
    check_readable(folder, folder / CONFIG, *folder.glob("*.safetensors"))
    if (folder / adapters.CONFIG).exists():
        raise has_adapters(folder)
    try:
        yield folder
    except UserError:
        raise
    except Exception as error:  # each library raises classes of its own
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{folder}: holds no whole model ({type(error).__name__}: {reason}); give what save_pretrained or "
            "python -m rmt_lightning.export has left"
        ) from None


def has_adapters(place: str | Path) -> UserError:
    """What is said about a folder, or an id on the Hub, with adapters at its top."""
    return UserError(
        f"{place}: holds adapters of PEFT at its top ({adapters.CONFIG}), which are not opened with it; put them in a "
        "folder of their own, and open that with PeftModel.from_pretrained"
    )


def _download(name: str, **options: Any) -> Path:
    local = {"local_files_only": True} if "endpoint" not in options and out_of_reach(name) else {}
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.txt", "*.safetensors"], **options | local))
    except Exception as error:  # the Hub's client raises a different class for each way of being out of reach
        raise UserError(
            f"{one_line(name)}: no such folder, and cannot be loaded from the Hugging Face Hub "
            f"({type(error).__name__}); give a folder, or the id of a model while the network is there"
        ) from None
