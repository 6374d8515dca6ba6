"""The model card of an export: what is known is told, what is not is left out, and nothing of other weights."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from test_export import Counter, make
from torch import nn
from transformers import PreTrainedTokenizerBase

from rmt_lightning.app.card import told
from rmt_lightning.models.answerer import Answerer
from rmt_lightning.models.rmt import RMTDecoder, RMTEncoder

LENGTHS = "segments,tokens,text_tokens,right,samples,questions,accuracy,low,high,fits\n"
RATE = {"lost": 3, "exposure": 65536, "streams": 64, "rate": 4.6e-05, "rate_low": 9e-06, "rate_high": 1.3e-4}


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    """A run whose last weights were evaluated, and some that are gone as well."""
    shutil.copytree(finished_run, tmp_path / "run")
    sha256 = hashlib.sha256((tmp_path / "run" / "checkpoints" / "last.ckpt").read_bytes()).hexdigest()
    for name, digest, right in (("now", sha256, 60), ("before", "0" * 64, 7)):
        folder = tmp_path / "run" / "evaluations" / name
        folder.mkdir(parents=True)
        (folder / "evaluation.csv").write_text(f"{LENGTHS}64,,2240,{right},64,60,{right / 64},0.85,0.98,1.0\n")
        settings = {"settings": {"checkpoint": "last.ckpt", "sha256": digest}, "retention": {"64": RATE}}
        (folder / "evaluation.json").write_text(json.dumps(settings))
        (folder / "probes.csv").write_text(
            "probe,segments,right,samples,accuracy,low,high,decoy,last_place,commonest_place\n"
            "two people,1,62,64,0.97,0.89,0.99,2,30,34\nreworded,1,60,64,0.94,0.85,0.98,2,64,64\n"
        )
    return tmp_path / "run"


def card(run: Path, tokenizer: PreTrainedTokenizerBase, checkpoint: str = "last.ckpt") -> ModelCard:
    """The card of some model with what that run tells."""
    page = told(run, run / "checkpoints" / checkpoint, None, 35)
    return Answerer(make(RMTEncoder, tokenizer), nn.Linear(16, 2), ["here", "there"]).generate_model_card(**page)


def test_what_a_run_tells(run: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    page = card(run, tokenizer)
    for line in (
        "# RMTEncoder, trained on Detect",
        "noise noise Mary went to the garden. noise noise … noise Where is Mary?   -> garden",
        "It chooses between these answers: here, there. The text ends with its question.",
        "| lengths | up to 3 segments of 35 tokens, 105 tokens |",
        "| ended | finished |",
        "| Detect, Prose | 64 | 2,240 | 60 of 64 | 93.8% | 85.0% – 98.0% |",
        "Memory lost per segment: 4.6e-05, 95% interval 9e-06 – 0.00013 (3 memories lost in 65,536 segments;",
        "On 1 of 2 the model is better than that.",
        "| reworded | 1 | 94.0% | 85.0% – 98.0% | 100.0% |",
        "[arXiv 2304.11062](https://arxiv.org/abs/2304.11062)",
    ):
        assert line in page.content, line
    assert "One of the questions it was tested with: *Where is " in page.content
    assert "7 of 64" not in page.content, "of weights that are gone"
    again = ModelCard(page.content)
    data: dict[str, Any] = again.data.to_dict()
    assert data["library_name"] == "rmt_lightning" and data["pipeline_tag"] == "text-classification"
    assert data["language"] == "en" and data["metrics"] == ["accuracy"] and "license" not in data
    results = {result.dataset_config: result.metric_value for result in again.data.eval_results}
    assert results["segments=64"] == 0.9375 and {"segments=1", "segments=4"} < results.keys()


def test_what_is_not_known_is_left_out(run: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    of_a_stage = card(run, tokenizer, "stage-2.ckpt").content
    assert "| lengths | up to 2 segments" in of_a_stage and "| checkpoint | stage-2.ckpt |" in of_a_stage
    assert "## Results" not in of_a_stage and "model-index" not in of_a_stage
    assert "No probes have been asked of it" in of_a_stage
    for name in ("predictions.jsonl", "hardware.json"):
        (run / name).write_text("{")
    (run / "phases.json").write_text((run / "phases.json").read_text().replace('"finished": true', '"finished": false'))
    shutil.rmtree(run / "evaluations")
    going_on = card(run, tokenizer).content
    for absent in ("## Results", "One of the questions", "hardware", "commit of"):
        assert absent not in going_on


@pytest.mark.parametrize(
    ("page", "config", "told_license"),
    [("---\nlicense: mit\n---\n# BERT", "{}", "mit"), ("# BERT", '{"license": "cc0-1.0"}', "cc0-1.0"),
     ("---\nlicense: [\n---", "{", "unknown"), (None, None, "unknown")],
)  # fmt: skip
def test_the_license_of_the_backbone(
    page: str | None, config: str | None, told_license: str, run: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    settings = yaml.safe_load((run / "config.yaml").read_text())
    name = run.parent / "bert"
    settings["backbone"] = {"_target_": "rmt_lightning.Pretrained", "name": str(name)}
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    name.mkdir()
    shutil.rmtree(run / "backbone")
    (run / "backbone").mkdir()
    for path, text in ((name / "README.md", page), (run / "backbone" / "config.json", config)):
        if text is not None:
            path.write_text(text)
    found = card(run, tokenizer)
    assert f"| license of the backbone | {told_license} |" in found.content
    assert found.data.to_dict()["license"] == told_license and "base_model" not in found.data.to_dict()


@pytest.mark.fault("a run folder from elsewhere is exported", "its card is whole, whatever the files of the run say")
def test_what_others_may_have_written(run: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    said = "a | b\n\n# <img src=x>"
    (run / "hardware.json").write_text(json.dumps([{"gpus": 3, "cpu": said, "commit": said}]))
    (run / "predictions.jsonl").write_text(json.dumps({"question": said, "target": said}))
    config = yaml.safe_load((run / "config.yaml").read_text())
    # A folder that is gone, whose name can be no id on the Hub.
    config["backbone"] |= {"name": "my models/bert"}
    config["noise"] |= {"documents": said}
    config["data"] = None
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    page = card(run, tokenizer)
    # But in the two examples, which are code.
    assert page.content.count("<img") == 2
    assert r"| hardware | a \| b # &lt;img src=x> |" in page.content
    assert "*a | b # &lt;img src=x>*" in page.content
    assert "base_model" not in page.data.to_dict()


def test_a_language_model(tokenizer: PreTrainedTokenizerBase) -> None:
    run = Path(__file__).parent / "version_0_1" / "text"
    page = make(RMTDecoder, tokenizer).generate_model_card(**told(run, run / "checkpoints" / "last.ckpt", None, 35))
    assert "predicts the next token" in page.content and "AutoModel.from_pretrained" in page.content
    assert "## Limits" not in page.content and page.data.to_dict()["pipeline_tag"] == "text-generation"


def test_from_python(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    make(Counter, tokenizer).save_pretrained(tmp_path, model_card_kwargs={"license": "mit"})
    page = ModelCard.load(tmp_path / "README.md")
    assert page.data.to_dict()["license"] == "mit" and "pipeline_tag" not in page.data.to_dict()
    assert "import test_export  # the class of the model" in page.content and "## Training" not in page.content
