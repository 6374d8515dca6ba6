"""What the README and the pages of docs/ say is true."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, SMALL, Run

import rmt_lightning
from rmt_lightning.tasks.facts import PLACES

README = (ROOT / "README.md").read_text()
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
BLOCKS = [block for page in PAGES for block in re.findall(r"```(\w+)\n(.*?)```", page.read_text(), flags=re.DOTALL)]
PROGRAMS = [block for kind, block in BLOCKS if kind == "python"]
# A program that trains becomes one of seconds.
SMALLER = {
    "steps=1500": "steps=25, when_stuck='continue'",
    "documents=200": "documents=30",
    "(placement, test": "(placement, batch_size=4, validation_samples=16, test_samples=8, test",
    "steps=100)": "steps=25, when_stuck='continue')",
    "L.Trainer(": "L.Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, ",
}
# A backslash at its end continues a line.
LINES = [line for kind, block in BLOCKS if kind == "sh" for line in block.replace("\\\n", " ").splitlines()]
SHELL = [line.split("  #")[0].strip() for line in LINES]
COMMANDS = [*dict.fromkeys(line for line in SHELL if line.startswith("python -m rmt_lightning"))]


@pytest.mark.parametrize(
    "program", [program for program in PROGRAMS if "L.Trainer" in program], ids=["README", "1", "2"]
)
def test_programs_that_train(
    program: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RMT_LIGHTNING_CACHE", str(cache))
    for large, small in SMALLER.items():
        program = program.replace(large, small)
    exec(program, {})
    last = capsys.readouterr().out.splitlines()[-1]
    assert (tmp_path / "mary" / "head.safetensors").exists() or last.strip("[']") in {*PLACES, "Ada", "Bo"}, last


@pytest.mark.parametrize("name", ["train-and-ask", "compare-memories"])
def test_notebooks(name: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From top to bottom; what they draw is there already, for those who only read them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RMT_LIGHTNING_CACHE", str(cache))
    cells = json.loads((ROOT / "docs" / "notebooks" / f"{name}.ipynb").read_text())["cells"]
    programs = [cell for cell in cells if cell["cell_type"] == "code"]
    outputs = [output for cell in programs for output in cell["outputs"]]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 1
    # What it ran into would stand there too: a warning, an error.
    assert {output["output_type"] for output in outputs} == {"stream", "execute_result"}
    assert {output.get("name", "stdout") for output in outputs} == {"stdout"}
    known: dict[str, Any] = {}
    shown = [run_cell("".join(cell["source"]), known) for cell in programs]
    (figure,) = [value for value in shown if hasattr(value, "_repr_png_")]
    assert figure._repr_png_().startswith(b"\x89PNG")
    # A fact of two segments has been learnt.
    learnt = known["accuracy"][2] if name == "train-and-ask" else known["accuracies"]["RMTEncoder"][1]
    assert learnt > 0.8


def run_cell(program: str, known: dict[str, Any]) -> Any:
    """What Jupyter would show of a cell: the value of its last line, if that is one."""
    *before, last = ast.parse(program).body
    if not isinstance(last, ast.Expr):
        return exec(program, known)
    exec(compile(ast.Module(before, []), "cell", "exec"), known)
    return eval(compile(ast.Expression(last.value), "cell", "eval"), known)


def test_the_model_by_itself(capsys: pytest.CaptureFixture[str]) -> None:
    # The others are run in test_export.py, test_ask.py and below.
    (program,) = [program for program in PROGRAMS if "hidden[:, 0]" in program]
    exec(program, {})
    assert capsys.readouterr().out == "torch.Size([2, 64]) torch.Size([2, 10, 64])\n"


def test_a_task_of_ones_own(train: Run, tmp_path: Path) -> None:
    (program,) = [program for program in PROGRAMS if "class Colors" in program]
    (content,) = [block for kind, block in BLOCKS if kind == "yaml" and "Colors" in block]
    (line,) = [line for line in COMMANDS if "task=colors" in line]
    (tmp_path / "colors.py").write_text(program)
    (tmp_path / "mine" / "task").mkdir(parents=True)
    (tmp_path / "mine" / "task" / "colors.yaml").write_text(content)
    result = train(*shlex.split(line)[3:], "curriculum.max_segments=1", "test.segments=[1]", "trainer.max_steps=3")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Test on unseen text, 8 samples each" in result.stdout


# These need a run, are no Hydra commands, or stand in the tutorial, which is run as a whole.
ELSEWHERE = ("resume=", "2026", "dashboard", "--config-dir", "my.jsonl", "checkpoint=mine", "model=keys")


@pytest.mark.parametrize("line", [line for line in COMMANDS if not any(word in line for word in ELSEWHERE)])
def test_commands(line: str, command: Run) -> None:
    _, _, module, *words = shlex.split(line)
    settings = [word if word.endswith("]") else word.split(",")[0] for word in words if word != "--multirun"]
    result = command(module, *settings, "--cfg", "job")
    assert result.returncode == 0, result.stderr


def test_the_tutorial(command: Run, tmp_path: Path) -> None:
    """From rows like those of the README to a model that is asked."""
    (example,) = [block.splitlines() for kind, block in BLOCKS if kind == "json"]
    like = [example[number % 2] for number in range(24)]
    rows = [line.replace("late", f"{number} past") for number, line in enumerate(like)]
    (tmp_path / "my.jsonl").write_text("\n".join(rows))
    (tmp_path / "letter.txt").write_text("Ada has the red key. It is late. " * 10)
    train, *others = [shlex.split(line)[2:] for line in COMMANDS if any(word in line for word in ELSEWHERE[4:])]
    small = [word for word in SMALL if word.partition("=")[0] not in {"test.segments", "curriculum.max_segments"}]
    result = command(*train, *small, "test.segments=[1]")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "task=qa: 20 questions for training; 2 for validation, a tenth of task.path; 2 for test" in result.stdout
    told = [json.loads(line) for line in (tmp_path / "mine" / "predictions.jsonl").read_text().splitlines()]
    assert len(told) == 2 and {row["target"] for row in told} <= {"Ada", "Bo"}
    said = []
    for module, *settings in others:
        quick = ["tokens=[0,1k]", "follow=0", "device=cpu"] if module.endswith("evaluate") else []
        given = [word for word in settings if not (quick and word.startswith("tokens="))]
        said.append(command(module, *given, *quick).stdout)
    assert "Test on unseen text, 2 samples each" in said[0]
    assert re.search(r"Who has the red key\? → (Ada|Bo) \(\d+\.\d%\)", said[2])


def test_make_targets(tmp_path: Path) -> None:
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    targets = {command.split()[1] for command in re.findall(r"make \w+", "".join(page.read_text() for page in PAGES))}
    assert {"train", "test", "install"} <= targets
    for target in targets:
        assert f"make {target} " in listed
        subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, check=True)
    arguments = subprocess.run(
        ["make", "--dry-run", "train", "ARGS=task=reasoning curriculum.max_segments=3"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert "-m rmt_lightning.train task=reasoning curriculum.max_segments=3" in arguments
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_the_workflow_tests_every_python_that_is_promised() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    promised = [name.rsplit(" ", 1)[1] for name in project["classifiers"] if ":: Python :: 3." in name]
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())["jobs"]
    assert jobs["test"]["strategy"]["matrix"]["python"] == promised
    assert [job["steps"][-1]["run"] for job in jobs.values()] == ["make test", "make lowest"]


def test_the_lowest_versions_are_those_that_are_promised(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    subprocess.run(["make", "-s", ".venv-lowest/pins.txt"], cwd=tmp_path, check=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bounded = chain(project["dependencies"], *project["optional-dependencies"].values())
    lowest = [re.sub(r"\[.*\]|,.*", "", line).replace(">=", "==") for line in bounded if ">=" in line]
    pins = (tmp_path / ".venv-lowest" / "pins.txt").read_text().splitlines()
    assert set(lowest) < set(pins)


def test_the_group_table_lists_every_choice() -> None:
    page = (ROOT / "docs" / "settings.md").read_text()
    table = {row[1]: row[0] for row in re.findall(r"^(\| `([\w.]+)=` .*)$", page, flags=re.MULTILINE)}
    groups = {folder.name: folder for folder in (ROOT / "conf").iterdir() if folder.is_dir()}
    assert table.keys() == groups.keys()
    for name, folder in groups.items():
        for choice in folder.glob("*.yaml"):
            assert f"`{choice.stem}`" in table[name], f"{name}={choice.stem}"


def test_links_lead_somewhere_in_the_repository_too() -> None:
    docs = ROOT / "docs"
    for page in (*ROOT.glob("*.md"), *docs.glob("*.md"), *docs.glob("notebooks/*.ipynb")):
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
            assert target.startswith("https://") or (page.parent / target).exists(), f"{page}: {target}"


def test_the_site(tmp_path: Path) -> None:
    """It is built without a network, and without a link that leads nowhere; every setting and public name is in it."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    offline = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    environment = os.environ | offline | {"NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0 and not result.stderr, result.stderr
    settings, names = ((tmp_path / name / "index.html").read_text() for name in ("settings", "api"))
    for choice in (ROOT / "conf").glob("*/*.yaml"):
        assert f"{choice.parent.name}={choice.stem}" in settings
    assert "whole number ≥ 1 and ≤ 4096" in settings and "+accumulate_grad_batches" in settings
    assert "+phases" not in settings and "+test_segments" not in settings
    for name in set(dir(rmt_lightning)) - {"__version__"}:
        assert f".{name}" in names, name
    assert not re.search(
        r'(?:src|href)="https?://(?!arxiv|docs|pytorch|lightning|hydra|www\.sphinx|squidfunk)', settings
    )


def test_the_tree_in_contributing_is_complete() -> None:
    tree = (ROOT / "CONTRIBUTING.md").read_text().split("```")[1]
    told = set(re.findall(r"(\w+\.py)", tree)) - {"reference.py", "pages.py"}
    assert told == {path.name for path in (ROOT / "rmt_lightning").rglob("*.py")}
