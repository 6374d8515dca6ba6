"""The folders of results: what their scripts would run can be composed, what they found is there and can be drawn."""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
import pytest
from conftest import ROOT
from hydra.core.global_hydra import GlobalHydra

from rmt_lightning.app.schema import CONF
from rmt_lightning.core.files import read_csv
from rmt_lightning.reporting.style import save, styled

EXPERIMENTS = ROOT / "experiments"
# What is to be run on a GPU, and holds no results.
KIT = EXPERIMENTS / "gpu" / "README.md"
READMES = sorted(page for page in EXPERIMENTS.glob("*/README.md") if page != KIT)
PAGES = [*READMES, KIT, EXPERIMENTS / "README.md", EXPERIMENTS / "LOG.md"]
COMPARISON = runpy.run_path(str(EXPERIMENTS / "models_on_detect" / "run.py"))


def figure_of(folder: str) -> dict[str, Any]:
    return runpy.run_path(str(EXPERIMENTS / folder / "figure.py"))


def links(page: Path) -> set[Path]:
    """The files of this repository that a page links to or shows."""
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())
    return {(page.parent / target).resolve() for target in targets if "://" not in target}


def test_eleven_folders_each_with_what_it_claims() -> None:
    assert len(READMES) == 13
    for readme in READMES:
        assert len(readme.read_text().splitlines()) <= 60, readme
        missing = {"results.csv", "figure.png", "figure.pdf", "figure.py"} - {
            path.name for path in readme.parent.iterdir()
        }
        assert not missing, f"{readme.parent.name}: {missing}"
    others = {path.name for path in EXPERIMENTS.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert others - {readme.parent.name for readme in READMES} == {"log", KIT.parent.name}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(EXPERIMENTS).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    missing = [str(target) for target in links(page) if not target.exists()]
    assert not missing


def test_nothing_is_kept_that_no_page_links_to() -> None:
    linked = set.union(*map(links, PAGES))
    assert [path for path in EXPERIMENTS.rglob("*.csv") if path.resolve() not in linked] == []
    assert list(EXPERIMENTS.rglob("*.diff")) == []


def test_every_entry_of_the_log_is_in_a_csv() -> None:
    entries = {row["entry"] for path in (EXPERIMENTS / "log").glob("*.csv") for row in read_csv(path) if "entry" in row}
    told = set(
        re.findall(r"`((?:carried|hold|prose|reasoning|stories)_\w[\w-]*)`", (EXPERIMENTS / "LOG.md").read_text())
    )
    assert told and told <= entries


@pytest.mark.soak
def test_all_figures_can_be_drawn_again(environment: dict[str, str], tmp_path: Path) -> None:
    shutil.copytree(EXPERIMENTS, tmp_path / "experiments")
    drawn = list((tmp_path / "experiments").glob("*/figure.p[nd][gf]"))
    assert len(drawn) == 2 * len(READMES)
    for path in drawn:
        path.unlink()
    command = [sys.executable, "experiments/figures.py"]
    subprocess.run(command, cwd=tmp_path, env=environment | {"PYTHONPATH": str(ROOT)}, check=True, timeout=120)
    assert all(path.stat().st_size > 0 for path in drawn)
    # The same bytes whenever it is drawn, so that version control sees no change.
    folder = tmp_path / "experiments" / "language_modeling"
    with styled():
        (again,) = figure_of(folder.name)["figures"](lambda table: read_csv(folder / f"{table}.csv")).values()
        save(again, tmp_path / "again")
    for kind in ("png", "pdf"):
        assert (tmp_path / f"again.{kind}").read_bytes() == (folder / f"figure.{kind}").read_bytes()
    recipe = subprocess.run(["make", "--dry-run", "figures"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert f"python {command[1]}" in recipe.stdout


def test_figures_hold_fonts_that_publishers_take() -> None:
    """Type 42, which is TrueType, and none of the Type 3 that matplotlib writes by itself."""
    figures = list(EXPERIMENTS.rglob("*.pdf"))
    assert len(figures) > len(READMES)
    for path in figures:
        content = path.read_bytes()
        assert b"/FontFile2" in content and b"/Type3" not in content, path


@pytest.mark.parametrize("name", COMPARISON["MODELS"])
def test_every_compared_model_can_be_composed(name: str) -> None:
    settings = COMPARISON["MODELS"][name].split()
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        config = hydra.compose("train", [*COMPARISON["TRAIN"], *settings])
        hydra.compose("evaluate", [*COMPARISON["EVALUATE"]])
    GlobalHydra.instance().clear()
    assert config.curriculum.max_segments == COMPARISON["TRAINED_TO"]


def test_what_the_kit_for_a_gpu_trains_can_be_composed() -> None:
    script = KIT.with_name("run.sh").read_text()
    subprocess.run(["bash", "-n", KIT.with_name("run.sh")], check=True)
    preset, tiny = (shlex.split(words) for words in re.findall(r"preset\+?=\((.*?)\n *\)", script, flags=re.DOTALL))
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        config = hydra.compose("train", [*preset, *tiny])
    GlobalHydra.instance().clear()
    assert config.hold.steps == 4 and config.noise._target_ == "rmt_lightning.Files"


def test_models_side_by_side() -> None:
    rows = [
        {"model": model, "trained_to": 2, "segments": segments, "accuracy": 0.75}
        for model, lengths in {"stops": (1, 2), "goes on": (1, 2, 4)}.items()
        for segments in lengths
    ]
    (axes,) = figure_of("models_on_detect")["models"](rows).axes
    marked = [line for line in axes.lines if line.get_marker() == "x"]
    assert [line.get_xydata().tolist() for line in marked] == [[[2, 0.75]]]


def test_the_cost_of_attention_is_drawn_from_its_csv() -> None:
    rows = read_csv(EXPERIMENTS / "cost" / "measured.csv")
    cost: Callable[..., Any] = figure_of("cost")["cost"]
    time, memory = cost(rows).axes
    assert [len(axes.lines) for axes in (time, memory)] == [3, 3]
    own = [(int(row["segments"]), float(row["megabytes"])) for row in rows if row["model"] == "RMT"]
    assert [tuple(point) for point in memory.lines[0].get_xydata()] == own


def test_the_test_of_most_questions_is_drawn() -> None:
    row = {"run": "a", "segments": "64", "low": "0.9", "high": "1"}
    rows = [row | {"samples": "1024", "accuracy": "0.97"}, row | {"samples": "256", "accuracy": "0.98"}]
    (axes,) = figure_of("two_facts")["accuracy"](rows).axes
    assert axes.lines[0].get_ydata().tolist() == [0.97]
