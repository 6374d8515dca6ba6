"""Saved models through transformers: AutoConfig, AutoTokenizer, AutoModel and a pipeline, once this is imported."""

from __future__ import annotations

import copy
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from test_export import Counter, make
from tokenizers.processors import BertProcessing
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    pipeline,
)

from rmt_lightning.core.errors import UserError
from rmt_lightning.core.imports import when_imported
from rmt_lightning.models.answerer import Answerer
from rmt_lightning.models.likelihood import likelihood
from rmt_lightning.models.rmt import RMTDecoder, RMTEncoder
from rmt_lightning.models.segment_model import SegmentModel

ANSWERS = ["here", "there", "nowhere"]
TEXTS = ["Mary went to the garden. " * 20 + "Where is Mary?", "Where is John?"]


@pytest.fixture
def answerer(tokenizer: PreTrainedTokenizerBase) -> Answerer:
    """Its tokenizer puts special tokens around texts, as that of BERT does."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.backend_tokenizer.post_processor = BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    assert tokenizer("")["input_ids"] == [tokenizer.cls_token_id, tokenizer.sep_token_id]
    model = make(RMTEncoder, tokenizer)
    return Answerer(model, nn.Linear(16, 3), ANSWERS).eval()


@pytest.fixture
def folder(answerer: Answerer, tmp_path: Path) -> Path:
    answerer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_with_the_head_that_answers(answerer: Answerer, folder: Path, tmp_path: Path) -> None:
    config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert config.model_type == "rmt_lightning" and [*config.id2label.values()] == ANSWERS
    model = AutoModel.from_pretrained(folder)
    assert not any(part.training for part in model.modules()) and model.dtype == torch.float32
    # Special tokens and padding, on either side, are what tokenizers give.
    expected = answerer.scores(TEXTS)
    for side in ("left", "right"):
        batch = tokenizer(TEXTS, padding=True, padding_side=side, return_tensors="pt")
        with torch.no_grad():
            assert torch.equal(model(**batch).logits, expected)
    labels = torch.tensor([2, 0])
    found = model(**batch, labels=labels)
    torch.testing.assert_close(found.loss, cross_entropy(expected, labels))
    found.loss.backward()
    assert model.head.weight.grad is not None
    model.save_pretrained(tmp_path / "again")
    for name in ("config.json", "model.safetensors", "head.safetensors", "tokenizer.json"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    half = AutoModel.from_pretrained(folder, dtype="bfloat16", device_map="cpu")
    half.save_pretrained(tmp_path / "half")
    for dtype, expected_dtype in ((None, torch.bfloat16), ("auto", torch.bfloat16), (torch.float32, torch.float32)):
        assert AutoModel.from_pretrained(tmp_path / "half", dtype=dtype).dtype == expected_dtype
    assert Answerer.from_pretrained(tmp_path / "half")(TEXTS) is not None


def test_a_pipeline(answerer: Answerer, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    asked = pipeline("text-classification", model=str(folder))
    assert [best["label"] for best in asked(TEXTS, batch_size=2)] == answerer(TEXTS)
    together = asked({"text": "Mary went to the garden.", "text_pair": "Where is Mary?"}, top_k=3)
    memory = answerer.read("Mary went to the garden.")
    (ranked,) = answerer.ranked(memory, "Where is Mary?", 3)
    assert [best["label"] for best in together] == [best.text for best in ranked]
    assert [best["score"] for best in together] == pytest.approx([best.probability for best in ranked])


def test_what_predicts_tokens(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model = make(RMTDecoder, tokenizer)
    model.save_pretrained(tmp_path)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(opened) is type(AutoModel.from_pretrained(tmp_path))
    ids = torch.randint(5, 600, (2, 50))
    there = torch.ones_like(ids)
    there[1, :13] = 0
    with torch.no_grad():
        whole = opened(ids, labels=ids)
        padded = opened(ids, there).logits
        (alone,) = opened(ids[1:, 13:]).logits
    torch.testing.assert_close(padded[0], whole.logits[0])
    torch.testing.assert_close(padded[1, 13:], alone)
    start = torch.ones(2, dtype=torch.long)
    nats = -likelihood(model, ids, start).log.sum() / (2 * 49)
    torch.testing.assert_close(whole.loss.double(), nats, rtol=1e-5, atol=1e-5)


def test_by_itself(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model = make(Counter, tokenizer)
    model.save_pretrained(tmp_path)
    ids = torch.randint(5, 600, (2, 50))
    with torch.no_grad():
        assert torch.equal(AutoModel.from_pretrained(tmp_path)(ids).pooler_output, model.encode(ids))
    with pytest.raises(UserError, match=r"is opened as a RecurrentModel; use AutoModel.from_pretrained$"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"^a config holds no tokenizer"):
        AutoModel.from_config(AutoConfig.from_pretrained(tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_labels": 2}, r"^config: id2label=\{0: 'LABEL_0', 1: 'LABEL_1'\} is not what the saved model has; leave"),
        ({"output_hidden_states": True}, r"^config: output_hidden_states=True is not"),
        ({"attn_implementation": "eager"}, r"^config: attn_implementation=eager is not"),
        ({"memory_size": 4}, r"^memory_size: is not obeyed here; give dtype, device_map, or what snapshot_downl"),
        ({"dtype": "int8"}, r"^dtype=int8: give float32, bfloat16, float16 or auto$"),
        ({"device_map": "auto"}, r"^device_map=auto: is no single device; give one, such as cpu or cuda:0$"),
    ],
)
def test_what_would_not_be_obeyed(options: dict[str, Any], message: str, folder: Path) -> None:
    with pytest.raises(UserError, match=message):
        AutoModel.from_pretrained(folder, **options)


def test_nothing_is_executed(folder: Path) -> None:
    """Code that a folder brings and names is left alone, even if it is trusted."""
    text = (folder / "config.json").read_text()
    mapped = '{"auto_map": {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}, ' + text.lstrip("{")
    (folder / "config.json").write_text(mapped)
    (folder / "evil.py").write_text("raise SystemExit('executed')")
    assert AutoModel.from_pretrained(folder).config.model_type == "rmt_lightning"
    AutoModel.from_pretrained(folder, trust_remote_code=True)
    SegmentModel.from_pretrained(folder)


@pytest.mark.fault("config.json of a saved model names a kernel of the Hub as its attention", "refused, not fetched")
@pytest.mark.parametrize("named", ["kernels-community/any", "somebody/evil:attention", {"": "somebody/evil"}])
def test_no_kernel_is_fetched(named: Any, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attn_implementation": named}))
    with pytest.raises(UserError, match=r"names code \(attn_implementation=.*\), which is not executed; take"):
        AutoModel.from_pretrained(folder)


def test_answers_are_those_of_the_head(folder: Path, tmp_path: Path) -> None:
    """transformers makes names of its own if num_labels is another number."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_labels": 2}))
    opened = AutoModel.from_pretrained(folder)
    assert [*opened.config.id2label.values()] == ANSWERS and opened.config.label2id["there"] == 1
    opened.save_pretrained(tmp_path / "again")
    assert Answerer.from_pretrained(tmp_path / "again").answers == tuple(ANSWERS)


