"""The front doors: short, and quick to answer where nothing has to be computed."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from test_rooms import DOORS

# Runs a door as `python -m` does, and tells what slow libraries were imported on the way.
DRIVER = """
import os, runpy, sys

slow = "torch lightning torchmetrics transformers scipy".split()
slow += "wandb wandb_workspaces datasets matplotlib plotly pandas".split()
del sys.argv[0]
try:
    runpy.run_module(f"rmt_lightning.{sys.argv[0]}", run_name="__main__")
finally:
    print(*(name for name in slow if name in sys.modules), file=open("imported", "w"), end="")
    print(os.environ.get("GOMP_SPINCOUNT"), file=open("spins", "w"), end="")
"""


# What lm_eval says is said by the harness.
@pytest.mark.parametrize("door", sorted(DOORS - {"lm_eval"}))
def test_help_and_spelling_mistakes_wait_for_nothing(door: str, environment: dict[str, str], tmp_path: Path) -> None:
    command = [sys.executable, "-c", DRIVER, door]
    mistake = "--outptu=x" if door in ("report", "dashboard") else "modle=x"
    for word, code, said in (("--help", 0, f"python -m rmt_lightning.{door}"), (mistake, 2, "error: ")):
        result = subprocess.run([*command, word], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert result.returncode == code and said in result.stdout + result.stderr, result
        assert (tmp_path / "imported").read_text() == ""
        # Told before torch is imported, which reads it once.
        assert (tmp_path / "spins").read_text() == ("None" if door in ("report", "dashboard") else "1000")


@pytest.mark.parametrize(
    ("word", "needed"),
    [
        ("seed=-1", set()),
        ("noise.documents=x", set()),
        ("optim.lr=-1", set()),
        # What `from rmt_lightning import RMTEncoder` needs; transformers bring scipy.
        pytest.param("model.memory_size=-1", {"torch", "transformers", "scipy"}, marks=pytest.mark.soak),
    ],
)
def test_a_wrong_value_waits_for_its_class_alone(
    word: str, needed: set[str], environment: dict[str, str], tmp_path: Path
) -> None:
    command = [sys.executable, "-c", DRIVER, "train", f"hydra.run.dir={tmp_path / 'run'}", word]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.startswith(f"error: {word}: must be "), result
    assert set((tmp_path / "imported").read_text().split()) <= needed
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("door", sorted(DOORS))
def test_a_door_is_read_in_a_minute(door: str) -> None:
    """At most 60 lines besides what documents them."""
    path = ROOT / "rmt_lightning" / f"{door}.py"
    text = path.read_text()
    documented = {
        number
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        for number in range(node.lineno, (node.end_lineno or 0) + 1)
    }
    lines = [line.strip() for number, line in enumerate(text.splitlines(), 1) if number not in documented]
    assert len([line for line in lines if line and not line.startswith("#")]) <= 60
