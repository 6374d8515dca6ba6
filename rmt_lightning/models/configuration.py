"""What config.json of a saved model says, as transformers reads it."""

from __future__ import annotations

from typing import Any

from transformers.configuration_utils import PreTrainedConfig

MODEL_TYPE = "rmt_lightning"


class RecurrentConfig(PreTrainedConfig):
    """The config of a saved model; `AutoConfig` opens it once `rmt_lightning` has been imported.

    Attributes:
        model: the class, by its public name, such as rmt_lightning.RMTEncoder.
        arguments: of its constructor, as plain values.
        id2label: the answers by their numbers, if the model has a head that chooses one.
    """

    model_type = MODEL_TYPE
    model: str = ""
    arguments: dict[str, Any] | None = None


def register() -> None:
    """Make it known to `AutoConfig`."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    CONFIG_MAPPING.register(MODEL_TYPE, RecurrentConfig, exist_ok=True)
