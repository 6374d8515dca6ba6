"""What people add: a class and a yaml, from outside the package. An update is in test_updates.py, a phase in
test_phases.py.
"""

from __future__ import annotations

import csv
import importlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, SMALL, Run

from rmt_lightning.app.own_parts import mistake

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


Change = tuple[str, str]
RETURNED = 'return Example((f"The door is {color}.",), "What color is the door?", color, support=(0,))'
READ, MIXED = "return hidden, hidden.mean(dim=1)", "return self.share * written + (1 - self.share) * memory"
TOLD = 'yield [f"It rained on {split} day {day}." for _ in range(9)]'
WRONG: list[tuple[str, Change, str]] = [
    # What it raises is told with its place.
    ("", (RETURNED, "self.nix"), "parts.py:31: Colors.draw: AttributeError: 'Colors' object has no attribute 'nix'; m"),
    ("", ('name = "colors"', "def __init__(self): {}['x']"), "task: parts.py:23: Colors.__init__: KeyError: 'x'; mend"),
    ("", ("rng: np.random.Generator, split", "rng"), "parts.py:28: Colors.draw: TypeError: Colors.draw() takes 2 posi"),
    ("callbacks=count", ("batch_end(self, *_: Any)", "batch_end(self)"), "parts.py:125: Count.on_train_batch_end: T"),
    # What it makes is looked at.
    ("", (RETURNED, "return color"), "task: draw() of a Colors returns a str; let it return an Example"),
    ("", ("support=(0,)", "support=(1,)"), "task: draw() of a Colors gives the support (1,); let it number some of "),
    ("", ('(f"The door is {color}.",)', '"Red."'), "task: draw() of a Colors gives the facts 'Red.'; let them be a "),
    ("", ("rng.integers(len(self.answers))", "next(C)"), "task: draw() of a Colors "),
    ("", ('where = "anywhere"', 'where = "begin"'), "task: of a Colors, where is 'begin'; allowed: start, anywhere,"),
    ("", ('name = "colors"', 'name = "a/b"'), "task: a Colors is named 'a/b'; let its name be a word, for folders "),
    ("", ('("red", "green", "dark blue")', "{'red', 3}"), "task: the answers of a Colors are {"),
    ("", ('yield "What color is the door?"', "yield 3"), "task: sentences() of a Colors makes no texts; let it yield"),
    ("noise=rain", (TOLD, "yield f'{day}'"), "noise: its documents hold '0'; let each be a list of sentences"),
    ("noise=rain", ('return f"rain-{self.days}"', "pass"), "noise: the fingerprint of a Rain is None; let it be a t"),
    ("model=bag", (READ, "return hidden"), "model: a Bag returns a Tensor of a segment; let it return hidden states"),
    ("model=bag", (READ, "return hidden[..., :3], state"), "model: a Bag makes (2, 3) of 2 texts, and its width is 16"),
    ("model=bag", (READ, "return hidden, hidden[:1, 0]"), "model: a Bag has a state of shape (1, 16) for 2 texts; l"),
    ("model=bag", ("self.tokenizer = ", "_ = "), "model: a Bag has no tokenizer; let it keep the one that its const"),
    ("model=bag", ("def read_segment", "def read"), "model._target_=parts.Bag: is nothing for model, for it has no r"),
    ("model.update=mix", (MIXED, "return written[:, :1]"), "model.update: a Mix makes (2, 1, 16) of memories of sha"),
    ("+cooldown=short", ('"go on"', '"on"'), "Cooldown: decides 'on' after a validation; allowed: go on, restart, end"),
    ("+cooldown=short", ('"cooldown", "Cool', '"curriculum", "Cool'), "Cooldown: its name, curriculum, is that of a"),
    ("+cooldown=short", ('name, title, table = "cooldown"', '_, title, table = ""'), "Cooldown: has no name or no t"),
]  # fmt: skip