def test_adapters_at_the_top(folder: Path, tmp_path: Path) -> None:
    """PEFT puts them there, and nothing of this package would read them."""
    told = r"holds adapters of PEFT at its top \(adapter_config.json\), which are not opened with it; put them in a"
    (tmp_path / "alone").mkdir()
    for place in (folder, tmp_path / "alone"):
        (place / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(folder)}))
        with pytest.raises(UserError, match=told):
            AutoModel.from_pretrained(place)
    with pytest.raises(UserError, match=told):
        Answerer.from_pretrained(folder)


def test_nothing_waits_for_transformers(folder: Path) -> None:
    """This package does not import them, and tells them of its models when somebody else does."""
    program = f"""
import sys, rmt_lightning
assert "transformers" not in sys.modules
from transformers import AutoConfig, AutoModel
print(AutoConfig.from_pretrained({str(folder)!r}).model_type, type(AutoModel.from_pretrained({str(folder)!r})).__name__)
"""
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert result.stdout == "rmt_lightning RecurrentForSequenceClassification\n", result.stderr


def test_after_an_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    (tmp_path / "waited_for.py").write_text("name = 'here'")
    called: list[str] = []

    def call() -> None:
        called.append(sys.modules["waited_for"].name)

    when_imported("waited_for", call)
    assert not called and importlib.util.find_spec("waited_for") is not None
    importlib.import_module("waited_for")
    assert called == ["here"]
    when_imported("waited_for", call)
    assert called == ["here", "here"]
    monkeypatch.delitem(sys.modules, "waited_for")
