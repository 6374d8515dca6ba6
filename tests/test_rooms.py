"""Who may import whom (see CONTRIBUTING.md)."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "rmt_lightning"
ROOMS = {"tasks", "models", "training", "analysis"}
MAY_IMPORT = {
    "tasks": {"tasks"},
    "models": {"models"},
    "training": {"training", "tasks", "models"},
    "analysis": {"analysis", "tasks", "models"},
}
# The front doors and what they share; nothing else knows Hydra.
DOORS = {"train.py", "evaluate.py", "attend.py", "export.py", "flops.py", "config.py", "build.py", "sweep.py"}
FILES = sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_rooms(path: Path) -> None:
    room = path.relative_to(PACKAGE).parts[0]
    used = imports(path)
    if room in ROOMS:
        rooms = {name.split(".")[1] for name in used if name.startswith("rmt_lightning.")}
        assert rooms - {"errors", "run_folder"} <= MAY_IMPORT[room]
    if room not in DOORS:
        assert not {name.split(".")[0] for name in used} & {"hydra", "omegaconf"}


@pytest.mark.parametrize("name", ["figures", "runs", "sweeps", "plots", "page", "redaction"])
def test_pictures_and_pages_know_no_model(name: str) -> None:
    used = imports(PACKAGE / "analysis" / f"{name}.py")
    assert not any("models" in name or name.startswith("torch") for name in used)


def test_every_room_is_known() -> None:
    assert {path.name for path in PACKAGE.iterdir() if path.is_dir()} - {"__pycache__", "conf"} == ROOMS
