"""Our models in the lm-evaluation-harness, on tasks that need no network; scores equal a count by hand."""

from __future__ import annotations

import builtins
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from transformers import PreTrainedTokenizerBase

from rmt_lightning.core.errors import UserError
from rmt_lightning.core.tokens import start_token
from rmt_lightning.models.generation import generate
from rmt_lightning.models.recurrence import Segment
from rmt_lightning.models.rmt import RMTDecoder, RMTEncoder
from rmt_lightning.models.tiny import TinyBert, TinyGPT

pytest.importorskip("lm_eval")
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from rmt_lightning import lm_eval as door
from rmt_lightning.analysis.harness import RecurrentLM

STORY = "Mary went to the garden. John took a walk in the park and it was late. " * 3
ROWS = [
    {"text": STORY + "Where is Mary?", "choices": ["garden", "park near the river", "kitchen"], "label": 0},
    {"text": "Where is John?", "choices": ["the office", "garden"], "label": 1},
]
TASKS = {
    "choice": {"output_type": "multiple_choice", "doc_to_text": "{{text}}", "doc_to_choice": "{{choices}}"}
    | {"doc_to_target": "label", "metric_list": [{"metric": "acc"}]},
    "likely": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"}
    | {"metric_list": [{"metric": "bits_per_byte"}]},
    "written": {"output_type": "generate_until", "doc_to_text": "{{text}}", "doc_to_target": "{{choices[0]}}"}
    | {"generation_kwargs": {"until": ["."], "max_gen_toks": 20}, "metric_list": [{"metric": "exact_match"}]},
}


