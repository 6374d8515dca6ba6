"""Kill the real command at chosen moments, resume it, and compare the final weights bit by bit."""

from __future__ import annotations

import csv
import errno
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch
import yaml
from conftest import SMALL, Run, assert_identical, final
from omegaconf import OmegaConf

from rmt_lightning.app.resume import begun_with, check_folder, other_text, save_config
from rmt_lightning.core.errors import UserError
from rmt_lightning.core.files import append_csv, write_atomically
from rmt_lightning.core.quoting import setting
from rmt_lightning.core.run_folder import claimed, locate
from rmt_lightning.tasks.babi import Babi
from rmt_lightning.tasks.facts import PLACES, questions_digest
from rmt_lightning.training.callbacks.checkpoints import MetricsTable, read_checkpoint, read_newest

# Dropout makes random numbers matter; three lengths make the curriculum matter.
RUN = ("hydra.run.dir=run", "backbone.dropout=0.1", "seed=5")

SAME = "the resumed run ends with the same weights"

# The real command, which kills itself without warning in the middle of the n-th call of a function.
KILLER = """
import os, signal, sys
from rmt_lightning.training import answering
from rmt_lightning.train import run

where, calls = {where!r}, {calls}
owner, name = {{
    "step": (answering.FactClassifier, "training_step"),
    "validation": (answering.FactClassifier, "validation_step"),
    "writing": (os, "fsync"),
    "moving": (os, "replace"),
}}[where]
original = getattr(owner, name)

def killer(*args, **kwargs):
    global calls
    file = os.readlink(f"/proc/self/fd/{{args[0]}}") if where == "writing" else str(args[0])
    if where in ("writing", "moving") and "ckpt" not in file:
        return original(*args, **kwargs)
    calls -= 1
    if calls == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)

setattr(owner, name, killer)
run()
"""


def logged(folder: Path) -> list[dict[str, str]]:
    """All rows of a run, start after start, without what is measured by the clock and empty cells."""
    starts = sorted(folder.glob("metrics/version_*/metrics.csv"), key=lambda path: (len(str(path)), path))
    rows = [row for path in starts for row in csv.DictReader(path.open())]
    measured = ("train/tokens_per_second", "train/host_memory_mb")
    return [{name: cell for name, cell in row.items() if cell and name not in measured} for row in rows]


@pytest.fixture(scope="module")
def uninterrupted(trained: Callable[..., Path]) -> Path:
    return trained(*RUN)


def test_the_same_command_gives_the_same_weights_and_others_differ(
    uninterrupted: Path, train: Run, tmp_path: Path
) -> None:
    assert train(*RUN).returncode == 0
    assert_identical(final(uninterrupted), final(tmp_path / "run"))
    assert train(*RUN, "seed=6", "hydra.run.dir=other").returncode == 0
    assert not torch.equal(final(uninterrupted)["head.weight"], final(tmp_path / "other")["head.weight"])


def killed(moment: str, where: str, calls: int, soak: bool = False) -> object:
    marks = [pytest.mark.fault(f"SIGKILL {moment}", SAME), *([pytest.mark.soak] if soak else [])]
    return pytest.param(where, calls, marks=marks, id=f"{where}-{calls}")


@pytest.mark.parametrize(
    ("where", "calls"),
    [
        killed("before the first checkpoint", "step", 2, soak=True),
        killed("inside the first stage", "step", 5, soak=True),
        killed("inside the second stage, its first epoch", "step", 8),
        killed("between an epoch's last step and its checkpoint", "validation", 4, soak=True),
        killed("while a checkpoint is written", "writing", 2),
        killed("after stage-1.ckpt is written, before it is in its place", "moving", 2, soak=True),
        killed("at the border of a stage: stage-1.ckpt is there, last.ckpt is older", "moving", 3),
        killed("in the very last step", "step", 18, soak=True),
    ],
)
def test_killed_and_resumed(where: str, calls: int, uninterrupted: Path, train: Run, tmp_path: Path) -> None:
    killed = train(*RUN, driver=KILLER.format(where=where, calls=calls))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    folder = tmp_path / "run"
    assert not (folder / "evaluation.csv").exists()
    # A stage that has been passed is told at once, and a resumed run tells where it went on.
    passed = sorted(path.stem.removeprefix("stage-") for path in (folder / "checkpoints").glob("stage-*.ckpt"))
    if passed:
        assert [line.split(",")[0] for line in (folder / "stages.csv").read_text().splitlines()[1:]] == passed
    last = folder / "checkpoints" / "last.ckpt"
    step = torch.load(last, weights_only=True)["global_step"] if last.exists() else 0
    resumed = train("resume=run", small=False)
    assert resumed.returncode == 0, resumed.stderr
    assert_identical(final(uninterrupted), final(folder))
    for name in ("stages.csv", "evaluation.csv"):
        with (uninterrupted / name).open() as one, (folder / name).open() as other:
            for expected, found in zip(csv.DictReader(one), csv.DictReader(other), strict=True):
                expected.pop("seconds", None), found.pop("seconds", None)
                assert expected == found
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == [
        "last.ckpt", "previous.ckpt", "stage-1.ckpt", "stage-2.ckpt", "stage-3.ckpt",
    ]  # fmt: skip
    assert [start["step"] for start in json.loads((folder / "hardware.json").read_text())] == [0, step]
    # What had been logged before the kill is still there, once.
    assert logged(folder) == logged(uninterrupted)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


