"""Who may import whom (see CONTRIBUTING.md)."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import rmt_lightning
from rmt_lightning import __main__
from rmt_lightning.core.errors import UserError

PACKAGE = Path(__file__).parent.parent / "rmt_lightning"
# Each room, and the others that it may import. The front doors stand at the top, and may import all of them.
ROOMS = {
    "core": set(),
    "tasks": {"core"},
    "models": {"core"},
    "training": {"core", "tasks", "models"},
    "analysis": {"core", "tasks", "models"},
    "reporting": {"core"},
    "app": {"core", "tasks", "models", "training", "analysis", "reporting"},
}
DOORS = {"train", "evaluate", "attend", "flops", "export", "ask", "plot", "report", "dashboard", "lm_eval"}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if "conf" not in path.parts)


def imports(path: Path) -> set[str]:
    """What a file imports when it runs, not for its annotations alone."""
    names = set()
    tree = ast.parse(path.read_text())
    for_types = [node for node in tree.body if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)]
    tree.body = [node for node in tree.body if node not in for_types]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_rooms(path: Path) -> None:
    room = path.relative_to(PACKAGE).parts[0]
    used = imports(path)
    libraries = {name.split(".")[0] for name in used}
    rooms = {name.split(".")[1] for name in used if name.startswith("rmt_lightning.")}
    if room in ROOMS:
        assert rooms & {*ROOMS, *DOORS} <= ROOMS[room] | {room}
        assert room == "app" or not libraries & {"hydra", "omegaconf"}
        assert room != "reporting" or not libraries & {"torch", "lightning", "transformers"}


def test_every_room_and_door_is_known() -> None:
    assert {path.name for path in PACKAGE.iterdir() if path.is_dir()} - {"__pycache__", "conf"} == ROOMS.keys()
    assert {path.stem for path in PACKAGE.glob("*.py")} == {"__init__", "__main__"} | DOORS


def test_the_first_door_tells_all_others(capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.DOORS.keys() == DOORS
    __main__.main([])
    told = capsys.readouterr().out
    assert all(f"python -m rmt_lightning.{door} " in told for door in DOORS)
    with pytest.raises(SystemExit):
        __main__.main(["--version"])
    assert capsys.readouterr().out == f"rmt_lightning {rmt_lightning.__version__}\n"
    with pytest.raises(UserError, match="unrecognized arguments: trian; see --help"):
        __main__.main(["trian"])


def test_states_are_taken_apart_in_one_place() -> None:
    assert [path.name for path in FILES if any("pytree" in name for name in imports(path))] == ["state.py"]