@pytest.fixture(scope="module")
def folder(tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose texts here take many segments, and the tasks."""
    folder = tmp_path_factory.mktemp("harness")
    torch.manual_seed(0)
    model = RMTDecoder(TinyGPT(16, 2, 2, max_positions=64).decoder(tokenizer), 17, memory_size=3)
    for name, weight in model.decoder.model.named_parameters():
        weight.data.mul_(20 if ".h." in name and weight.dim() > 1 else 1)
    model.save_pretrained(folder / "model")
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    for name, task in TASKS.items():
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, "test_split": "test", **data, **task}))
    return folder


def by_hand(model: RMTDecoder, ids: list[int], start: int) -> float:
    """The log-probability of what stands from `start` on, segment by segment."""
    state, total = model.initial_state(1), 0.0
    with torch.no_grad():
        for first in range(0, len(ids) - 1, model.text_length):
            text = torch.tensor([ids[first : first + model.text_length]])
            hidden, state = model.step(Segment(text), state)
            logs = model.logits(hidden[0]).log_softmax(dim=-1)
            total += sum(
                float(logs[place - first - 1][ids[place]])
                for place in range(max(start, first + 1), min(first + model.text_length + 1, len(ids)))
            )
    return total


@pytest.mark.parametrize("batch_size", [1, 4])
def test_scores_equal_a_count_by_hand(folder: Path, batch_size: int) -> None:
    ours = RecurrentLM(str(folder / "model"), batch_size=batch_size, device="cpu")
    found: Any = simple_evaluate(
        ours, tasks=[*TASKS], task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0, log_samples=True,
    )  # fmt: skip
    model: Any = RMTDecoder.from_pretrained(folder / "model")
    tokenizer = model.tokenizer
    start = start_token(tokenizer)

    def tokens(text: str) -> list[int]:
        return [start, *tokenizer(text, add_special_tokens=False)["input_ids"]]

    right, nats, size = 0, 0.0, 0
    for row in ROWS:
        logs = [
            by_hand(model, tokens(f"{row['text']} {choice}"), len(tokens(row["text"]))) for choice in row["choices"]
        ]
        told = [float(said[0][0]) for said in found["samples"]["choice"][ROWS.index(row)]["resps"]]
        assert told == pytest.approx(logs, rel=1e-5)
        right += max(range(len(logs)), key=logs.__getitem__) == row["label"]
        nats -= by_hand(model, tokens(row["text"]), 1)
        size += len(row["text"].encode())
    assert found["results"]["choice"]["acc,none"] == right / 2
    assert found["results"]["likely"]["bits_per_byte,none"] == pytest.approx(nats / size / math.log(2))
    for row, sample in zip(ROWS, found["samples"]["written"], strict=True):
        made = generate(model, torch.tensor([tokens(row["text"])]), 20, stop_tokens=[tokenizer.eos_token_id or start])
        ids = [number for number in made.input_ids[0].tolist() if number != (tokenizer.eos_token_id or start)]
        assert sample["resps"][0][0] == tokenizer.decode(ids).split(".")[0]


@pytest.mark.soak
def test_at_the_command_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model_args", f"pretrained={folder / 'model'}", "--include_path", str(folder), "--tasks", "choice"]
    monkeypatch.setattr(sys, "argv", ["lm_eval", *words, "--device", "cpu", "--output_path", str(tmp_path)])
    door.run()
    assert "|choice|" in capsys.readouterr().out.replace(" ", "")
    (results,) = tmp_path.rglob("results_*.json")
    assert json.loads(results.read_text())["config"]["model"] == "rmt_lightning"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"batch_size": "auto"}, "batch_size=auto: give a number"),
        ({"batch_size": "0"}, "batch_size=0: give 1 or more"),
        ({"batch_size": 2.7}, "batch_size=2.7: give a number"),
        ({"batch_size": None}, "batch_size=None: give a number"),
        ({"device": "nix"}, "device=nix: torch cannot use it here; give cpu, or leave it out"),
        ({"device": "meta"}, "device=meta: torch cannot use it here; give cpu, or leave it out"),
        ({"peft": "x"}, "model_args: peft: not known here; give pretrained=<folder>, and"),
        ({"pretrained": ""}, "model_args: pretrained: is missing; give pretrained=<folder>, and"),
        ({"dtype": "int8"}, "dtype=int8: give float32, bfloat16 or float16"),
        # The harness makes a number of what looks like one.
        ({"pretrained": 2024}, "model_args: pretrained=2024: is no text; give ./2024"),
        ({"pretrained": "absent"}, "absent: no such folder, and cannot be loaded from the Hugging Face Hub"),
    ],
)
def test_what_is_refused(options: dict[str, str], told: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=f"^{told}"):
        RecurrentLM(**{"pretrained": str(folder / "model"), **options})


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"max_gen_toks": "x"}, "gen_kwargs: invalid literal for int"),
        ({"do_sample": True, "temperature": -1}, "gen_kwargs: .*temperature"),
        ({"num_beams": 3}, "gen_kwargs: num_beams: not known here; give until, "),
        ({"until": 3}, "gen_kwargs: until=.3.: give a text, or a list of texts"),
        ({"until": ["a", {"b": 1}]}, "gen_kwargs: until=.*: give a text, or a list of texts"),
        ({"max_gen_toks": -5}, "gen_kwargs: max_gen_toks=-5: give 0 or more"),
        ({"max_gen_toks": []}, "gen_kwargs: int.. argument must be"),
        ({"do_sample": "no"}, "gen_kwargs: do_sample=no: give true or false"),
        ({"max_gen_toks": math.inf}, "gen_kwargs: cannot convert float infinity"),
        ({"temperature": -0.1}, "gen_kwargs: .*temperature"),
        ({"top_k": -1}, "gen_kwargs: .*top_k"),
        ({"temperature": 1, "top_k": True}, "gen_kwargs: top_k=True: give a number"),
        ({"temperature": None}, "gen_kwargs: float.. argument must be"),
        ({"temperature": 1, "top_p": "much"}, "gen_kwargs: top_p=much: give a number"),
    ],
)
def test_what_cannot_be_written_so(options: dict[str, Any], told: str, folder: Path) -> None:
    ours = RecurrentLM(str(folder / "model"), device="cpu")
    with pytest.raises(UserError, match=f"^{told}"):
        ours.generate_until([SimpleNamespace(args=("Mary", options))], disable_tqdm=True)
    with pytest.raises(UserError, match=r"^apply_chat_template: the model's tokenizer has no template; leave"):
        ours.apply_chat_template([{"role": "user", "content": "Where is Mary?"}])
    ours.tokenizer.chat_template = "{{ raise_exception('no system') }}"
    with pytest.raises(
        UserError, match=r"^apply_chat_template: the model's template fails \(TemplateError: no system\)"
    ):
        ours.apply_chat_template([{"role": "user", "content": "Where is Mary?"}])


def test_numbers_of_tokens_and_temperatures_mean_what_the_harness_means(folder: Path) -> None:
    ours = RecurrentLM(str(folder / "model"), device="cpu")

    def write(**options: Any) -> str:
        torch.manual_seed(0)
        (text,) = ours.generate_until(
            [SimpleNamespace(args=("Mary", {"max_gen_toks": 9} | options))], disable_tqdm=True
        )
        return text

    assert write() == write(temperature=0.0) == write(do_sample=False, temperature=9.0)
    assert write(temperature=9.0) == write(do_sample=True, temperature=9.0) != write()
    for name in ("max_new_tokens", "max_tokens"):
        assert write(max_gen_toks=None, **{name: 4}) == write(max_gen_toks=4)


@pytest.mark.fault("lm_eval is not installed, or cannot be imported", "one line says which of them")
@pytest.mark.parametrize(
    ("missing", "told"),
    [("lm_eval", "is not installed; pip"), ("jinja2", "cannot be imported (No module named 'jinja2'); pip")],
)
def test_a_harness_that_is_not_there(missing: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = builtins.__import__

    def fails(name: str, *given: Any) -> Any:
        if name.startswith("lm_eval"):
            raise ModuleNotFoundError(f"No module named '{missing}'", name=missing)
        return whole(name, *given)

    monkeypatch.setattr(builtins, "__import__", fails)
    with pytest.raises(SystemExit) as left:
        door.run()
    assert str(left.value.code).startswith(f"error: lm_eval: {told}")


def test_a_home_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No shell has put it into `pretrained=~/model`."""
    monkeypatch.setenv("HOME", str(folder))
    assert RecurrentLM("~/model").model.predicts


def test_an_encoder_predicts_no_words(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    RMTEncoder(TinyBert(16, 1, 2).encoder(tokenizer), 24).save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="a RMTEncoder predicts no words; give a causal language model"):
        RecurrentLM(str(tmp_path / "model"))
