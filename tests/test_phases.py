"""What a run goes through: a phase from outside the package, and runs that are resumed with other settings."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from conftest import SMALL, Run, assert_identical, final

HELD = ("hold=state_passing", "hold.steps=6", "hold.pool=8")


def phases(folder: Path) -> list[dict]:
    return json.loads((folder / "phases.json").read_text())


# A third phase is two files: a class and a yaml.

COOLDOWN = '''
"""The last steps, at a constant small learning rate."""

from rmt_lightning import Phase, WarmupDecay
from rmt_lightning.training.phases.phase import Progress


class Cooldown(Phase):
    name, title, table = "cooldown", "Cooldown", "cooldown.csv"

    def __init__(self, steps: int, lr: float) -> None:
        self.steps, self.lr = steps, lr
        self.accuracy = []

    def prepare(self, module, data, before):
        self.before, self.num_segments = before, before.longest

    def training_keys(self, data, batch):
        return self.before.training_keys(data, batch)

    def validation_keys(self, data):
        return self.before.validation_keys(data)

    def optimization(self, default):
        return WarmupDecay(10**6, self.lr, warmup=0), 1

    @property
    def finished(self):
        return bool(self.accuracy) and self.accuracy[-1][0] - self.first_step >= self.steps

    def validate(self, step, metrics, total):
        self.accuracy.append((step, float(metrics["val/accuracy"])))
        return "end" if self.finished else "go on"

    def progress(self, step, metrics):
        return Progress(self.title, step - self.first_step, self.steps)

    def rows(self):
        return [{"step": step, "accuracy": accuracy} for step, accuracy in self.accuracy]

    def state_dict(self):
        return {"first_step": self.first_step, "accuracy": self.accuracy}

    def load_state_dict(self, state):
        self.first_step, self.accuracy = state["first_step"], state["accuracy"]
'''


@pytest.fixture
def with_cooldown(tmp_path: Path, environment: dict[str, str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """The command of a user who has written a phase."""
    (tmp_path / "mine" / "cooldown").mkdir(parents=True)
    (tmp_path / "mine" / "cooldown" / "short.yaml").write_text("_target_: cooldown.Cooldown\nsteps: 6\nlr: 1e-5\n")
    (tmp_path / "cooldown.py").write_text(COOLDOWN)

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "rmt_lightning.train", *words]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)

    return run


def test_a_third_phase_is_two_files(
    with_cooldown: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    typed = ("--config-dir=mine", *SMALL, *HELD, "+cooldown=short")
    result = with_cooldown(*typed, "hydra.run.dir=run", "trainer.max_steps=25")
    assert result.returncode == 0, result.stdout + result.stderr
    assert [phase["name"] for phase in phases(tmp_path / "run")] == ["curriculum", "state_passing", "cooldown"]
    resumed = with_cooldown("resume=run", "trainer.max_steps=-1")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "Cooldown" in resumed.stdout
    assert [(phase["first_step"], phase["steps"], phase["finished"]) for phase in phases(tmp_path / "run")] == [
        (0, 18, True), (18, 6, True), (24, 6, True),
    ]  # fmt: skip
    with (tmp_path / "run" / "cooldown.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["27", "30"]
    whole = with_cooldown(*typed, "hydra.run.dir=whole")
    assert whole.returncode == 0, whole.stderr
    assert_identical(final(tmp_path / "whole"), final(tmp_path / "run"))
    wrong = with_cooldown("--config-dir=mine", *SMALL, "+cooldown=short", "cooldown.steps=x", "hydra.run.dir=wrong")
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: cooldown.steps=x: must be a valid integer")


def test_what_is_no_part_of_a_run_is_refused(train: Run) -> None:
    result = train("+fases.steps=3")
    assert result.returncode == 2 and result.stderr.startswith("error: fases: is no part of a run"), result.stderr


def test_a_metric_is_a_setting(train: Run, tmp_path: Path) -> None:
    f1 = ("+metrics.f1._target_=torchmetrics.classification.MulticlassF1Score", "+metrics.f1.num_classes=6")
    result = train(*f1, "hydra.run.dir=run", "curriculum.max_segments=1")
    assert result.returncode == 0, result.stderr
    with (tmp_path / "run" / "metrics" / "version_0" / "metrics.csv").open() as file:
        logged = [row for row in csv.DictReader(file) if row["val/f1"]]
    assert len(logged) == 2 and all(float(row["val/loss"]) > 0 for row in logged)
    wrong = train(*f1[:1], "+metrics.f1.num_clases=6")
    missing = "error: metrics.f1: MulticlassF1Score.__init__() missing 1 required positional argument: 'num_classes'"
    assert wrong.returncode == 2 and wrong.stderr.startswith(missing) and wrong.stderr.count("\n") == 1, wrong.stderr


# Faults of version 0.1, which are seen there by these tests.


SLOW = pytest.mark.soak


@pytest.mark.parametrize(
    "model",
    ["lstm", "rmt_transformer_xl", pytest.param("ntm", marks=SLOW), pytest.param("memory_network", marks=SLOW)],
)
def test_states_that_are_trees_are_passed_on_and_saved(model: str, train: Run, tmp_path: Path) -> None:
    settings = (f"model={model}", *HELD, "data.segment_length=48")
    assert train(*settings, "hydra.run.dir=whole").returncode == 0
    assert train(*settings, "hydra.run.dir=run", "trainer.max_steps=22").returncode == 0
    resumed = train("resume=run", "trainer.max_steps=-1", small=False)
    assert resumed.returncode == 0, resumed.stderr
    assert_identical(final(tmp_path / "whole"), final(tmp_path / "run"))


def test_exact_lengths_are_of_the_curriculum_alone(train: Run, tmp_path: Path) -> None:
    settings = (*HELD, "curriculum.lengths=exact")
    assert train(*settings, "hydra.run.dir=whole").returncode == 0
    assert train(*settings, "hydra.run.dir=run", "trainer.max_steps=22").returncode == 0
    assert train("resume=run", "trainer.max_steps=-1", small=False).returncode == 0
    assert_identical(final(tmp_path / "whole"), final(tmp_path / "run"))


RATES = """
import json
from rmt_lightning.training.module import SegmentModule
from rmt_lightning.train import run