@pytest.mark.fault("the text of a run is edited, and the run is resumed", "said in one line; it goes on")
def test_text_that_has_changed(train: Run, tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text(" ".join(f"On day {number} nothing came of it." for number in range(600)))
    small = [word for word in SMALL if not word.startswith("noise.")]
    settings = ("noise=files", "noise.path=book.txt", "hydra.run.dir=run", "trainer.max_steps=3")
    begun = train(*small, *settings, small=False)
    assert begun.returncode == 0, begun.stderr
    stamp = book.stat()
    book.write_text(book.read_text().replace("nothing", "enough"))
    os.utime(book, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    record = (tmp_path / "run" / "text.json").read_text()
    resumed = train("resume=run", "trainer.max_steps=6", small=False)
    assert resumed.returncode == 0, resumed.stderr
    said = "run: the text is not the one that the run began with: its files or the settings of its noise have changed; "
    assert said not in begun.stdout and resumed.stdout.count(said) == 1
    assert said in (tmp_path / "run" / "train.log").read_text()
    # It stays known what the run began with, however often it is resumed.
    assert (tmp_path / "run" / "text.json").read_text() == record


@pytest.mark.fault("a task's file changes while a run is stopped", "said; refused if weights stand for other answers")
def test_questions_that_have_changed(
    train: Run, refused: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    story = "1 {0} went to the {1}.\n2 Where is {0}?\t{1}\t1\n"
    told = "".join(story.format(name, place) for name in ("Ann", "Bob") for place in PLACES for _ in range(2))
    (tmp_path / "qa.txt").write_text(told)
    begun = train("task=babi", "task.path=qa.txt", "hydra.run.dir=run", "trainer.max_steps=1")
    assert begun.returncode == 0, begun.stderr
    # Files may move.
    (tmp_path / "qa.txt").rename(tmp_path / "moved.txt")
    moved = train("resume=run", "task.path=moved.txt", "trainer.max_steps=2", small=False)
    assert moved.returncode == 0 and "are not those" not in moved.stdout, moved.stderr
    (tmp_path / "moved.txt").write_text(told.replace("hallway", "cellar"))
    line = "error: task: its answers are not those that the run has learnt (gone: hallway, new: cellar); put its files"
    assert line in refused("resume=run", "trainer.max_steps=3")
    (tmp_path / "moved.txt").write_text(told + story.format("Ann", "attic"))
    assert "that the run has learnt (new: attic); put its files" in refused("resume=run", "trainer.max_steps=3")
    names = json.loads((tmp_path / "run/text.json").read_text())
    (tmp_path / "moved.txt").write_text(told.replace("Ann", "Eve"))
    present = {"sha256": names["sha256"], "questions": questions_digest(Babi(str(tmp_path / "moved.txt")))}
    capsys.readouterr()
    assert begun_with(tmp_path / "run", names) == names == begun_with(tmp_path / "run", present)
    assert not other_text(tmp_path / "run", names, OmegaConf.create())
    assert other_text(tmp_path / "run", present, OmegaConf.create()) == {"questions": present["questions"]}
    said = "run: the questions are not those that the run began with: the files of its task have changed; "
    assert [line[: len(said)] for line in capsys.readouterr().out.splitlines()] == [said, said]


SLOW_STEPS = """
import time
from pathlib import Path
from rmt_lightning.training import answering
from rmt_lightning.train import run

def step(*arguments):
    Path("training").touch()
    time.sleep(0.3)
    return original(*arguments)

original = answering.FactClassifier.training_step
answering.FactClassifier.training_step = step
run()
"""


@pytest.mark.parametrize(
    ("signum", "code"),
    [
        pytest.param(
            signal.SIGINT, 130, marks=[pytest.mark.soak, pytest.mark.fault("Ctrl-C", f"saved, exit code 130; {SAME}")]
        ),
        pytest.param(signal.SIGTERM, 143, marks=pytest.mark.fault("SIGTERM", f"saved, exit code 143; {SAME}")),
    ],
)
def test_signals_save_and_exit_cleanly(
    signum: int, code: int, uninterrupted: Path, train: Run, environment: dict[str, str], tmp_path: Path
) -> None:
    command = [sys.executable, "-c", SLOW_STEPS, *SMALL, *RUN, "data.num_workers=1"]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, **options)
    log = tmp_path / "run" / "train.log"
    deadline = time.monotonic() + 120
    while not (log.exists() and "stage 1: step 3" in log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.4)  # into the second epoch
    # All processes, loader workers too, as a terminal and a scheduler send it.
    os.killpg(process.pid, signum)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert "resume=run" in output and "Traceback" not in output + errors
    saved = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] in (4, 5, 6)
    resumed = train("resume=run", small=False)
    assert resumed.returncode == 0, resumed.stderr
    assert_identical(final(uninterrupted), final(tmp_path / "run"))
    assert logged(tmp_path / "run") == logged(uninterrupted)


@pytest.mark.fault("SIGKILL in the first step of a run that branches off", f"it goes on from the same stage; {SAME}")
def test_resume_from_a_stage_goes_to_a_new_folder(
    uninterrupted: Path, train: Run, refused: Callable[..., str], tmp_path: Path
) -> None:
    stage = uninterrupted / "checkpoints" / "stage-1.ckpt"
    before = {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*")}
    killed = train(f"resume={stage}", small=False, driver=KILLER.format(where="step", calls=1))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    (folder,) = (tmp_path / "outputs").glob("*/*")
    assert folder.name.endswith(f"-stage-1-of-{uninterrupted.name}")
    resumed = train(f"resume={folder}", small=False)
    assert resumed.returncode == 0, resumed.stderr
    assert {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*")} == before
    assert_identical(final(uninterrupted), final(folder))
    told = refused(f"resume={stage}", f"hydra.run.dir={uninterrupted}")
    assert "already holds a run; choose another folder, or go on with resume=" in told


@pytest.mark.soak
def test_resume_with_more_segments_and_a_finished_run(uninterrupted: Path, train: Run, tmp_path: Path) -> None:
    shutil.copytree(uninterrupted, tmp_path / "run")
    again = train("resume=run", small=False)
    assert again.returncode == 0 and "has finished training" in again.stdout, again.stdout + again.stderr
    assert_identical(final(uninterrupted), final(tmp_path / "run"))
    # More segments than were planned: the same as if they had been planned.
    assert train(*RUN, "curriculum.max_segments=2", "hydra.run.dir=short").returncode == 0
    assert train("resume=short", "curriculum.max_segments=3", small=False).returncode == 0
    assert_identical(final(uninterrupted), final(tmp_path / "short"))
    more = train("resume=run", "curriculum.max_segments=4", small=False)
    assert more.returncode == 0, more.stderr
    with (tmp_path / "run" / "stages.csv").open() as file:
        assert [row["stage"] for row in csv.DictReader(file)] == ["1", "2", "3", "4"]


@pytest.mark.soak
@pytest.mark.parametrize(
    "model",
    [
        "rmt_decoder backbone=tiny_gpt model.memory_size=3", "transformer_xl backbone=tiny_gpt",
        "rmt_transformer_xl backbone=tiny_gpt model.memory_size=3", "full_attention backbone.max_positions=256",
        "longformer backbone=tiny_longformer", "bigbird backbone=tiny_bigbird", "lstm", "memory_network", "ntm",
        "armt", "armt backbone=tiny_gpt answer=generate model.heads=2", "prmt", "rmt_retrieval",
    ],
)  # fmt: skip
def test_every_model_resumes(model: str, train: Run, tmp_path: Path) -> None:
    settings = f"model={model}".split()
    assert train(*settings, "hydra.run.dir=whole").returncode == 0
    stopped = train(*settings, "hydra.run.dir=run", "trainer.max_steps=7")
    assert "stopped by trainer.max_steps=7" in stopped.stdout, stopped.stderr
    assert train("resume=run", "trainer.max_steps=-1", small=False).returncode == 0
    assert_identical(final(tmp_path / "whole"), final(tmp_path / "run"))


@pytest.mark.soak
@pytest.mark.parametrize("steps", [1, 2, 4, 5, 7, 8])
@pytest.mark.fault("trainer.max_steps ends a run inside an epoch", SAME)
def test_max_steps_saves_where_it_stops(steps: int, uninterrupted: Path, train: Run, tmp_path: Path) -> None:
    result = train(*RUN, f"trainer.max_steps={steps}")
    assert result.returncode == 0, result.stderr
    assert f"stopped by trainer.max_steps={steps}; raise it and go on with resume=run" in result.stdout
    assert torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["global_step"] == steps
    assert train("resume=run", "trainer.max_steps=-1", small=False).returncode == 0
    assert_identical(final(uninterrupted), final(tmp_path / "run"))
    assert logged(tmp_path / "run") == logged(uninterrupted)


SIGNALED = """
import os, signal
from rmt_lightning.training import answering
from rmt_lightning.train import run

calls = 0
original = answering.FactClassifier.training_step

def step(*arguments):
    global calls
    calls += 1
    if calls == {call}:
        os.kill(os.getpid(), signal.SIGTERM)
    return original(*arguments)

answering.FactClassifier.training_step = step
run()
"""


@pytest.mark.parametrize(
    ("precision", "batches"),
    [
        pytest.param("64-true", 2, id="double", marks=pytest.mark.soak),
        *(pytest.param(precision, 2, marks=pytest.mark.soak) for precision in ("bf16-mixed", "bf16-true", "32-true")),
        pytest.param("64-true", 1, marks=pytest.mark.soak),
        pytest.param("32-true", 3, marks=pytest.mark.soak),
    ],
)
@pytest.mark.fault("SIGTERM while gradients wait for more, or in another precision", SAME)
def test_waiting_gradients_and_precise_weights(precision: str, batches: int, train: Run, tmp_path: Path) -> None:
    settings = (
        f"trainer.precision={precision}", f"+trainer.accumulate_grad_batches={batches}", "backbone.dropout=0.1",
        "curriculum.max_segments=2", "data.steps_per_epoch=5", "trainer.log_every_n_steps=1",
    )  # fmt: skip
    assert train(*settings, "hydra.run.dir=whole").returncode == 0
    # The first batch of an optimizer step, in the second epoch.
    stopped = train(*settings, "hydra.run.dir=run", driver=SIGNALED.format(call=6))
    assert stopped.returncode == 143, stopped.stderr
    assert train("resume=run", small=False).returncode == 0
    assert_identical(final(tmp_path / "whole"), final(tmp_path / "run"))
    assert logged(tmp_path / "whole") == logged(tmp_path / "run")


def in_a_fork(action: Callable[[], None]) -> int:
    """Do something in a process of its own, which may be killed; returns how that ended."""
    if (child := os.fork()) == 0:
        try:
            action()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def no_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("moment", ["fsync", "replace"])
@pytest.mark.fault("SIGKILL or a full disk while metrics.csv gets a new column", "no row is lost or repeated")
def test_logged_rows_survive(moment: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    table, file = MetricsTable(tmp_path, done=0), tmp_path / "metrics" / "version_0" / "metrics.csv"
    for step in (0, 1):
        table.log_metrics({"loss": 2.5}, step)
        table.sync()
    before = file.read_text()
    table.log_metrics({"accuracy": 0.5}, 2)
    with monkeypatch.context() as patched:
        patched.setattr(os, moment, kill)
        assert in_a_fork(table.save) == -signal.SIGKILL and file.read_text() == before
        patched.setattr(os, moment, no_space)
        with pytest.raises(OSError, match="No space"):
            table.save()
    assert file.read_text() == before
    table.save()
    assert [row["step"] for row in logged(tmp_path)] == ["0", "1", "2"]


@pytest.mark.fault("the limit of a file's size is reached while a row of metrics.csv is written", "no half row is left")
def test_half_a_row_is_taken_back(tmp_path: Path) -> None:
    table, file = MetricsTable(tmp_path, done=0), tmp_path / "metrics" / "version_0" / "metrics.csv"
    table.log_metrics({"loss": 2.5}, 0)
    table.save()
    before = file.read_text()

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 3, len(before) + 3))
        table.log_metrics({"loss": 1.25}, 1)
        with pytest.raises(OSError, match=r"File too large.*metrics\.csv"):
            table.save()
        os.kill(os.getpid(), signal.SIGUSR1)

    assert in_a_fork(limited) == -signal.SIGUSR1
    assert file.read_text() == before
    # What somebody removes begins anew, with its header.
    file.unlink()
    table.log_metrics({"loss": 1.25}, 1)
    table.save()
    assert logged(tmp_path) == [{"loss": "1.25", "step": "1"}]


def test_what_is_logged_again_is_taken_out(tmp_path: Path) -> None:
    first = MetricsTable(tmp_path, done=0)
    for step in range(6):
        first.log_metrics({"loss": step}, step)
    first.save()
    append_csv(tmp_path / "metrics/version_0/metrics.csv", [{"loss": 7, "step": 6}], ["loss", "step"])
    os.truncate(tmp_path / "metrics/version_0/metrics.csv", 30)
    (tmp_path / "metrics" / "version_old").mkdir()
    second = MetricsTable(tmp_path, done=4)
    second.save()
    second.log_metrics({"accuracy": 1.0}, 4)
    second.save()
    assert [row["step"] for row in logged(tmp_path)] == ["0", "1", "2", "3", "4"]
    MetricsTable(tmp_path, done=0).save()
    assert logged(tmp_path) == [] and (tmp_path / "metrics" / "version_2").is_dir()


@pytest.mark.fault("SIGKILL between the first two files of a run", "the run can be resumed")
def test_a_run_begins_with_its_config(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    written = []
    monkeypatch.setattr("rmt_lightning.app.resume.write_atomically", lambda path, _: written.append(path.name))
    for _ in range(2):
        save_config(tmp_path, OmegaConf.create({"seed": 1, "resume": None}), ["seed=1"], None)
        (tmp_path / "config.yaml").touch()
    # Then, what is typed on resuming comes first, so that it is not lost.
    assert written == ["config.yaml", "overrides.yaml", "overrides.yaml", "config.yaml"]


@pytest.mark.fault("SIGKILL before a run that branches off has its config", "the same command begins it again")
def test_a_branch_begins_again(tmp_path: Path) -> None:
    stage, last = tmp_path / "stage-1.ckpt", tmp_path / "run" / "checkpoints" / "last.ckpt"
    last.parent.mkdir(parents=True)
    stage.write_text("weights")
    last.write_text("weights")
    config = OmegaConf.create()
    check_folder(config, tmp_path / "run", None, stage, [])
    for name, content in (("last.ckpt", "others"), ("stage-1.ckpt", "weights")):
        (last.parent / name).write_text(content)
        with pytest.raises(UserError, match=r"holds checkpoints of a run whose config\.yaml is missing"):
            check_folder(config, tmp_path / "run", None, stage, [])
        last.write_text("weights")


@pytest.mark.parametrize("moment", ["fsync", "replace"])
@pytest.mark.fault("SIGKILL or a full disk while config.yaml is written on resuming", "it stays as it was")
def test_the_config_survives(moment: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    save_config(tmp_path, OmegaConf.create({"seed": 1, "resume": None}), ["seed=1"], None)
    before = {path: path.read_text() for path in tmp_path.iterdir()}
    assert {path.name for path in before} == {"config.yaml", "overrides.yaml"}

    def again() -> None:
        save_config(tmp_path, OmegaConf.create({"seed": 2, "resume": None}), ["seed=2"], None)

    with monkeypatch.context() as patched:
        patched.setattr(os, moment, kill)
        assert in_a_fork(again) == -signal.SIGKILL
        patched.setattr(os, moment, no_space)
        with pytest.raises(OSError, match="No space"):
            again()
    assert {path: path.read_text() for path in before} == before


@pytest.mark.fault("two processes write a file at once, and are killed while they write it", "it is whole")
def test_two_writers_of_one_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path, fsync = tmp_path / ("x" * 250 + ".html"), os.fsync

    def meanwhile(descriptor: int) -> None:
        monkeypatch.setattr(os, "fsync", fsync)
        write_atomically(path, b"second")
        assert path.read_bytes() == b"second"

    monkeypatch.setattr(os, "fsync", meanwhile)
    write_atomically(path, b"the first")
    assert path.read_bytes() == b"the first" and list(tmp_path.iterdir()) == [path]
    monkeypatch.setattr(os, "fsync", kill)
    assert in_a_fork(lambda: write_atomically(path, b"third")) == -signal.SIGKILL
    assert path.read_bytes() == b"the first" and len(list(tmp_path.iterdir())) == 2
    with claimed(tmp_path):
        assert sorted(part.name for part in tmp_path.iterdir()) == [".lock", path.name]


@pytest.mark.fault("config.yaml is empty or cut off", "resuming writes it anew; others say so in one line")
@pytest.mark.parametrize("content", ["", "seed: [1,", "- 1\n"])
def test_a_damaged_config_is_written_anew(
    content: str, uninterrupted: Path, train: Run, command: Run, refused: Callable[..., str], tmp_path: Path
) -> None:
    shutil.copytree(uninterrupted, tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text(content)
    if content:
        (tmp_path / "run" / "overrides.yaml").unlink()
        assert refused("resume=run").startswith(
            "error: run/config.yaml: is damaged, or not that of a run; start a new run"
        )
        return
    told = command("rmt_lightning.evaluate", "checkpoint=run").stderr
    assert told == "error: run/config.yaml: is damaged, or not that of a run; train resume=run writes it anew\n"
    assert train("resume=run", small=False).returncode == 0
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text()) == yaml.safe_load(
        (uninterrupted / "config.yaml").read_text()
    )


@pytest.mark.fault("config.yaml is missing beside checkpoints", "a new run in the folder is refused in one line")
def test_checkpoints_are_not_overwritten(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "stage-1.ckpt").touch()
    told = refused(*SMALL, "hydra.run.dir=run")
    assert told.startswith("error: hydra.run.dir=run: holds checkpoints of a run whose config.yaml is missing; choose")
    assert os.listdir(tmp_path / "run" / "checkpoints") == ["stage-1.ckpt"]


@pytest.mark.fault("last.ckpt is replaced while it is read", "weights and checksum are of the same file")
def test_weights_and_checksum_belong_together(
    uninterrupted: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    checkpoints = uninterrupted / "checkpoints"
    last, original = Path(shutil.copy(checkpoints / "stage-1.ckpt", tmp_path / "last.ckpt")), torch.load

    def replaced(file: object, **options: object) -> object:
        os.replace(shutil.copy(checkpoints / "stage-2.ckpt", tmp_path / "newer"), last)
        return original(file, **options)

    monkeypatch.setattr(torch, "load", replaced)
    read = read_checkpoint(last)
    assert read["sha256"] == hashlib.sha256((checkpoints / "stage-1.ckpt").read_bytes()).hexdigest()
    assert read["global_step"] == 6 and last.read_bytes() == (checkpoints / "stage-2.ckpt").read_bytes()
    last.unlink()
    with pytest.raises(UserError, match="is missing; give another one"):
        read_checkpoint(last)


FULL_DISK = dedent(
    """
    import os
    from rmt_lightning.train import run

    original, writes = os.fsync, 0

    def fsync(descriptor):
        global writes
        if "ckpt" in os.readlink(f"/proc/self/fd/{descriptor}"):
            writes += 1
            if writes == 2:
                os.write(descriptor, b"half")
                raise OSError(28, "No space left on device", "last.ckpt.partial")
        return original(descriptor)

    os.fsync = fsync
    run()
    """
)


@pytest.mark.fault("the disk is full while a checkpoint is written", f"one line; {SAME}")
def test_a_full_disk_leaves_the_previous_checkpoint(uninterrupted: Path, train: Run, tmp_path: Path) -> None:
    result = train(*RUN, driver=FULL_DISK)
    assert result.returncode == 1
    assert result.stderr.startswith("error: no space left") and result.stderr.count("\n") == 1
    saved = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 3
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["last.ckpt"]
    assert train("resume=run", small=False).returncode == 0
    assert_identical(final(uninterrupted), final(tmp_path / "run"))


FULL_AT = """
import errno, os
from rmt_lightning.train import run

original, calls = os.replace, {calls}

def replace(source, target):
    global calls
    calls -= os.path.basename(target) == {name!r}
    if calls <= 0:
        # From there on, the disk stays full.
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(source))
    return original(source, target)

os.replace = os.rename = replace
run()
"""


HELD = (*RUN, "curriculum.max_segments=2", "hold=state_passing", "hold.steps=6", "hold.pool=8", "hold.until_rate=1")


@pytest.fixture(scope="module")
def held(trained: Callable[..., Path]) -> Path:
    return trained(*HELD)


@pytest.mark.soak
@pytest.mark.fault(
    "the disk becomes full after the first stage, at any file", f"the line names it; all else stays; {SAME}"
)
@pytest.mark.parametrize(
    ("name", "calls"),
    [
        ("stage-2.ckpt", 1), ("stages.csv", 2), ("phases.json", 3), ("previous.ckpt", 2), ("last.ckpt", 4),
        ("metrics.csv", 2), ("hold.csv", 1), ("evaluation.csv", 1), ("curriculum.png", 1),
    ],
)  # fmt: skip
def test_a_full_disk_after_the_first_stage(name: str, calls: int, held: Path, train: Run, tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = train(*HELD, driver=FULL_AT.format(name=name, calls=calls))
    assert result.returncode == 1 and result.stderr.count("\n") == 1, result.stderr
    assert re.match(rf"error: no space left while writing {run}/(\S+/)?{name}: free some, and resume", result.stderr)
    assert all(read_checkpoint(path) for path in (run / "checkpoints").iterdir())
    assert list(run.rglob("*.partial")) == []
    resumed = train("resume=run", small=False)
    assert resumed.returncode == 0, resumed.stderr
    assert_identical(final(held), final(run))
    assert logged(run) == logged(held)
    for table in ("stages.csv", "hold.csv", "evaluation.csv"):
        found, expected = ([*csv.DictReader((folder / table).open())] for folder in (run, held))
        assert [row | {"seconds": ""} for row in found] == [row | {"seconds": ""} for row in expected]


MEANWHILE = """
import multiprocessing, os, shutil, time
from pathlib import Path
from rmt_lightning.train import run
from rmt_lightning.training import answering

original, calls = answering.FactClassifier.training_step, 0

def step(*args):
    global calls
    calls += 1
    if calls == {call}:
        {what}
    return original(*args)

answering.FactClassifier.training_step = step
if __name__ == "__main__":  # loader workers import it too
    run()
"""


@pytest.mark.fault("a worker is killed, or the run folder or its text goes away, while a run goes on", "a line says so")
@pytest.mark.parametrize(
    ("what", "told"),
    [
        pytest.param(
            "[os.kill(worker.pid, 9) for worker in multiprocessing.active_children()], time.sleep(9)",
            "data.num_workers=1: one of them has died, perhaps for want of memory (DataLoader worker (pid",
            marks=pytest.mark.soak,
        ),
        ("shutil.rmtree('run')", "run: was removed, renamed or emptied"),
        ("os.rename('run', 'moved'), os.mkdir('run')", "run: was removed, renamed or emptied"),
        pytest.param(
            "os.truncate(next(Path('own').rglob('train/tokens.npy')), 200)",
            "train/tokens.npy: was damaged while",
            marks=pytest.mark.soak,
        ),
    ],
)
def test_what_a_run_stands_on_goes_away(what: str, told: str, train: Run, tmp_path: Path) -> None:
    workers = ("cache_dir=own", "data.num_workers=1") if "own" in what or "worker" in what else ()
    # A run may lose its folder before anything has been saved.
    result = train(*RUN, *workers, driver=MEANWHILE.format(what=what, call=4 if workers else 2))
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("error: ") and told in result.stderr and result.stderr.count("\n") == 1
    assert (tmp_path / "run" / "checkpoints").exists() == (workers != ())


def test_checkpoints_hold_plain_values_only(uninterrupted: Path) -> None:
    saved = torch.load(uninterrupted / "checkpoints" / "stage-2.ckpt", weights_only=True)
    assert saved["phases"]["consumed"] == 12 and saved["phases"]["curriculum"]["num_segments"] == 3
    json.dumps([saved["callbacks"], saved["phases"]])


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path: Path) -> None:
    """In the weights, where torch.load would take it for a number."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "damaged", "used"),
    [
        pytest.param(
            flip_a_bit, ["last"], "previous.ckpt, step 15",
            marks=pytest.mark.fault("a bit of last.ckpt has changed", f"previous.ckpt is used and named; {SAME}"),
        ),
        pytest.param(
            Path.unlink, ["last"], "previous.ckpt, step 15",
            marks=pytest.mark.fault("last.ckpt is missing", f"previous.ckpt is used and named; {SAME}"),
        ),
        pytest.param(
            truncate, ["last", "previous"], "stage-2.ckpt, step 12",
            marks=[
                pytest.mark.soak,
                pytest.mark.fault("last and previous.ckpt are truncated", f"stage-2.ckpt is used and named; {SAME}"),
            ],
        ),
    ],
)  # fmt: skip
def test_a_damaged_checkpoint_is_replaced_by_the_one_before(
    damage: Callable[[Path], None], damaged: list[str], used: str, uninterrupted: Path, train: Run, tmp_path: Path
) -> None:
    # The run as it stood before its last stage was over: the last checkpoint was not yet written.
    shutil.copytree(uninterrupted, tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / "stage-3.ckpt").unlink()
    shutil.copy(checkpoints / "stage-1.ckpt", checkpoints / "stage-1 (copy).ckpt")
    for name in damaged:
        damage(checkpoints / f"{name}.ckpt")
    resumed = train("resume=run", small=False)
    assert resumed.returncode == 0, resumed.stderr
    wrong = "missing" if damage is Path.unlink else "damaged"
    assert f"run/checkpoints/last.ckpt is {wrong}; going on from {used}\n" in resumed.stdout
    assert_identical(final(uninterrupted), final(tmp_path / "run"))
    # What had been damaged was not kept as the previous one.
    assert all(read_checkpoint(path) for path in checkpoints.iterdir())


def test_a_checkpoint_that_may_not_be_read_is_not_damaged(uninterrupted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was before it is whole, but is no reason to lose what came after."""
    last = uninterrupted / "checkpoints" / "last.ckpt"
    opened = Path.open

    def closed(path: Path, *arguments: Any, **options: Any) -> Any:
        if path == last:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", closed)
    with pytest.raises(UserError, match=r"last\.ckpt: cannot be read \(Permission denied\); make it readable$"):
        read_newest(last)


@pytest.mark.fault("a run folder may not be read", "that is said, and not that it is missing")
def test_a_run_that_may_not_be_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def closed(path: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "stat", closed)
    with pytest.raises(UserError, match=r"^resume=run: cannot be read \(Permission denied\); ask whose"):
        locate("run", "resume")


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.fault("SIGKILL at 10 random moments, start-up included", SAME)
def test_killed_again_and_again(uninterrupted: Path, environment: dict[str, str], tmp_path: Path) -> None:
    chance = random.Random(1)
    folder, training = tmp_path / "run", tmp_path / "training"
    (tmp_path / "driver.py").write_text(SLOW_STEPS)
    command, start_up, reached = [*SMALL, *RUN], 0.0, []
    while len(reached) < 10:
        training.unlink(missing_ok=True)
        began = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "driver.py", *command],
            cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip
        if start_up and chance.random() < 0.3:
            moment = chance.uniform(0, start_up)
        else:
            while process.poll() is None and not training.exists():
                time.sleep(0.02)
            start_up = time.monotonic() - began
            moment = chance.uniform(0, 3)
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            process.kill()
            last = folder / "checkpoints" / "last.ckpt"
            reached.append(read_checkpoint(last)["global_step"] if last.exists() else 0)
        _, errors = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), errors
        if (folder / "config.yaml").exists():
            command = ["resume=run"]
    assert reached == sorted(reached) and len(set(reached)) > 2, reached
    subprocess.run([sys.executable, "-m", "rmt_lightning.train", *command], cwd=tmp_path, env=environment, check=True)
    assert_identical(final(uninterrupted), final(folder))


WAITING = """
import time
from pathlib import Path
from rmt_lightning.training import answering
from rmt_lightning.train import run

def step(*arguments):
    while not Path("go").exists():
        time.sleep(0.1)
    return original(*arguments)

original = answering.FactClassifier.training_step
answering.FactClassifier.training_step = step
run()
"""


@pytest.mark.soak
@pytest.mark.fault("a run is started in the folder of another one that goes on", "the second one refuses in one line")
def test_a_second_run_in_one_folder_refuses(
    uninterrupted: Path, train: Run, environment: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "driver.py").write_text(WAITING)
    first = subprocess.Popen([sys.executable, "driver.py", *SMALL, *RUN], cwd=tmp_path, env=environment)
    while not (tmp_path / "run" / "hardware.json").exists():
        time.sleep(0.02)
    for command in (("resume=run",), (*SMALL, *RUN)):
        second = train(*command, small=False)
        assert second.returncode == 2 and second.stdout == "", second.stdout
        assert second.stderr.startswith(f"error: run: a run is going on there (process {first.pid} on ")
        assert second.stderr.count("\n") == 1
    (tmp_path / "go").touch()
    assert first.wait(120) == 0
    assert_identical(final(uninterrupted), final(tmp_path / "run"))


@pytest.mark.soak
@pytest.mark.fault("folders have names that a shell, Hydra or OmegaConf reads", "each is taken as it stands")
@pytest.mark.parametrize("name", ["${oc.env:HOME}", 'o\'brien, "x" [1]=\\${x}\\', "[red]nl\n:dog:", "книга #1 ", "-~"])
def test_names_are_taken_as_they_stand(name: str, train: Run, command: Run, tmp_path: Path) -> None:
    """A run in a folder within a folder of that name goes on with the hint that it has printed, pasted into bash."""
    first = train("trainer.max_steps=2", setting("hydra.run.dir", f"{name}/{name}"))
    assert first.returncode == 0, first.stderr
    assert [path.name for path in tmp_path.iterdir()] == [path.name for path in (tmp_path / name).iterdir()] == [name]
    hint = first.stdout.partition("go on with ")[2].splitlines()[0]
    pasted = subprocess.run(["bash", "-c", f"printf %s {hint}"], check=True, capture_output=True).stdout.decode()
    second = train(pasted, "trainer.max_steps=4", small=False)
    assert second.returncode == 0, second.stderr
    assert json.loads((tmp_path / name / name / "phases.json").read_text())[0]["steps"] == 4
    checkpoint = pasted.replace("resume=", "checkpoint=", 1)
    for door in ("evaluate segments=[1] samples=4 follow=0", "attend segments=1 stream_segments=2", "export"):
        program, *words = door.split()
        words += [setting("folder", f"{name}/exported")] if program == "export" else []
        result = command(f"rmt_lightning.{program}", checkpoint, *words)
        assert result.returncode == 0, result.stderr
    assert command("rmt_lightning.report", f"./{name}").returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "report.html"])


@pytest.mark.soak
@pytest.mark.fault("~ in a setting that is a path, typed or in a yaml", "it is the home folder everywhere")
def test_home_folders_are_expanded(
    finished_run: Path, command: Run, train: Run, environment: dict[str, str], tmp_path: Path
) -> None:
    environment["HOME"] = str(tmp_path / "home")
    shutil.copytree(finished_run, tmp_path / "home" / "run")
    (tmp_path / "home" / "book.txt").write_text("A quiet morning. Nobody spoke for a while. Then it rained! " * 200)
    (tmp_path / "choices" / "noise").mkdir(parents=True)
    (tmp_path / "choices" / "noise" / "mine.yaml").write_text("_target_: rmt_lightning.Files\npath: ~/book.txt\n")
    small = [word for word in SMALL if not word.startswith("noise.")] + ["trainer.max_steps=1"]
    for program, *words in (
        ("train", *small, "noise=files", 'noise.path="~/book.txt"', 'hydra.run.dir="~/typed"'),
        ("train", "--config-dir=choices", *small, "noise=mine", "hydra.run.dir='~/preset'"),
        ("train", 'resume="~/run"'),
        ("evaluate", 'checkpoint="~/run"', 'output="~/found"', "segments=[1]", "samples=4", "follow=0"),
        ("export", 'checkpoint="~/run"', 'folder="~/exported"'),
        ("report", "~/run", "--output=~/page.html"),
    ):
        result = command(f"rmt_lightning.{program}", *words)
        assert result.returncode == 0, result.stderr
    there = {path.name for path in (tmp_path / "home").iterdir() if not path.name.startswith(".")}
    assert there == {"run", "book.txt", "typed", "preset", "found", "exported", "page.html"}
    assert not (tmp_path / "~").exists()