@pytest.mark.fault("a part of one's own fails, or is not what its group needs", "one line names its place")
@pytest.mark.parametrize(("words", "change", "told"), WRONG, ids=[f"{change[1]}" for _, change, _ in WRONG])
def test_a_part_that_is_wrong(
    words: str,
    change: Change,
    told: str,
    refused: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(ROOT / "examples" / "own_parts", tmp_path, dirs_exist_ok=True)
    code = (tmp_path / "parts.py").read_text()
    assert change[0] in code
    (tmp_path / "parts.py").write_text(code.replace(*change) + "\n\nC = iter(range(99))\n")
    monkeypatch.delitem(sys.modules, "parts", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    # No text that an earlier one has left.
    monkeypatch.setenv("RMT_LIGHTNING_CACHE", str(tmp_path / "cache"))
    small = [word for word in SMALL if not word.startswith("noise.") or "noise=" not in words]
    said = refused("--config-dir=conf", *small, "task=colors", *words.split(), "hydra.run.dir=run")
    assert said.startswith(f"error: {told}"), said
    if (log := tmp_path / "run" / "train.log").exists():
        # A run that has begun keeps it, with all that was called if it is an error in somebody's code.
        assert said in log.read_text() and ("Traceback" in log.read_text()) == ("Error: " in said)


def test_a_mistake_in_a_worker_of_a_loader() -> None:
    """The error is made anew in the process that reads, of nothing but a text."""
    text = f'Caught RuntimeError in worker 0.\n  File "{__file__}", line 3, in draw\n    x\nRuntimeError: no x'
    told = mistake(RuntimeError(text))
    assert told and told.endswith("test_extensions.py:3: draw: RuntimeError: no x; mend it there")
    assert mistake(RuntimeError("no x")) is None


@pytest.mark.fault("a class of one's own that a saved run could not name", "training is refused in one line")
def test_what_could_not_be_resumed(
    refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "from rmt_lightning import Detect\nfrom elsewhere import Far\n"
    code += "class Out:\n    class Near(Detect):\n        pass\ndef make():\n    return Detect()\n"
    (tmp_path / "unsavable.py").write_text(code)
    (tmp_path / "elsewhere.py").write_text("from rmt_lightning import Detect\nclass Far(Detect):\n    pass\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    importlib.invalidate_caches()
    for name in ("make", "Far", "Out.Near"):
        assert refused(*SMALL, f"task._target_=unsavable.{name}", "hydra.run.dir=run") == (
            f"error: task._target_=unsavable.{name}: the run could not be resumed or evaluated; give a class, by the "
            "module that defines it\n"
        )


PRESETS = {
    "experiment/x.yaml": [
        ("defaults:\n  - override /task: memorize\n", "task: is overridden by a yaml that stands for one part; "),
        ("- a\n", "experiment: its yaml would change nothing; begin it with the line '# @package _global_'"),
        ("# @package _global_\ndefaults:\n  - override task: memorize\n", "task: is looked for beside the yaml that"),
        ("# @package _global_\ndefaults:\n  - /task: memorize\n", "task: is among the defaults already; in those of a"),
        ("# @package _global_\ndefaults:\n  - override /tsk: memorize\n", "tsk: no such setting; did you mean task? "),
        ("# @package _global_\nmodel.memory_size: 3\n", "model.memory_size: no such setting; in a yaml, write model"),
        ("# @package _global_\nmodel: lstm\n", "model: is chosen among the defaults of a yaml; write 'override /mod"),
    ],
    "task/detect.yaml": [
        ("_target_: rmt_lightning.Memorize\n", "mine/task/detect.yaml: is not read, for there is one of that name a"),
    ],
}  # fmt: skip


@pytest.mark.fault("a preset of one's own that would do nothing, or something else", "it is refused in one line")
@pytest.mark.parametrize(
    ("name", "content", "told"), [(name, *case) for name, cases in PRESETS.items() for case in cases]
)
def test_a_preset_that_is_wrong(
    name: str, content: str, told: str, refused: Callable[..., str], tmp_path: Path
) -> None:
    path = tmp_path / "mine" / name
    path.parent.mkdir(parents=True)
    path.write_text(content)
    words = ["experiment=x"] if "experiment" in name else []
    assert refused("--config-dir=mine", *SMALL, *words, "hydra.run.dir=run").startswith(f"error: {told}")
