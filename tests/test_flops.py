"""What longer inputs cost: the formula against a transcription, against PyTorch's counter, and the front door."""

from __future__ import annotations

import csv
import json
import os
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, Run
from hydra.core.global_hydra import GlobalHydra
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedTokenizerBase

from rmt_lightning import flops as front_door
from rmt_lightning.analysis.flops import OPT, compare, flop_terms, forward_flops, read_shape
from rmt_lightning.models.rmt import RMTEncoder
from rmt_lightning.models.tiny import TinyBert
from rmt_lightning.reporting import figures

SMALL, LARGE = OPT[0], OPT[-1]


def hoffmann(s: int, d: int, f: int, h: int, layers: int, vocabulary: int) -> tuple[int, int, int]:
    """Appendix F as printed: embeddings, layers, logits."""
    attention = 2 * 3 * s * d * d + 2 * s * s * d + 3 * h * s * s + 2 * s * s * d + 2 * s * d * d
    dense = 2 * s * (d * f + d * f)
    return 2 * s * vocabulary * d, layers * (attention + dense), 2 * s * d * vocabulary


def ratio(published: dict[str, int], with_embeddings: bool) -> float:
    parts = [sum(hoffmann(s, **published)[0 if with_embeddings else 1 :]) for s in (4096 * 512, 512)]
    return parts[0] / (4096 * parts[1])


PUBLISHED = {
    SMALL: {"d": 768, "f": 3072, "h": 12, "layers": 12, "vocabulary": 50272},
    LARGE: {"d": 12288, "f": 49152, "h": 96, "layers": 96, "vocabulary": 50272},
}


def test_the_published_ratios() -> None:
    rows = {row["model"]: row for row in compare(OPT, [4096 * 512], segment_length=512, text_length=512)}
    assert [round(rows[shape.name]["ratio"]) for shape in (SMALL, LARGE)] == [295, 29]
    assert [rows[shape.name]["segments"] for shape in (SMALL, LARGE)] == [4096, 4096]


@pytest.mark.parametrize("shape", [SMALL, LARGE], ids=lambda shape: shape.name)
def test_the_formula(shape: Any) -> None:
    """All of appendix F but the embeddings; with them, the smaller ratio would not be the published one."""
    for tokens in (1, 512, 2_097_152):
        assert forward_flops(shape, tokens) == sum(hoffmann(tokens, **PUBLISHED[shape])[1:])
    (row,) = compare([shape], [4096 * 512], 512, 512)
    assert row["ratio"] == pytest.approx(ratio(PUBLISHED[shape], with_embeddings=False), rel=1e-12)
    assert round(ratio(PUBLISHED[shape], with_embeddings=True)) == {SMALL: 229, LARGE: 29}[shape]


def test_the_family_is_as_large_as_its_names_say() -> None:
    """Multiplications of one token without attention are the parameters, but for biases, norms and positions."""
    for shape in OPT:
        matrices = sum(flop_terms(shape, 1).values()) - sum(attention(shape, 1).values())
        # 350M is known to have 331 million.
        number, unit = float(shape.name[4:-1]), {"M": 1e6, "B": 1e9}[shape.name[-1]]
        assert matrices / 2 == pytest.approx(number * unit, rel=0.07)


def attention(shape: Any, tokens: int) -> dict[str, int]:
    terms = flop_terms(shape, tokens)
    return {name: terms[name] for name in ("attention scores", "softmax", "weighted values")}


def test_rmt_is_linear_and_full_attention_quadratic() -> None:
    rows = compare([SMALL], [512, 1024, 1_048_576, 2_097_152], 512, 512)
    assert [row["rmt"] for row in rows] == [count * rows[0]["rmt"] for count in (1, 2, 2048, 4096)]
    assert rows[0]["rmt"] == rows[0]["full_attention"]
    assert rows[3]["full_attention"] / rows[2]["full_attention"] == pytest.approx(4, rel=0.01)


def test_memory_leaves_less_room() -> None:
    (row,) = compare([SMALL], [4096 * 499], 512, 499)
    assert row["segments"] == 4096 and row["rmt"] == 4096 * forward_flops(SMALL, 512)
    (row,) = compare([SMALL], [4096 * 499 + 1], 512, 499)
    assert row["segments"] == 4097


def test_lengths_in_any_order() -> None:
    assert compare([SMALL], [8, 4, 8], 4, 4) == compare([SMALL], [4, 8], 4, 4)


