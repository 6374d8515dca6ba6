"""What people add: a class and a yaml, from outside the package. An update is in test_updates.py, a phase in
test_phases.py.
"""

from __future__ import annotations

import csv
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, SMALL, Run

HELD = ("hold=state_passing", "hold.steps=3", "hold.pool=8", "hold.until_rate=1")
Own = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def own(tmp_path: Path, command: Run) -> Own:
    """A front door for a user who begins with a copy of the example."""
    shutil.copytree(ROOT / "examples" / "own_parts", tmp_path, dirs_exist_ok=True)
    return lambda door, *words: command(f"rmt_lightning.{door}", *words)


def test_a_task_a_noise_a_model_and_a_metric_are_two_files_each(own: Own, tmp_path: Path) -> None:
    small = [word for word in SMALL if not word.startswith("noise.")]
    typed = (
        "--config-dir=conf",
        *small,
        "task=colors",
        "noise=rain",
        "model=bag",
        "metrics=errors",
        "callbacks=count",
        "hold=state_passing",
        "hold.steps=3",
        "hold.until_rate=1",
    )
    result = own("train", *typed, "hydra.run.dir=run", "trainer.max_steps=19")
    assert result.returncode == 0, result.stdout + result.stderr
    # It is resumed without naming the folder again, asked and exported as any other run, once the module is trusted.
    unknown = own("train", "resume=run", "trainer.max_steps=-1")
    assert unknown.returncode == 2 and unknown.stderr.endswith("; if it is yours, add trust=parts\n"), unknown.stderr
    resumed = own("train", "resume=run", "trainer.max_steps=-1", "trust=parts")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    # The callback has gone on counting.
    assert "19 batches" in result.stdout and "21 batches" in resumed.stdout
    asked = ("segments=[1,3]", "samples=4", "follow=16", "device=cpu")
    evaluated = own("evaluate", "checkpoint=run", *asked, "trust=parts")
    assert evaluated.returncode == 0, evaluated.stderr
    exported = own("export", "checkpoint=run", "folder=bag", "trust=parts")
    assert exported.returncode == 0, exported.stderr
    with (tmp_path / "run" / "evaluation.csv").open() as file:
        assert [row["segments"] for row in csv.DictReader(file)] == ["1", "4"]
    with (tmp_path / "run" / "metrics" / "version_0" / "metrics.csv").open() as file:
        asked = [row for row in csv.DictReader(file) if row["val/accuracy"]]
    assert asked and all(row["val/wrong"] for row in asked)
    for word, message in (
        ("model.width=x", "model.width=x: must be a valid integer"),
        ("noise.dayz=3", "noise.dayz: no such setting; did you mean days?"),
        ("callbacks.count.wat=x", "callbacks.count.wat: no such setting; did you mean what?"),
        (
            "+callbacks._target_=parts.Count",
            "callbacks._target_: there may be several; give it a name, as in callbacks.m",
        ),
        (
            "+callbacks.x._target_=parts.Colors",
            "callbacks.x._target_=parts.Colors: is nothing for callbacks, for it has",
        ),
        ("task=colours", "task=colours: no such choice; did you mean colors?"),
    ):
        wrong = own("train", *typed, word, "hydra.run.dir=wrong")
        assert wrong.returncode == 2 and wrong.stderr.startswith(f"error: {message}"), wrong.stderr


@pytest.mark.soak
def test_a_sweep_trusts_what_was_typed_for_it(own: Own, tmp_path: Path) -> None:
    small = [word for word in SMALL if not word.startswith("noise.")]
    typed = (
        "--config-dir=conf",
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
