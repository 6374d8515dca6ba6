"""What people add: a class and a yaml, from outside the package. An update is in test_updates.py, a phase in
test_phases.py.
"""

from __future__ import annotations

import csv
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import SMALL, Run

HELD = ("hold=state_passing", "hold.steps=3", "hold.pool=8", "hold.until_rate=1")
Own = Callable[..., "subprocess.CompletedProcess[str]"]

MODULE = '''
"""A task, a noise, a model and a metric."""

import torch
from torch import nn
from torchmetrics import Metric

from rmt_lightning import SegmentModel
from rmt_lightning.tasks.facts import Example


class Colors:
    """What color is the door?"""

    name, where = "colors", "anywhere"
    answers = ("red", "green", "dark blue")

    def draw(self, rng, split):
        color = self.answers[rng.integers(3)]
        return Example((f"The door is {color}.",), "What color is the door?", color, support=(0,))

    def sentences(self):
        yield "What color is the door?"
        yield from (f"The door is {color}." for color in self.answers)


class Rain:
    """Nothing but rain."""

    def __init__(self, days: int = 50):
        self.days = days

    def documents(self, split):
        yield from ([f"It rained on {split} day {day}." for _ in range(9)] for day in range(self.days))

    def fingerprint(self):
        return f"rain-{self.days}"


class Bag(SegmentModel):
    """A running mean of word embeddings."""

    def __init__(self, tokenizer, segment_length: int, width: int = 8):
        super().__init__(segment_length, width)
        self.tokenizer = tokenizer
        self.words = nn.Embedding(len(tokenizer), width)

    def initial_state(self, batch_size):
        return self.words.weight.new_zeros(batch_size, self.width)

    def read_segment(self, segment, state):
        hidden = self.words(segment.input_ids) + state[:, None]
        return hidden, hidden.mean(dim=1)


class Wrong(Metric):
    """How many answers were wrong."""

    def __init__(self):
        super().__init__()
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, right):
        self.count += (~right).sum()

    def compute(self):
        return self.count
'''


@pytest.fixture
def own(tmp_path: Path, command: Run) -> Own:
    """A front door for a user who has written a module and four yamls."""
    yamls = {"task/colors": "Colors", "noise/rain": "Rain\ndays: 60", "model/bag": "Bag\nsegment_length: 40\nwidth: 16"}
    for name, target in yamls.items():
        path = tmp_path / "mine" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"_target_: mine.{target}\n")
    (tmp_path / "mine" / "metrics").mkdir()
    metric = "defaults: [answers, _self_]\nwrong:\n  _target_: mine.Wrong\n"
    (tmp_path / "mine" / "metrics" / "errors.yaml").write_text(metric)
    (tmp_path / "mine.py").write_text(MODULE)
    return lambda door, *words: command(f"rmt_lightning.{door}", *words)


def test_a_task_a_noise_a_model_and_a_metric_are_two_files_each(own: Own, tmp_path: Path) -> None:
    small = [word for word in SMALL if not word.startswith("noise.")]
    typed = (
        "--config-dir=mine",
        *small,
        "task=colors",
        "noise=rain",
        "model=bag",
        "metrics=errors",
        "hold=state_passing",
        "hold.steps=3",
        "hold.until_rate=1",
    )
    result = own("train", *typed, "hydra.run.dir=run", "trainer.max_steps=19")
    assert result.returncode == 0, result.stdout + result.stderr
    # It is resumed without naming the folder again, asked and exported as any other run, once the module is trusted.
    unknown = own("train", "resume=run", "trainer.max_steps=-1")
    assert unknown.returncode == 2 and unknown.stderr.endswith("; if it is yours, add trust=mine\n"), unknown.stderr
    resumed = own("train", "resume=run", "trainer.max_steps=-1", "trust=mine")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    asked = ("segments=[1,3]", "samples=4", "follow=16", "device=cpu")
    evaluated = own("evaluate", "checkpoint=run", *asked, "trust=mine")
    assert evaluated.returncode == 0, evaluated.stderr
    exported = own("export", "checkpoint=run", "folder=bag", "trust=mine")
    assert exported.returncode == 0, exported.stderr
    with (tmp_path / "run" / "evaluation.csv").open() as file:
        assert [row["segments"] for row in csv.DictReader(file)] == ["1", "4"]
    with (tmp_path / "run" / "metrics" / "version_0" / "metrics.csv").open() as file:
        asked = [row for row in csv.DictReader(file) if row["val/accuracy"]]
    assert asked and all(row["val/wrong"] for row in asked)
    for word, message in (
        ("model.width=x", "model.width=x: must be a valid integer"),
        ("noise.dayz=3", "noise.dayz: no such setting; did you mean days?"),
        ("task=colours", "task=colours: no such choice; did you mean colors?"),
    ):
        wrong = own("train", *typed, word, "hydra.run.dir=wrong")
        assert wrong.returncode == 2 and wrong.stderr.startswith(f"error: {message}"), wrong.stderr


@pytest.mark.soak
def test_a_sweep_trusts_what_was_typed_for_it(own: Own, tmp_path: Path) -> None:
    small = [word for word in SMALL if not word.startswith("noise.")]
    typed = (
        "--config-dir=mine",
        "-m",
        *small,
        "task=colors",
        "metrics=errors",
        "noise=rain",
    )
    words = (*typed, "trainer.max_steps=6", "seed=1,2")
    swept = own("train", *words)
    assert swept.returncode == 0, swept.stdout + swept.stderr
    again = own("train", *words)
    assert again.returncode == 0 and again.stdout.count("done before") == 2, again.stdout + again.stderr