# Small models of each architecture that is understood, and settings that make its quirks count.
ENCODERS: dict[str, dict[str, Any]] = {
    "bert": {},
    "camembert": {},
    "distilbert": {"hidden_dim": 48},
    "electra": {"embedding_size": 8},
    "modernbert": {"pad_token_id": 0},
    "mpnet": {},
    "roberta": {},
    "xlm-roberta": {},
}
DECODERS: dict[str, dict[str, Any]] = {
    "gemma": {"head_dim": 24, "num_key_value_heads": 1},
    "gpt2": {"n_inner": None},
    "gpt_neox": {},
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 2, "head_dim": 16},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 16},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 16},
}


def small(architecture: str, **settings: Any) -> Any:
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
    special = {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    positions = {"vocab_size": 100, "max_position_embeddings": 64}
    return AutoConfig.for_model(architecture, **(sizes | special | positions | settings))


def counted(model: torch.nn.Module, *inputs: Any) -> int:
    """Multiplications and additions of all matrix products. PyTorch counts neither softmax nor look-up.

    Angles of rotary positions are left out: transformers before 5.19 multiplies matrices for them.
    """
    model.requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        model(*inputs)
    angles = [sum(parts.values()) for name, parts in counter.get_flop_counts().items() if name.endswith("rotary_emb")]
    return int(counter.get_total_flops() - sum(angles))


@pytest.mark.parametrize(
    ("architecture", "settings"), [*ENCODERS.items(), *DECODERS.items()], ids=[*ENCODERS, *DECODERS]
)
def test_every_architecture_against_the_counter_of_pytorch(architecture: str, settings: dict[str, Any]) -> None:
    """Equal to the last FLOP, but for the softmax."""
    config = small(architecture, **settings)
    auto_class = AutoModelForCausalLM if architecture in DECODERS else AutoModel
    # The counter does not know PyTorch's fused attention on a CPU.
    model = auto_class.from_config(config, attn_implementation="eager").eval()
    # An encoder's backbone has none.
    model.register_module("pooler", None)
    shape = read_shape(config)
    for tokens in (7, 40):
        terms = flop_terms(shape, tokens)
        softmax = terms.pop("softmax")
        assert counted(model, torch.ones(1, tokens, dtype=torch.long)) == sum(terms.values())
        assert softmax == 3 * 4 * tokens**2 * 3  # 3 FLOPs, 4 heads, 3 layers
        assert (terms["logits"] > 0) == (architecture in DECODERS)


def test_the_real_recurrence_against_the_counter_of_pytorch(tokenizer: PreTrainedTokenizerBase) -> None:
    """RMT costs a segment's FLOPs times their number, memory and special tokens included."""
    backbone = TinyBert(width=16, layers=2, heads=2, max_positions=32)
    encoder = backbone.encoder(tokenizer)
    encoder.model.set_attn_implementation("eager")
    model = RMTEncoder(encoder, segment_length=32, memory_size=4)
    shape = read_shape(backbone.config())
    segments = torch.ones(1, 5, model.text_length, dtype=torch.long)
    (row,) = compare([shape], [segments.numel()], 32, model.text_length)
    assert row["segments"] == 5
    assert counted(model, segments) == row["rmt"] - 5 * flop_terms(shape, 32)["softmax"]


@pytest.mark.parametrize(
    ("config", "layers", "window"),
    [
        # Full attention in each third layer; 64 tokens on either side in the others.
        (small("modernbert", pad_token_id=0), 2, 129),
        (small("mistral", sliding_window=10), 3, 10),
        (small("mistral", sliding_window=None), 0, 0),
        (small("qwen2", sliding_window=10, use_sliding_window=True, max_window_layers=1), 2, 10),
        (small("qwen2", sliding_window=10, use_sliding_window=False), 0, 0),
    ],
)
def test_layers_that_see_a_window_cost_no_more_than_that(config: Any, layers: int, window: int) -> None:
    shape = read_shape(config)
    assert (shape.local_layers, shape.window) == (layers, window)
    full = replace(shape, local_layers=0, window=0)
    assert forward_flops(shape, 10) == forward_flops(full, 10)
    tokens = 1000
    keys_less = layers * tokens * (tokens - window)
    difference = sum(attention(full, tokens).values()) - sum(attention(shape, tokens).values())
    assert difference == keys_less * (4 * shape.heads * shape.head_width + 3 * shape.heads)


def flops(monkeypatch: pytest.MonkeyPatch, *settings: str) -> None:
    monkeypatch.setattr(sys, "argv", ["flops", *settings])
    GlobalHydra.instance().clear()
    front_door.run()


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_the_command(command: Run, tmp_path: Path) -> None:
    result = command("rmt_lightning.flops")
    assert result.returncode == 0 and result.stderr == "", result.stderr
    lines = [line.split() for line in result.stdout.replace("│", " ").splitlines()]
    assert ["2,097,152", "OPT-125M", "4,096", "1.645e+17", "5.582e+14", "×295"] in lines
    assert ["2,097,152", "OPT-175B", "4,096", "2.161e+19", "7.373e+17", "×29"] in lines
    assert ["512", "OPT-125M", "1", "1.363e+11", "1.363e+11", "×1.0"] in lines
    folder = tmp_path / "outputs" / "flops"
    assert sorted(os.listdir(folder)) == ["flops.csv", "flops.pdf", "flops.png"]
    assert (folder / "flops.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "flops.pdf").read_bytes().startswith(b"%PDF")
    assert len(rows(folder / "flops.csv")) == 9 * 13
    # The reported result is what the command says today.
    assert (folder / "flops.csv").read_text() == (ROOT / "experiments" / "cost" / "results.csv").read_text()


def test_a_backbone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    flops(monkeypatch, "backbone=tiny_bert", "backbone.layers=7", "tokens=[512]", "folder=tiny")
    (row,) = rows(tmp_path / "tiny" / "flops.csv")
    assert int(row["rmt"]) == sum(hoffmann(512, d=128, f=512, h=4, layers=7, vocabulary=0))
    # A folder with a config and no weights is enough.
    small("opt", **DECODERS["opt"]).save_pretrained(tmp_path / "own")
    settings = ["backbone=minilm", "backbone.name=own", "tokens=[9,1000]", "segment_length=20", "text_length=10"]
    flops(monkeypatch, *settings, "folder=own-flops")
    found = rows(tmp_path / "own-flops" / "flops.csv")
    assert [(row["model"], row["segments"]) for row in found] == [("own", "1"), ("own", "100")]
    assert "RMT with segments of 20 tokens" in capsys.readouterr().out


def test_the_figure() -> None:
    """From the rows as they stand in a csv file; a curve for each column, labelled at its end."""
    read = rows(ROOT / "experiments" / "cost" / "results.csv")
    left, right = figures.flops(read).axes
    assert len(left.lines) == 2 * 9 and len(right.lines) == 9
    assert list(right.lines[0].get_ydata()) == [float(row["ratio"]) for row in read[:13]]
    assert {text.get_text() for text in right.texts} >= {"OPT-125M  ×295", "OPT-175B  ×29"}
    assert {text.get_text() for text in left.texts} == {shape.name for shape in OPT}
    assert [axes.get_xscale() + axes.get_yscale() for axes in (left, right)] == ["loglog", "loglog"]
    heights = sorted(text.get_position()[1] for text in right.texts)
    assert all(above > below + 0.03 for below, above in pairwise(heights))


BERT: dict[str, Any] = {"model_type": "bert"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["tokens=[]"], "tokens=[]: names no length; give some, such as [512,4096]"),
        (["tokens=[0]"], "tokens=[0]: must be greater than or equal to 1"),
        (["tokens=512"], "tokens=512: must be a valid list"),
        (["segment_length=0"], "segment_length=0: must be greater than or equal to 1"),
        (["text_length=513"], "text_length=513: does not fit into segment_length=512; give 512 or less"),
        (["memory_size=10"], "memory_size: no such setting; "),
        (["folder=plain.txt"], "folder=plain.txt: cannot be written to (File exists); choose another folder"),
        (["folder=plain.txt/x"], "folder=plain.txt/x: cannot be written to (Not a directory); choose another folder"),
        (["backbone=opt"], "backbone=opt: no such choice; allowed: bert_base_cased, "),
        (["backbone=tiny_bert", "backbone.heads=3"], "backbone.width=128: must be a multiple of backbone.heads=3"),
        (["backbone=minilm", "backbone.name=/absent/model"], "backbone.name=/absent/model: no such folder"),
        (["{}"], "backbone.name=own: cannot be loaded (Unrecognized model in own. Should have a `model_type` key"),
        (["{"], "backbone.name=own: cannot be loaded (It looks like the config file at "),
        (
            [json.dumps(BERT | {"hidden_size": "wide"})],
            "backbone.name=own: cannot be loaded (TypeError: Field 'hidden",
        ),
        ([json.dumps(BERT | {"num_attention_heads": 0})], "backbone: its config says num_attention_heads=0, which "),
        (['{"model_type": "t5"}'], "backbone: the FLOPs of t5 are not known; choose one of bert, "),
    ],
)
def test_bad_input(
    settings: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("plain.txt").touch()
    if settings[0].startswith("{"):
        Path("own").mkdir()
        Path("own", "config.json").write_text(settings[0])
        settings = ["backbone=minilm", "backbone.name=own"]
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as exit_:
        flops(monkeypatch, *settings)
    errors = capsys.readouterr().err
    assert exit_.value.code == 2, errors
    assert errors.startswith(f"error: {message}") and errors.count("\n") == 1, errors
    assert sorted(tmp_path.rglob("*")) == before
