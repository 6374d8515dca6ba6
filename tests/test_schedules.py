"""Orders of layers and segments: all lead to what the vertical one leads to, with random weights everywhere."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_decoder import CONFIGS, WINDOWED
from test_layer_memory import SINGLE, Make, make, random_weights
from test_recurrence import gradients, probe, texts
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerBase

from rmt_lightning import ARMT, TransformerXL
from rmt_lightning.core.errors import UserError
from rmt_lightning.models import state as tree
from rmt_lightning.models.decoder import Decoder
from rmt_lightning.models.recurrence import Segment
from rmt_lightning.models.rmt import RMTDecoder, RMTEncoder

__all__ = ["make"]
OTHERS = ("horizontal", "diagonal")


def results(model: Any, ids: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
    """Hidden states and states after each segment, and all gradients of them."""
    readings = list(model.read(ids, mask))
    found = {}
    for number, reading in enumerate(readings):
        found[f"hidden {number}"] = reading.hidden if mask is None else model.readout(reading.hidden, reading.segment)
        found |= {f"state {number} {place}": leaf for place, leaf in enumerate(tree.leaves(reading.state))}
    loss = sum(probe(part.double()) for part in found.values() if part.requires_grad)
    return {name: part.detach() for name, part in found.items()} | gradients(model, loss)


def assert_alike(found: dict[str, Tensor], expected: dict[str, Tensor], precision: float) -> None:
    assert found.keys() == expected.keys()
    largest = max(1, *(float(value.abs().max()) for value in expected.values() if value.numel()))
    for name, value in expected.items():
        assert not ((found[name] - value).abs() > precision * largest).any(), name


@pytest.fixture
def any_model(make: Make, tokenizer: PreTrainedTokenizerBase) -> Make:
    def any_model(kind: str, variant: str, **options: Any) -> Any:
        if variant != "transformer-xl":
            return make(kind, variant, layers=3, **options)
        torch.manual_seed(0)
        model = TransformerXL(tokenizer, 6, width=16, layers=3, heads=2, cache_length=4, **options)
        random_weights(model)
        return model.double().eval()

    return any_model


ragged = torch.arange(27) < torch.tensor([[27], [14], [5]])


@pytest.mark.parametrize(
    ("kind", "variant"),
    [("bert", "armt"), ("gpt2", "no normalizer"), ("llama", "armt"), ("opt", "prmt"), ("", "transformer-xl")],
)
def test_schedules_agree(any_model: Make, kind: str, variant: str) -> None:
    """Fewer segments than layers, as many, and more, ragged; with truncation, and with checkpointing."""
    plain, *others = (any_model(kind, variant, schedule=schedule) for schedule in ("vertical", *OTHERS))
    precision, five = 1e-5 if kind in SINGLE else 1e-10, texts(2, 5, 6)

    def compare(*given: Any) -> None:
        expected = results(plain, *given)
        for other in others:
            assert_alike(results(other, *given), expected, precision)

    compare(five[:, :2])
    compare(five[:, :3])
    compare(texts(3, 1, 27)[:, 0], ragged.long())
    for model in (plain, *others):
        model.gradient_checkpointing = model is not plain
        # Through its cache Transformer-XL has no gradient anyway.
        model.bptt_depth = -1 if variant == "transformer-xl" else 2
    compare(five)
    with torch.no_grad():
        expected = {"read": plain.encode(five)}
        for other in others:
            assert_alike({"read": other.encode(five)}, expected, precision)
    # With weights of 0.3 single precision is not enough for gradients, whatever the order.
    if kind in SINGLE:
        return
    random_weights(plain.float(), 0.1)
    for other in others:
        other.float().load_state_dict(plain.state_dict())
    precision = 1e-5
    compare(five)


def test_diagonal_reads_ahead_in_a_stream(any_model: Make) -> None:
    """As far as there are layers, whether or not some segments are shorter, or padded."""
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]])
    five = [Segment(ids) for ids in texts(2, 5, 6).unbind(dim=1)]
    segments = [Segment(texts(2, 1, 4)[:, 0]), *five, five[1]._replace(attention_mask=mask), five[0]]
    plain, diagonal = (any_model("gpt2", "armt", schedule=schedule) for schedule in ("vertical", "diagonal"))
    read: list[int] = []

    def found(model: Any) -> list[Any]:
        read.clear()
        stream = (read.append(number) or segment for number, segment in enumerate(segments))
        return [(len(read), *tree.leaves([reading.hidden, reading.state])) for reading in model.read(stream)]

    for grad, ahead in ((False, 2), (True, 0)):
        with torch.set_grad_enabled(grad):
            expected, made = found(plain), found(diagonal)
        assert max(here - number for number, (here, *_) in enumerate(made, start=1)) == ahead
        for one, other in zip(made, expected, strict=True):
            for left, right in zip(one[1:], other[1:], strict=True):
                torch.testing.assert_close(left, right)


@pytest.mark.parametrize("schedule", OTHERS)
def test_maps_of_attention_are_those_of_segments(any_model: Make, schedule: str) -> None:
    found = []
    for order in ("vertical", schedule):
        model = any_model("", "transformer-xl", schedule=order)
        with torch.no_grad(), model.recorded() as weights:
            model.encode(texts(2, 4, 6))
        assert model.schedule == order and len(weights) == 4
        found.append(torch.stack(weights))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("schedule", OTHERS)
def test_memory_of_the_last_layer_has_one_order(make: Make, schedule: str, tokenizer: PreTrainedTokenizerBase) -> None:
    told = rf"^model\.schedule={schedule}: is for memory that each layer keeps for itself, .* last layer .* vertical"
    with pytest.raises(UserError, match=told):
        make("gpt2", "retrieval", schedule=schedule)
    with pytest.raises(UserError, match=told):
        TransformerXL(tokenizer, 8, width=16, layers=2, heads=2, memory_size=1, schedule=schedule)
    with pytest.raises(UserError, match=told):
        RMTDecoder(make("gpt2").backbone, 12, 2, schedule=schedule)
    with pytest.raises(UserError, match=told):
        RMTEncoder(make("bert").backbone, 12, 2, schedule=schedule)


def alternating() -> PreTrainedConfig:
    """Its layers see windows of text and all of it in turns."""
    config = copy.deepcopy(WINDOWED["gemma3_text"])
    config.layer_types = ["sliding_attention", "full_attention"]
    return config


def scaled_by_layer() -> PreTrainedConfig:
    config = copy.deepcopy(CONFIGS["gpt2"])
    config.scale_attn_by_inverse_layer_idx = True
    return config


@pytest.mark.parametrize("config", [alternating, scaled_by_layer])
def test_unlike_layers_are_not_run_at_once(config: Callable[[], Any], tokenizer: PreTrainedTokenizerBase) -> None:
    torch.manual_seed(0)
    backbone = Decoder(AutoModelForCausalLM.from_config(config()), tokenizer)
    told = r"^model\.schedule=diagonal: the layers of \w+ differ in more than .*; choose horizontal or vertical$"
    with pytest.raises(UserError, match=told):
        ARMT(backbone, 12, 2, schedule="diagonal")
    model, ids = ARMT(backbone, 12, 2, schedule="horizontal").eval(), texts(2, 3, 10)
    found = model.encode(ids)
    model.choose("vertical")
    torch.testing.assert_close(found, model.encode(ids))
