"""What version 0.1 left behind opens, evaluates, resumes and is reported."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import Run, final

from rmt_lightning import LSTM, Answerer, RMTDecoder, RMTEncoder, SegmentModel, TransformerXL
from rmt_lightning.core.names import public_name
from rmt_lightning.reporting.reading import read_runs

OLD = Path(__file__).parent / "version_0_1"
# As that version did, which matters where dropout is drawn for all rows.
WHOLE_LAYERS = """
from rmt_lightning.models import bert
bert.known = lambda model: False
from rmt_lightning.train import run
run()
"""


@pytest.mark.parametrize("name", ["facts", "hold", "text"])
def test_an_interrupted_run_goes_on_as_it_would_have(name: str, train: Run, tmp_path: Path) -> None:
    shutil.copytree(OLD / name, tmp_path / name)
    driver = WHOLE_LAYERS if name == "facts" else None
    # Whether memory holds was not asked then.
    more = ("hold.until_rate=1",) if name == "hold" else ()
    resumed = train(f"resume={name}", "trainer.max_steps=-1", *more, small=False, driver=driver)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    expected = torch.load(OLD / name / "expected.pt", weights_only=True)
    found = final(tmp_path / name)
    assert found.keys() == expected.keys()
    for weight, value in expected.items():
        # Bit for bit on the machine that made them; other processors round otherwise.
        torch.testing.assert_close(found[weight], value, atol=1e-4, rtol=1e-3)
    # What was typed then has been found out, and what was interpolated is not among it.
    typed = (tmp_path / name / "overrides.yaml").read_text().splitlines()
    assert not [line for line in typed if re.match(r"- (\+|optim\.steps|model\.segment_length|metrics)", line)], typed


def test_a_budget_that_was_too_small_is_raised(train: Run, tmp_path: Path) -> None:
    """The schedule of the learning rate follows, though the old config holds it resolved."""
    shutil.copytree(OLD / "text", tmp_path / "text")
    resumed = train("resume=text", "trainer.max_steps=-1", "curriculum.steps=16", small=False)
    assert resumed.returncode == 0, resumed.stderr
    saved = torch.load(tmp_path / "text" / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 16
    assert "steps: 16" in (tmp_path / "text" / "config.yaml").read_text().split("optim:")[1]


def test_what_was_evaluated_is_found_again(command: Run, tmp_path: Path) -> None:
    shutil.copytree(OLD / "hold-whole", tmp_path / "run")
    settings = ["checkpoint=run", "segments=[1,3]", "samples=8", "follow=32", "every=8", "device=cpu"]
    result = command("rmt_lightning.evaluate", *settings)
    assert result.returncode == 0, result.stderr
    files = sorted((tmp_path / "run" / "evaluations").glob("*/evaluation.csv"), key=lambda path: path.stat().st_mtime)
    old, new = (
        [(row["segments"], row["right"]) for row in csv.DictReader(path.open())] for path in (files[0], files[-1])
    )
    assert old == new


def test_exported_models_open() -> None:
    assert isinstance(SegmentModel.from_pretrained(OLD / "answerer"), RMTEncoder)
    assert isinstance(SegmentModel.from_pretrained(OLD / "transformer_xl"), TransformerXL)
    assert isinstance(SegmentModel.from_pretrained(OLD / "decoder-model"), RMTDecoder)
    assert isinstance(SegmentModel.from_pretrained(OLD / "lstm-model"), LSTM)
    assert Answerer.from_pretrained(OLD / "answerer")(["Mary went to the garden. Where is Mary?"])[0]


def test_exported_models_are_saved_as_those_of_today(tmp_path: Path) -> None:
    opened = Answerer.from_pretrained(OLD / "answerer")
    shutil.copytree(OLD / "answerer", tmp_path / "in place")
    for place in ("in place", "new"):
        opened.save_pretrained(tmp_path / place)
    files = [{path.relative_to(place) for path in place.rglob("*")} for place in tmp_path.iterdir()]
    assert files[0] == files[1]
    text = "Mary went to the garden. Where is Mary?"
    assert torch.equal(Answerer.from_pretrained(tmp_path / "in place").scores(text), opened.scores(text))


def test_runs_are_reported() -> None:
    runs, skipped = read_runs([str(OLD / name) for name in ("facts", "hold-whole", "text")])
    assert [run.status for run in runs] == ["interrupted or running", "finished", "interrupted or running"]
    assert not skipped and not any(run.problems for run in runs), [run.problems for run in runs]


def test_classes_have_public_names() -> None:
    for earlier, now in (
        ("rmt_lightning.models.lstm.LSTM", "rmt_lightning.LSTM"),
        ("rmt_lightning.training.carried_states.CarriedStates", "rmt_lightning.StatePassing"),
        ("rmt_lightning.RMTEncoder", "rmt_lightning.RMTEncoder"),
        ("lightning.Trainer", "rmt_lightning.RunTrainer"),
        ("my.package.LSTM", "my.package.LSTM"),
        ("rmt_lightning.absent.Thing", "rmt_lightning.absent.Thing"),
    ):
        assert public_name(earlier) == now
    for path in OLD.glob("*/config.json"):
        assert public_name(json.loads(path.read_text())["model"]).count(".") == 1
