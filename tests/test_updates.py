"""How the next memory comes about: gates against their transcription, the command line, and an update of one's own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL, Run, final
from omegaconf import OmegaConf
from reference import gated, read_causal_text, read_text
from test_recurrence import assert_same, gradients, probe
from test_transformer_xl import transcribe
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rmt_lightning.core.errors import UserError
from rmt_lightning.models.rmt import RMTDecoder, RMTEncoder
from rmt_lightning.models.segment_model import SegmentModel
from rmt_lightning.models.tiny import TinyBert, TinyGPT
from rmt_lightning.models.transformer_xl import TransformerXL
from rmt_lightning.models.update import Gated, Replace, Update

SIZE = {"width": 16, "layers": 2, "heads": 2}
MODELS: dict[str, Callable[..., Any]] = {
    "encoder": lambda tokenizer, **options: RMTEncoder(TinyBert(**SIZE).encoder(tokenizer), 20, 4, **options),
    "decoder": lambda tokenizer, **options: RMTDecoder(TinyGPT(**SIZE).decoder(tokenizer), 20, 4, **options),
    "transformer-xl": lambda tokenizer, **options: TransformerXL(
        tokenizer, 20, **SIZE, cache_length=6, memory_size=4, **options
    ),
}
every_model = pytest.mark.parametrize("kind", MODELS)


class Mean(Update):
    """An update of a user's own."""

    def __init__(self, width: int, share: float = 0.5) -> None:
        super().__init__()
        self.share = share
        self.shift = torch.nn.Parameter(torch.full((width,), 0.5))

    def forward(self, written: Tensor, memory: Tensor) -> Tensor:
        return self.share * memory + (1 - self.share) * written + self.shift


def make(kind: str, tokenizer: PreTrainedTokenizerBase, update: Any = Gated) -> Any:
    torch.manual_seed(0)
    model = MODELS[kind](tokenizer, update=update)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.double().eval()


def texts(batch: int, segments: int, length: int) -> Tensor:
    return torch.randint(5, 600, (batch, segments, length), generator=torch.Generator().manual_seed(1))


def transcribed(kind: str, model: Any, row: list[int]) -> tuple[Tensor, Tensor]:
    """Hidden states of the last segment, and the memory after it."""
    update, length = gated(model.update.gate.weight, model.update.gate.bias), model.text_length
    if kind == "encoder":
        specials = model.encoder.cls_token_id, model.encoder.sep_token_id
        hidden, memory = read_text(model.encoder.model, *specials, row, model.memory, length, update=update)
        return hidden[: 1 + model.memory_size], memory
    if kind == "decoder":
        model.decoder.model.set_attn_implementation("eager")
        return read_causal_text(model.decoder.model, row, model.memory, length, update=update)
    hidden, memory = transcribe(model, row, update=update)
    return hidden[-length:], memory