rates = []
original = SegmentModule.on_train_batch_start

def record(self, *given):
    rates.append((self.global_step, self.optimizers().param_groups[0]["lr"],
                  self.optimizers().param_groups[0]["weight_decay"]))
    return original(self, *given)

SegmentModule.on_train_batch_start = record
try:
    run()
finally:
    json.dump(rates, open("rates.json", "w"))
"""


def rates(folder: Path) -> list[list[float]]:
    return json.loads((folder / "rates.json").read_text())


def test_a_larger_budget_gives_the_learning_rate_of_a_larger_budget(train: Run, tmp_path: Path) -> None:
    stuck = ("curriculum.when_stuck=stop", "curriculum.max_segments=1", "optim.warmup=0")
    assert train(*stuck, "hydra.run.dir=run").returncode == 1
    assert train("resume=run", "curriculum.steps=12", small=False, driver=RATES).returncode == 1
    found = rates(tmp_path)
    assert [step for step, *_ in found] == list(range(6, 12))
    assert [rate for _, rate, _ in found] == pytest.approx([1e-3 * (12 - step) / 12 for step in range(6, 12)])
    text = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert text["optim"]["steps"] == text["curriculum"]["steps"] == 12


def test_what_is_typed_on_resuming_takes_effect(train: Run, tmp_path: Path) -> None:
    assert train("hydra.run.dir=run", "trainer.max_steps=4", "optim.warmup=0").returncode == 0
    typed = ("trainer.max_steps=6", "optim.lr=0.5", "optim.weight_decay=0.25")
    assert train("resume=run", *typed, small=False, driver=RATES).returncode == 0
    assert rates(tmp_path) == [[4, pytest.approx(0.5 * 2 / 6), 0.25], [5, pytest.approx(0.5 * 1 / 6), 0.25]]


def test_settings_are_checked_against_the_choices_of_the_run(train: Run, tmp_path: Path) -> None:
    text = (
        "task=language_modeling", "model.width=8", "model.layers=1", "model.heads=2", "noise.documents=20",
        "backbone.vocabulary_size=600", "data.segment_length=20", "data.steps_per_epoch=2", "curriculum.steps=2",
        "data.validation_documents=1", "test.documents=2",
    )  # fmt: skip
    assert train(*text, "hydra.run.dir=run", small=False).returncode == 0
    again = train("resume=run", "test.documents=1", small=False)
    assert again.returncode == 0, again.stderr
    with (tmp_path / "run" / "documents.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 1
    before = {path: path.read_bytes() for path in (tmp_path / "run").glob("*.*") if path.suffix != ".log"}
    for typed, message in (
        ("test.documnts=1", "test.documnts: no such setting; did you mean documents?"),
        ("data.segment_length=24", "data.segment_length=24: a resumed run keeps its data.segment_length"),
        (
            "model.width=16",
            "model.width=16: a resumed run keeps its model (model.width=8); start a new run to change it",
        ),
        ("backbone=tiny_gpt", "backbone=tiny_gpt: a resumed run keeps its backbone"),
        ("task=detect", "task=detect: a resumed run keeps its task"),
        ("experiment=tiny_carried", "experiment=tiny_carried: a resumed run keeps its experiment; leave it out"),
        ("model=lstm", "model=lstm: a resumed run keeps its model; leave it out, or start a new run"),
    ):
        refused = train("resume=run", typed, small=False)
        assert refused.returncode == 2 and refused.stderr.startswith(f"error: {message}"), (typed, refused.stderr)
        assert refused.stderr.count("\n") == 1
    assert {path: path.read_bytes() for path in before} == before


def test_steps_that_share_an_optimizer_step_draw_other_numbers(train: Run, tmp_path: Path) -> None:
    driver = """
