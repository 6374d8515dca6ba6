"""Recurrent Memory Transformers on PyTorch Lightning."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rmt_lightning.errors import UserError
    from rmt_lightning.models.answerer import Answerer
    from rmt_lightning.models.backbone import (
        Decoder,
        Encoder,
        Pretrained,
        TinyBert,
        TinyBigBird,
        TinyGPT,
        TinyLongformer,
        TinyRoFormer,
    )
    from rmt_lightning.models.full_attention import FullAttention
    from rmt_lightning.models.generation import generate
    from rmt_lightning.models.lstm import LSTM
    from rmt_lightning.models.memory_network import MemoryNetwork
    from rmt_lightning.models.ntm import NeuralTuringMachine
    from rmt_lightning.models.recurrence import Segment, unroll
    from rmt_lightning.models.rmt import RMTDecoder, RMTEncoder
    from rmt_lightning.models.segment_model import SegmentModel
    from rmt_lightning.models.transformer_xl import TransformerXL
    from rmt_lightning.tasks.datamodule import FactDataModule
    from rmt_lightning.tasks.language import DocumentDataModule, RunningText
    from rmt_lightning.tasks.placement import Placement
    from rmt_lightning.training.classification import FactClassifier
    from rmt_lightning.training.curriculum import SegmentCurriculum
    from rmt_lightning.training.language_modeling import LanguageModeler

# Where each public name lives. They are imported when first used: --help should not have to wait for torch.
_HOMES = {
    "Answerer": "models.answerer",
    "Decoder": "models.backbone",
    "DocumentDataModule": "tasks.language",
    "Encoder": "models.backbone",
    "FactClassifier": "training.classification",
    "FactDataModule": "tasks.datamodule",
    "FullAttention": "models.full_attention",
    "LSTM": "models.lstm",
    "MemoryNetwork": "models.memory_network",
    "NeuralTuringMachine": "models.ntm",
    "LanguageModeler": "training.language_modeling",
    "Placement": "tasks.placement",
    "Pretrained": "models.backbone",
    "RMTDecoder": "models.rmt",
    "RMTEncoder": "models.rmt",
    "RunningText": "tasks.language",
    "Segment": "models.recurrence",
    "SegmentCurriculum": "training.curriculum",
    "SegmentModel": "models.segment_model",
    "TinyBert": "models.backbone",
    "TinyGPT": "models.backbone",
    "TinyBigBird": "models.backbone",
    "TinyLongformer": "models.backbone",
    "TinyRoFormer": "models.backbone",
    "TransformerXL": "models.transformer_xl",
    "UserError": "errors",
    "generate": "models.generation",
    "unroll": "models.recurrence",
}

__version__ = "0.1.0"
__all__ = [
    "LSTM",
    "Answerer",
    "Decoder",
    "DocumentDataModule",
    "Encoder",
    "FactClassifier",
    "FactDataModule",
    "FullAttention",
    "LanguageModeler",
    "MemoryNetwork",
    "NeuralTuringMachine",
    "Placement",
    "Pretrained",
    "RMTDecoder",
    "RMTEncoder",
    "RunningText",
    "Segment",
    "SegmentCurriculum",
    "SegmentModel",
    "TinyBert",
    "TinyBigBird",
    "TinyGPT",
    "TinyLongformer",
    "TinyRoFormer",
    "TransformerXL",
    "UserError",
    "generate",
    "unroll",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