@every_model
def test_gates_equal_the_transcription(kind: str, tokenizer: PreTrainedTokenizerBase) -> None:
    model = make(kind, tokenizer)
    ids = texts(2, 3, model.text_length)
    hidden, state = model(ids)
    memory = model.memory_of(state)
    for row in range(2):
        expected, expected_memory = transcribed(kind, model, ids[row].flatten().tolist())
        torch.testing.assert_close(hidden[row], expected, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(memory[row], expected_memory, atol=1e-6, rtol=1e-6)
    own = gradients(model, probe(hidden[0, 0]) + probe(memory[0]))
    by_hand = transcribed(kind, model, ids[0].flatten().tolist())
    assert_same(own, gradients(model, probe(by_hand[0][0]) + probe(by_hand[1])))
    assert own["update.gate.weight"].abs().sum() > 0 and own["memory"].abs().sum() > 0


@every_model
def test_gates_are_all_that_is_new_and_begin_half_open(kind: str, tokenizer: PreTrainedTokenizerBase) -> None:
    torch.manual_seed(0)
    published = MODELS[kind](tokenizer)
    torch.manual_seed(0)
    model = MODELS[kind](tokenizer, update=Gated)
    new = model.state_dict().keys() - published.state_dict().keys()
    assert new == {"update.gate.weight", "update.gate.bias"} and type(published.update) is Replace
    # The rest has drawn the same random numbers, so gates can be compared with what was published.
    for name, value in published.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    written, memory = torch.randn(2, 50, 4, 16)
    kept = (model.update(written, memory) - written) / (memory - written)
    assert kept.mean().item() == pytest.approx(0.5, abs=0.02) and kept.std() < 0.25


def test_one_segment_gives_gates_a_gradient_of_zero(tokenizer: PreTrainedTokenizerBase) -> None:
    """Without one, several processes would average wrongly: no memory that was written is read."""
    model = make("encoder", tokenizer)
    model.encode(texts(2, 1, model.text_length)).sum().backward()
    assert model.update.gate.weight.grad is not None and not model.update.gate.weight.grad.any()


def test_rows_without_text_keep_their_memory(tokenizer: PreTrainedTokenizerBase) -> None:
    model = make("encoder", tokenizer, Mean)
    ids = texts(2, 3, 13).flatten(1)
    mask = torch.ones_like(ids)
    mask[0] = 0
    assert torch.equal(model(ids, mask)[1][0], model.memory)


@every_model
@pytest.mark.parametrize("update", [Gated, Mean, partial(Mean, share=0.25)])
def test_saved_and_opened(kind: str, update: Any, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model = make(kind, tokenizer, update).float()
    model.save_pretrained(tmp_path)
    noted = json.loads((tmp_path / "config.json").read_text())["arguments"]["update"]
    name = "rmt_lightning.Gated" if update is Gated else "test_updates.Mean"
    assert noted == {"class": name} | ({"share": 0.25} if isinstance(update, partial) else {})
    again = SegmentModel.from_pretrained(tmp_path)
    ids = texts(2, 3, model.text_length)
    with torch.no_grad():
        assert torch.equal(again.encode(ids), model.encode(ids))
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_text() == (tmp_path / "config.json").read_text()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("subprocess.Popen", "Popen and no Update"),
        ("rmt_lightning.LSTM", "LSTM and no Update"),
        ("unknown.Update", "import unknown before opening it"),
    ],
)
def test_nothing_but_an_update_is_made(
    name: str, message: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    make("encoder", tokenizer).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["arguments"]["update"] = {"class": name, "args": "touch executed"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        SegmentModel.from_pretrained(tmp_path)


@every_model
def test_no_memory_no_update(kind: str, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match=r"^model\.memory_size=0: leaves nothing to update"):
        if kind == "encoder":
            RMTEncoder(TinyBert(**SIZE).encoder(tokenizer), 20, 0, update=Gated)
        elif kind == "decoder":
            RMTDecoder(TinyGPT(**SIZE).decoder(tokenizer), 20, 0, update=Gated)
        else:
            TransformerXL(tokenizer, 20, **SIZE, update=Gated)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("model.update=gate",), "model.update=gate: no such choice; did you mean gated? allowed: gated, replace"),
        (
            ("model=lstm", "model.update=gated"),
            "model.update: no such setting; it comes with model=rmt_decoder",
        ),
        (("model=transformer_xl", "model.update=gated"), "model.update: no such setting; it comes with model=rmt_dec"),
        (
            ("model.update=gated", "model.memory_size=0"),
            "model.memory_size=0: leaves nothing to update; give 1 or more",
        ),
        (("model.update=gated", "+model.update.bias=1"), "model.update.bias: no such setting"),
    ],
)
def test_bad_input(settings: tuple[str, ...], message: str, train: Run) -> None:
    result = train(*settings)
    assert result.returncode == 2 and result.stderr.startswith(f"error: {message}"), result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.soak
def test_a_run_with_gates_is_resumed_and_exported(train: Run, command: Run, tmp_path: Path) -> None:
    assert train("model.update=gated", "hydra.run.dir=run").returncode == 0
    before = final(tmp_path / "run")["model.update.gate.weight"]
    for result in (
        train("resume=run", "curriculum.max_segments=4", small=False),
        command("rmt_lightning.export", "checkpoint=run", "folder=mary"),
    ):
        assert result.returncode == 0, result.stdout + result.stderr
    opened = RMTEncoder.from_pretrained(tmp_path / "mary")
    assert type(opened.update) is Gated and not torch.equal(opened.update.gate.weight, before)


@pytest.mark.soak
def test_an_update_of_ones_own_is_one_class_and_one_yaml(tmp_path: Path, environment: dict[str, str]) -> None:
    """Outside the package, in a sweep beside one of those that come with it."""
    folder = tmp_path / "mine" / "model.update"
    folder.mkdir(parents=True)
    (folder / "mean.yaml").write_text("_target_: test_updates.Mean\nshare: 0.25\n")
    settings = ("--multirun", "--config-dir=mine", *SMALL, "model.update=mean,gated", "model.memory_size=2")
    program = [sys.executable, "-m", "rmt_lightning.train", *settings, "hydra.sweep.dir=sweep"]
    environment["PYTHONPATH"] = f"{Path(__file__).parent}:{environment.get('PYTHONPATH', '')}"
    result = subprocess.run(program, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stdout + result.stderr
    saved = {path.parent.name: OmegaConf.load(path).model["update"] for path in tmp_path.glob("sweep/*/config.yaml")}
    found = {name: OmegaConf.to_container(update) for name, update in saved.items()}
    assert found == {
        "update_mean": {"_target_": "test_updates.Mean", "share": 0.25},
        "update_gated": {"_target_": "rmt_lightning.Gated"},
    }