import json, torch
from rmt_lightning.training.module import SegmentModule
from rmt_lightning.train import run

seeds = []
original = SegmentModule.on_train_batch_start

def record(self, *given):
    original(self, *given)
    seeds.append(torch.initial_seed())

SegmentModule.on_train_batch_start = record
run()
json.dump(seeds, open("seeds.json", "w"))
"""
    result = train("+trainer.accumulate_grad_batches=2", "curriculum.max_segments=1", driver=driver)
    assert result.returncode == 0, result.stderr
    seeds = json.loads((tmp_path / "seeds.json").read_text())
    assert len(seeds) == len(set(seeds)) > 6


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("optim.steps=[]", "optim.steps=[]: "),
        ("data.batch_size=1 hold=state_passing", "data.batch_size=1: hold=state_passing shares a batch between old me"),
        ("model=full_attention hold=state_passing", "hold=state_passing: this model has no memory to hold; leave it o"),
        ("~metrics.accuracy", "metrics.accuracy: phases decide by it; leave it in"),
    ],
)  # fmt: skip
def test_one_line(typed: str, message: str, train: Run, tmp_path: Path) -> None:
    result = train(*typed.split(), "backbone.max_positions=256", "hydra.run.dir=run")
    assert result.returncode == 2 and result.stderr.startswith(f"error: {message}"), result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_what_was_typed_stays_beside_the_config(train: Run, tmp_path: Path) -> None:
    assert train("hydra.run.dir=run", "trainer.max_steps=2", "+trainer.min_steps=2").returncode == 0
    typed = yaml.safe_load((tmp_path / "run" / "overrides.yaml").read_text())
    assert typed == [*SMALL, "trainer.max_steps=2", "+trainer.min_steps=2"]
    assert train("resume=run", "trainer.max_steps=4", "trainer.min_steps=3", small=False).returncode == 0
    typed = yaml.safe_load((tmp_path / "run" / "overrides.yaml").read_text())
    assert typed == [*SMALL, "trainer.max_steps=4", "+trainer.min_steps=3"]
    assert torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 4
