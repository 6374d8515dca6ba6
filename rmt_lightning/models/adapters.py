"""What of a backbone is trained: all of it, nothing, or small matrices beside its layers, which PEFT puts there.

Memory, and all else that a model has beside its backbone, is always trained.
"""

from __future__ import annotations

import copy
import logging
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from annotated_types import Ge, Gt, Lt
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rmt_lightning.core.errors import UserError
from rmt_lightning.core.run_folder import ADAPTER

if TYPE_CHECKING:
    from peft import PeftConfig

log = logging.getLogger(__name__)

# GPT-2 has linear layers of a kind of its own.
_LINEAR = (nn.Linear, Conv1D)
# As PEFT calls its files.
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What a config tells of how adapters act; which layers have some is told by the weights.
_ACTS = ("r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "bias")


class Finetuning(ABC):
    """What of a backbone is trained."""

    @abstractmethod
    def __call__(self, backbone: nn.Module) -> None:
        """Choose its weights that are trained, and add some if need be.

        Args:
            backbone: a Hugging Face model.
        """


class Frozen(Finetuning):
    """Nothing of it."""

    def __call__(self, backbone: nn.Module) -> None:
        backbone.requires_grad_(False)


class LoRA(Finetuning):
    """A product of two thin matrices beside some linear layers: W + (alpha / r) B A (Hu et al. 2021, arXiv 2106.09685).

    B is zero at first, so that training begins with the backbone as it is.

    Args:
        r: the rank of B A.
        alpha: how much of it is added.
        dropout: of what A is given.
        targets: names of the layers, or "all-linear" but for what words are read off with; None: those that PEFT knows
            for the family, in most of them what makes queries and values.

    Raises:
        UserError: when called, if PEFT is missing or knows no such layers.
    """

    def __init__(
        self,
        r: Annotated[int, Ge(1)] = 8,
        alpha: Annotated[float, Gt(0)] = 16.0,
        dropout: Annotated[float, Ge(0), Lt(1)] = 0.0,
        targets: str | list[str] | None = None,
    ) -> None:
        self.r = r
        self.alpha = alpha
        self.dropout = dropout
        self.targets = targets

    def __call__(self, backbone: nn.Module) -> None:
        assert isinstance(backbone, PreTrainedModel)
        if there := list(adapters(backbone)):
            # Those of a run that is gone on with.
            self._check_same(there)
            return
        head = backbone.get_output_embeddings()
        linear = (name for name, part in backbone.named_modules() if isinstance(part, _LINEAR) and part is not head)
        own = {name.rpartition(".")[2] for name in linear}
        targets = [self.targets] if isinstance(self.targets, str) and self.targets != "all-linear" else self.targets
        if isinstance(targets, list) and (absent := [name for name in targets if name not in own]):
            raise UserError(f"lora.targets={absent[0]}: is no linear layer of the backbone; {_choose(own)}")
        name = getattr(backbone, "name_or_path", None) or None
        config = self._config(target_modules=targets, base_model_name_or_path=name)
        try:
            add(backbone, config)
        except ValueError:
            raise UserError(f"lora.targets: PEFT knows none for this backbone; {_choose(own)}") from None

    def _config(self, **options: Any) -> PeftConfig:
        config: PeftConfig = _peft("finetune=lora").LoraConfig(
            r=self.r, lora_alpha=self.alpha, lora_dropout=self.dropout, **options
        )
        return config

    def _check_same(self, there: list[PeftConfig]) -> None:
        """Raise a UserError unless adapters are those that these settings make, whichever their layers are."""
        own = self._config()
        for found, name in product(there, _ACTS):
            if (value := getattr(found, name, None)) != getattr(own, name):
                raise UserError(
                    f"finetune=lora: the backbone has other adapters already ({name}={value}); leave it out, or put "
                    f"back the run's {ADAPTER}/"
                )


def add(backbone: nn.Module, config: PeftConfig) -> None:
    """Put adapters beside layers of a backbone; from then on only they are trained.

    Raises:
        ValueError: if PEFT finds no layers for them, or they need more than layers.
    """
    peft = _peft("backbone: has adapters, and")
    with warnings.catch_warnings(action="ignore"):
        peft.inject_adapter_in_model(copy.deepcopy(config), backbone)


def adapters(backbone: nn.Module) -> Iterator[PeftConfig]:
    """What PEFT has put into a model."""
    yield from (getattr(backbone, "peft_config", None) or {}).values()


def check_kind(backbone: nn.Module) -> None:
    """Raise a UserError if adapters need to see words, for a backbone is given embeddings."""
    if any(getattr(config, "alora_invocation_tokens", None) for config in adapters(backbone)):
        raise UserError(
            "backbone: its adapters wait for certain words (alora_invocation_tokens), and it is given embeddings "
            "alone; give others, such as plain LoRA"
        )


def check_on(backbone: nn.Module, again: nn.Module) -> None:
    """Raise a UserError if adapters are not in use as they will be in the backbone that is opened again."""
    told = dict(_layers(again))
    for name, layer in _layers(backbone):
        if layer.merged:
            what, remedy = "merged, and would count twice", "unmerge_adapter or merge_and_unload"
        elif layer.disable_adapters:
            what, remedy = "switched off, and would be on", "enable_adapter_layers, or unload"
        elif getattr(layer, "scaling", None) != getattr(told[name], "scaling", None):
            what, remedy = "scaled, and would not be", "unscale_layer or merge_and_unload"
        else:
            continue
        raise UserError(f"backbone: its adapters are {what} when it is opened again; call PEFT's {remedy}")


def _layers(backbone: nn.Module) -> list[tuple[str, Any]]:
    """The layers that have adapters, if there are any, and their names."""
    if not list(adapters(backbone)):
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [(name, part) for name, part in backbone.named_modules() if isinstance(part, BaseTunerLayer)]


def saved(folder: Path) -> PeftConfig:
    """What `save_pretrained` of one of them has left.

    Raises:
        UserError: if it names code that would be imported, as PEFT before 0.20 does, or what stands elsewhere.
    """
    peft = _peft(f"{folder.parent}: has adapters, and")
    with warnings.catch_warnings(action="ignore"):
        config: PeftConfig = peft.PeftConfig.from_pretrained(str(folder))
        given = config.from_json_file(str(folder / CONFIG))
    if getattr(config, "megatron_config", None):
        raise UserError(f"{folder}: names code (megatron_core={given.get('megatron_core')}), which is not imported")
    if elsewhere := getattr(config, "adapters", None):
        raise UserError(f"{folder}: names other adapters (adapters={elsewhere!s:.80}), which are not opened with it")
    if unknown := ", ".join(sorted(name for name, value in given.items() if value and not hasattr(config, name))):
        log.warning("%s: PEFT %s does not know its %s, and leaves that out", folder, peft.__version__, unknown)
    config.inference_mode = False
    return config


def save_weights(backbone: nn.Module, folder: Path) -> None:
    """Write those of adapters beside their config, so that `PeftModel.from_pretrained(backbone, folder)` opens them."""
    # Embeddings stand in the model's own weights. To see whether they have changed, PEFT would ask for the base.
    weights = _peft("backbone: has adapters, and").get_peft_model_state_dict(backbone, save_embedding_layers=False)
    # Of those that are shared each is written.
    whole = {name: value.clone(memory_format=torch.contiguous_format) for name, value in weights.items()}
    save_file({f"base_model.model.{name}": value for name, value in whole.items()}, folder / WEIGHTS)


def merge_all(model: nn.Module) -> None:
    """Add the adapters in a model to the weights that they stand beside, and take them out.

    Raises:
        UserError: if other layers share these weights, or the adapters are of a kind that cannot be merged.
    """
    for backbone in model.modules():
        if not list(adapters(backbone)):
            continue
        shared = Counter(id(weight) for _, weight in backbone.named_parameters(remove_duplicate=False))
        for name, layer in _layers(backbone):
            if shared[id(layer.get_base_layer().weight)] > 1:
                raise UserError(f"merge=true: other layers share the weights of {name}; give merge=false")
        try:
            _merge(backbone)
        except Exception as error:  # kinds fail in ways of their own
            reason = " ".join(f"{type(error).__name__} {error}".split())
            raise UserError(f"merge=true: PEFT cannot merge its adapters ({reason:.200}); give merge=false") from None
        del backbone.peft_config


def _merge(backbone: nn.Module) -> None:
    from peft.utils.other import AuxiliaryTrainingWrapper

    # Layers that are trained as a whole, or of which some rows are; what is inside goes with them.
    for name, part in list(backbone.named_modules()):
        if isinstance(part, AuxiliaryTrainingWrapper):
            backbone.set_submodule(name, part.unload_and_optionally_merge_module(True, False, None))
    for name, layer in _layers(backbone):
        layer.merge()
        backbone.set_submodule(name, layer.get_base_layer())


def _choose(names: Iterable[str]) -> str:
    return f"give all-linear by itself, or a list of some of {', '.join(sorted(names))}"


def _peft(why: str) -> Any:
    try:
        import peft
    except ImportError:
        raise UserError(f"{why} needs PEFT; pip install 'rmt-lightning[peft]'") from None
    return peft
