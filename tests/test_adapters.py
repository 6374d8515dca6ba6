"""What of a backbone is trained: all of it, nothing, or adapters; saved, opened again, and refused."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run, assert_identical, final
from torch import nn
from transformers import PreTrainedTokenizerBase

from rmt_lightning.core.errors import UserError
from rmt_lightning.models.adapters import Frozen, LoRA, adapters, merge_all
from rmt_lightning.models.answerer import Answerer
from rmt_lightning.models.armt import ARMT
from rmt_lightning.models.decoder import Decoder
from rmt_lightning.models.encoder import Encoder
from rmt_lightning.models.generation import generate
from rmt_lightning.models.rmt import RMTDecoder, RMTEncoder
from rmt_lightning.models.segment_model import SegmentModel
from rmt_lightning.models.tiny import TinyBert, TinyGPT

peft = pytest.importorskip("peft")

SIZE = {"width": 16, "layers": 2, "heads": 2, "max_positions": 64}


def make(kind: type[SegmentModel[Any]], tokenizer: PreTrainedTokenizerBase, **options: Any) -> SegmentModel[Any]:
    if kind is RMTEncoder:
        return RMTEncoder(TinyBert(**SIZE).encoder(tokenizer), 24, memory_size=3)
    if kind is ARMT:
        return ARMT(TinyGPT(**SIZE).decoder(tokenizer), 24, memory_size=3, **options)
    return RMTDecoder(TinyGPT(**SIZE).decoder(tokenizer), 24, memory_size=3)


def backbone(model: SegmentModel[Any]) -> nn.Module:
    return model.backbone.model


def randomize(model: nn.Module) -> None:
    """A matrix of zeros would hide that it is left out."""
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.3)


def read(model: SegmentModel[Any]) -> torch.Tensor:
    torch.manual_seed(1)
    return model.eval()(torch.randint(5, 600, (2, 3 * model.text_length)))[0]


@pytest.mark.parametrize("kind", [RMTEncoder, RMTDecoder, ARMT])
def test_adapters_begin_as_nothing_and_alone_are_trained(
    kind: type[SegmentModel[Any]], tokenizer: PreTrainedTokenizerBase
) -> None:
    model = make(kind, tokenizer)
    plain, before = read(model), {name for name, _ in model.named_parameters()}
    LoRA(r=4)(backbone(model))
    torch.testing.assert_close(read(model), plain, rtol=0, atol=0)
    # Those of a run that is gone on with are there already.
    LoRA(r=4)(backbone(model))
    with pytest.raises(UserError, match=r"^finetune=lora: the backbone has other adapters already \(r=4\); leave"):
        LoRA(r=5)(backbone(model))
    randomize(model)
    read(model).square().sum().backward()
    own = {id(weight) for weight in backbone(model).parameters()}
    inside = {name for name, weight in model.named_parameters() if id(weight) in own}
    for name, weight in model.named_parameters():
        assert weight.requires_grad == (name not in inside or "lora_" in name), name
        assert (weight.grad is not None) == weight.requires_grad, name
    assert len(before) < len(dict(model.named_parameters()))


@pytest.mark.parametrize("kind", [RMTEncoder, RMTDecoder, ARMT])
def test_adapters_are_opened_again_or_merged(
    kind: type[SegmentModel[Any]], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model = make(kind, tokenizer)
    LoRA(r=4, alpha=3.5, targets="all-linear")(backbone(model))
    randomize(model)
    expected = read(model)
    model.save_pretrained(tmp_path / "apart")
    again = kind.from_pretrained(tmp_path / "apart")
    torch.testing.assert_close(read(again), expected, rtol=0, atol=0)
    assert [found.lora_alpha for found in adapters(backbone(again))] == [3.5]
    # PEFT opens what stands in adapter/.
    fresh = make(kind, tokenizer)
    own = backbone(fresh)
    plain = {name.replace(".base_layer", ""): value for name, value in backbone(model).state_dict().items()}
    own.load_state_dict({name: value for name, value in plain.items() if "lora_" not in name})
    theirs = peft.PeftModel.from_pretrained(own, str(tmp_path / "apart/adapter"))
    assert_identical(theirs.get_base_model().state_dict(), backbone(model).state_dict())
    merge_all(model)
    assert not list(adapters(backbone(model))) and not any("lora" in name for name in model.state_dict())
    torch.testing.assert_close(read(model), expected, rtol=1e-5, atol=1e-5)
    # Where another model stands, nothing of it is left.
    shutil.copytree(tmp_path / "apart", tmp_path / "merged")
    (tmp_path / "merged/head.safetensors").touch()
    model.save_pretrained(tmp_path / "merged")
    assert not (tmp_path / "merged/head.safetensors").exists()
    assert not (tmp_path / "merged/adapter").exists()
    torch.testing.assert_close(read(kind.from_pretrained(tmp_path / "merged")), read(model), rtol=0, atol=0)


@pytest.mark.parametrize("kind", [Encoder, Decoder])
def test_what_peft_hands_over_is_saved_and_opened(
    kind: type[Encoder] | type[Decoder], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    inside = (TinyBert(**SIZE).encoder if kind is Encoder else TinyGPT(**SIZE).decoder)(tokenizer).model
    wrapped = peft.get_peft_model(inside, peft.LoraConfig(r=2, lora_dropout=0.1))
    model = (RMTEncoder if kind is Encoder else RMTDecoder)(kind(wrapped, tokenizer), 24, memory_size=2)
    randomize(model)
    expected = read(model)
    model.save_pretrained(tmp_path / "model")
    torch.testing.assert_close(read(type(model).from_pretrained(tmp_path / "model")), expected, rtol=0, atol=0)
    # A second set of adapters would be lost.
    wrapped.add_adapter("other", peft.LoraConfig(r=2))
    with pytest.raises(UserError, match=r"^backbone: \d+ of its weights, such as .* are not as its config tells"):
        model.save_pretrained(tmp_path / "second")
    assert not (tmp_path / "second/config.json").exists()


@pytest.mark.fault("adapters that are not in use, or could not be put in again", "saving them is refused in one line")
@pytest.mark.parametrize(
    ("config", "change", "told"),
    [
        (
            {},
            "disable_adapter_layers",
            "its adapters are switched off, and would be on when it is",
        ),
        (
            {},
            "merge_adapter",
            "its adapters are merged, and would count twice when it is",
        ),
        (
            {"peft_type": "VERA", "r": 2},
            "",
            "its adapters could not be put in again (`inject_adapter_in_model`",
        ),
        (
            {"peft_type": "SHIRA", "r": 2},
            "",
            "its adapters could not be put in again (NotImplementedError: ",
        ),
        (
            {},
            "scale_layer",
            "its adapters are scaled, and would not be when it is",
        ),
        (
            {"peft_type": "LORA", "alora_invocation_tokens": [7]},
            "",
            "its adapters wait for certain words (alora_invocation_tokens), and",
        ),
    ],
)
def test_what_would_be_opened_otherwise_is_refused(
    config: dict[str, Any], change: str, told: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    made = peft.PeftConfig.from_peft_type(**{"peft_type": "LORA"} | config, target_modules=["query"])
    wrapped = peft.get_peft_model(TinyBert(**SIZE).encoder(tokenizer).model, made)

    def save() -> None:
        model = RMTEncoder(Encoder(wrapped, tokenizer), 24, memory_size=2)
        if change == "scale_layer":
            backbone(model).encoder.layer[1].attention.self.query.scale_layer(0.5)
        elif change:
            getattr(wrapped.base_model, change)()
        model.save_pretrained(tmp_path / "model")

    with pytest.raises(UserError, match=f"^backbone: {re.escape(told)}"):
        save()
    assert not (tmp_path / "model/config.json").exists()


def test_adapters_of_embeddings(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["word_embeddings", "query"])
    wrapped = peft.get_peft_model(TinyBert(**SIZE).encoder(tokenizer).model, config)
    model = RMTEncoder(Encoder(wrapped, tokenizer), 24, memory_size=2)
    expected = read(model)
    model.save_pretrained(tmp_path / "model")
    torch.testing.assert_close(read(RMTEncoder.from_pretrained(tmp_path / "model")), expected, rtol=0, atol=0)


@pytest.mark.fault("adapters share weights with other layers", "all are saved; merging them is refused in one line")
@pytest.mark.parametrize(
    ("config", "shares"),
    [
        ({"peft_type": "LORA", "target_modules": ["c_attn"], "trainable_token_indices": [7, 8]}, True),
        ({"peft_type": "LORA", "target_modules": ["wte", "c_attn"]}, True),
        ({"peft_type": "TRAINABLE_TOKENS", "target_modules": ["wte"], "token_indices": [7]}, True),
        ({"peft_type": "RANDLORA", "target_modules": ["c_attn"]}, False),
    ],
)
def test_what_is_shared(
    config: dict[str, Any], shares: bool, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    made = peft.PeftConfig.from_peft_type(**config)
    wrapped = peft.get_peft_model(TinyGPT(**SIZE).decoder(tokenizer).model, made)
    model = RMTDecoder(Decoder(wrapped, tokenizer), 24, memory_size=2)
    for _, weight in wrapped.named_parameters():
        if weight.requires_grad:
            nn.init.normal_(weight, std=0.3)
    expected = read(model)
    model.save_pretrained(tmp_path / "model")
    torch.testing.assert_close(read(RMTDecoder.from_pretrained(tmp_path / "model")), expected, rtol=0, atol=0)
    if shares:
        with pytest.raises(UserError, match=r"^merge=true: other layers share the weights of .*; give merge=false$"):
            merge_all(model)
    else:
        merge_all(model)
    torch.testing.assert_close(read(model), expected, rtol=1e-3, atol=1e-3)


def test_nobody_is_asked_for_the_base(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: Any
) -> None:
    """What the adapters are made for may be gone, or anything if they came from elsewhere."""
    asked: list[str] = []
    monkeypatch.setattr("peft.utils.save_and_load.check_file_exists_on_hf_hub", lambda name, _: asked.append(name))
    model = make(RMTEncoder, tokenizer)
    backbone(model).name_or_path = "somebody/gone"
    LoRA(r=2)(backbone(model))
    model.save_pretrained(tmp_path)
    assert not asked and not [warning for warning in recwarn if "gone" in str(warning.message)]
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["base_model_name_or_path"]


@pytest.mark.parametrize(
    "config",
    [
        {"modules_to_save": ["LayerNorm"]},
        {"trainable_token_indices": [7, 8]},
        {"peft_type": "LILY"},
    ],
)
def test_what_is_trained_beside_matrices_is_merged_or_refused(
    config: dict[str, Any], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    made = peft.PeftConfig.from_peft_type(**{"peft_type": "LORA"} | config, target_modules=["query"], r=2)
    wrapped = peft.get_peft_model(TinyBert(**SIZE).encoder(tokenizer).model, made)
    model = RMTEncoder(Encoder(wrapped, tokenizer), 24, memory_size=2)
    for _, weight in wrapped.named_parameters():
        if weight.requires_grad:
            nn.init.normal_(weight, std=0.3)
    expected = read(model)
    if "peft_type" in config:
        with pytest.raises(UserError, match=r"^merge=true: PEFT cannot merge its adapters \(NotImplementedError This"):
            merge_all(model)
        return
    merge_all(model)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(read(RMTEncoder.from_pretrained(tmp_path)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.fault("adapter/ names code, or what this PEFT does not know", "refused unimported, or said in one line")
def test_adapters_from_elsewhere(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, caplog: pytest.LogCaptureFixture, recwarn: Any
) -> None:
    model = make(RMTEncoder, tokenizer)
    LoRA(r=2)(backbone(model))
    model.save_pretrained(tmp_path)
    place = tmp_path / "adapter/adapter_config.json"
    plain = json.loads(place.read_text())
    place.write_text(json.dumps(plain | {"runtime_config": {}, "of_tomorrow": 3, "also_of_tomorrow": None}))
    RMTEncoder.from_pretrained(tmp_path)
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}/adapter: PEFT {peft.__version__} does not know its of_tomorrow, and leaves that out"
    ]
    assert not [warning for warning in recwarn if "PEFT" in str(warning.message) or "config" in str(warning.message)]
    place.write_text(json.dumps(plain | {"megatron_config": {"a": 1}, "megatron_core": "antigravity"}))
    with pytest.raises(UserError, match=r"/adapter: names code \(megatron_core=antigravity\), which is not imported$"):
        RMTEncoder.from_pretrained(tmp_path)
    assert "antigravity" not in sys.modules
    place.write_text(json.dumps({"peft_type": "XLORA", "hidden_size": 16, "adapters": {"0": "somebody/adapter"}}))
    with pytest.raises(UserError, match=r"/adapter: names other adapters \(adapters={'0': 'somebody/adapter'}\),"):
        RMTEncoder.from_pretrained(tmp_path)
    place.write_text(json.dumps(plain))
    place = tmp_path / "backbone/config.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | {"attn_implementation": "kernels-community/any"}))
    told = r"/backbone: names code \(attn_implementation=kernels-community/any\), which"
    with pytest.raises(UserError, match=told):
        RMTEncoder.from_pretrained(tmp_path)
    # For a model inside.
    inside = {"model_type": "llava", "attn_implementation": {"vision_config": "kernels-community/any"}}
    place.write_text(json.dumps(inside))
    with pytest.raises(UserError, match=told):
        RMTEncoder.from_pretrained(tmp_path)


@pytest.mark.fault("backbone.name is a folder with adapters, with weights or without", "refused in one line")
@pytest.mark.parametrize("alone", [False, True])
def test_a_backbone_with_adapters_beside_it(
    alone: bool, tokenizer: PreTrainedTokenizerBase, refused: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    inside = TinyBert(**SIZE).encoder(tokenizer).model
    for part in (inside, tokenizer):
        part.save_pretrained("model")
    peft.get_peft_model(inside, peft.LoraConfig(r=2)).save_pretrained("model")
    if alone:
        Path("model/config.json").unlink()
        Path("model/model.safetensors").unlink()
    capsys.readouterr()
    told = refused("backbone=minilm", "backbone.name=model", "finetune=lora", "noise.documents=20")
    assert told.startswith("error: backbone.name=model: holds adapters of PEFT (adapter_config.json); give")


def test_fast_ways_have_adapters_too(tokenizer: PreTrainedTokenizerBase) -> None:
    """One by one as all at once, and in stacks."""
    model = make(RMTDecoder, tokenizer)
    LoRA()(backbone(model))
    randomize(model)
    ids = torch.randint(5, 600, (1, 7))
    written = generate(model.eval(), ids, max_new_tokens=12)
    merge_all(model)
    assert written[0].tolist() == generate(model, ids, max_new_tokens=12)[0].tolist()
    torch.manual_seed(0)
    model = make(ARMT, tokenizer, schedule="vertical")
    LoRA()(backbone(model))
    randomize(model)
    expected = read(model)
    model.schedule = "diagonal"
    torch.testing.assert_close(read(model), expected, rtol=1e-5, atol=1e-5)


def test_a_frozen_backbone_stays(tokenizer: PreTrainedTokenizerBase) -> None:
    model = make(RMTEncoder, tokenizer)
    Frozen()(backbone(model))
    read(model).square().sum().backward()
    assert {name for name, weight in model.named_parameters() if weight.grad is not None} == {"memory"}


def test_layers_that_are_not_there(tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(RMTEncoder, tokenizer)
    for targets in (["query", "nix"], "nix", ["LayerNorm", "nix"]):
        absent = targets if isinstance(targets, str) else next(name for name in targets if name != "query")
        told = f"lora.targets={absent}: is no linear layer of the backbone; give all-linear by itself, or a list "
        with pytest.raises(UserError, match=f"^{re.escape(told)}"):
            LoRA(targets=targets)(backbone(model))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"^finetune=lora needs PEFT; pip install 'rmt-lightning\[peft\]'$"):
        LoRA()(backbone(model))


WORDS = ("finetune=lora", "lora.r=2", "lora.dropout=0.2", "lora.targets=[query,value]")


def test_a_run_with_adapters(train: Run, command: Run, tmp_path: Path) -> None:
    """Bit for bit resumed, evaluated and exported in both ways."""
    assert train(*WORDS, "hydra.run.dir=whole").returncode == 0
    assert train(*WORDS, "hydra.run.dir=cut", "trainer.max_steps=7").returncode == 0
    resumed = train("resume=cut", "~trainer.max_steps", small=False)
    assert resumed.returncode == 0, resumed.stderr
    left, right = final(tmp_path / "whole"), final(tmp_path / "cut")
    assert_identical(left, right)
    begun = torch.load(tmp_path / "whole/checkpoints/stage-1.ckpt", weights_only=True)["state_dict"]
    kept = {name for name in left if torch.equal(left[name], begun[name])}
    assert any("base_layer" in name for name in kept) and not any("lora_" in name for name in kept)
    assert json.loads((tmp_path / "whole/adapter/adapter_config.json").read_text())["r"] == 2
    assert (
        command(
            "rmt_lightning.evaluate", "checkpoint=whole", "segments=[1]", "samples=4", "follow=0", "probes=[]"
        ).returncode
        == 0
    )
    for folder, merge in (("merged", "true"), ("apart", "false")):
        result = command("rmt_lightning.export", "checkpoint=whole", f"folder={folder}", f"merge={merge}")
        assert result.returncode == 0, result.stderr
        assert (tmp_path / folder / "adapter").is_dir() == (merge == "false")
    place = tmp_path / "whole/adapter/adapter_config.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | {"lora_alpha": 32}))
    result = command("rmt_lightning.export", "checkpoint=whole", "folder=changed")
    assert result.stderr == (
        "error: finetune=lora: the backbone has other adapters already (lora_alpha=32); leave it out, or put back the "
        "run's adapter/\n"
    )
    texts = ["Mary went to the garden. Where is Mary?", "John went to the kitchen. Where is John?"]
    merged, apart = (Answerer.from_pretrained(tmp_path / folder) for folder in ("merged", "apart"))
    torch.testing.assert_close(*(answerer.scores(texts) for answerer in (merged, apart)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            "finetune=lora",
            r"lora\.targets: PEFT knows none for this backbone; give all-linear by itself, or a list of some of de",
        ),
        ("finetune=lora lora.targets=[nix]", r"lora\.targets=nix: is no linear layer of the backbone; give all-linear"),
        ("finetune=lora lora.r=0", r"lora\.r=0: must be greater than or equal to 1"),
        ("finetune=lora lora.rank=4", r"lora\.rank: no such setting; .*allowed: r, alpha, dropout, targets"),
        ("lora.r=4", r"lora\.r: no such setting; it comes with finetune=lora"),
        ("finetune=frozen model=lstm", r"finetune=frozen: a LSTM has no backbone; leave it out"),
        ("finetune=some", r"finetune=some: no such choice; allowed: frozen, full, lora"),
    ],
)
def test_what_cannot_be_obeyed_is_refused(words: str, told: str, refused: Callable[..., str]) -> None:
    assert re.search(told, refused(*words.split()))
