"""Several processes that are one run: if one of them dies, all end, and the run goes on where it stood."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import Run, assert_identical, final

from rmt_lightning.training.callbacks import ranks

RUN = ("trainer=ddp_cpu", "hydra.run.dir=run", "backbone.dropout=0.1", "seed=5")
SAME = "the resumed run ends with the same weights"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    # What is counted for the accuracy is counted anew by each process.
    return {name: value for name, value in final(folder).items() if not name.startswith("accuracy")}


def gone(process: subprocess.Popen[bytes]) -> str | None:
    """What rank 0, the parent of one other process, says of it."""
    trainer = SimpleNamespace(
        strategy=SimpleNamespace(launcher=SimpleNamespace(procs=[process])), node_rank=1, num_devices=2, local_rank=0
    )
    return ranks._Watch(trainer, "run", parent=0).death()


def test_how_another_process_has_died() -> None:
    process = subprocess.Popen(["sleep", "60"])
    assert gone(process) is None
    process.kill()
    process.wait()
    # The second process of the second machine.
    assert gone(process) == "rank 3 was killed by SIGKILL, and the others with it"
    (failed := subprocess.Popen(["false"])).wait()
    assert gone(failed) == "rank 3 ended with exit code 1, and the others with it"
    (well := subprocess.Popen(["true"])).wait()
    assert gone(well) is None


@pytest.mark.soak
@pytest.mark.fault("rank 0 is killed, and the terminal with it", "the others end although nobody listens")
def test_nobody_listens_any_more() -> None:
    program = f"""
import sys, time
from types import SimpleNamespace
from rmt_lightning.training.callbacks.ranks import _Watch
trainer = SimpleNamespace(strategy=SimpleNamespace(launcher=None), local_rank=1, node_rank=0, num_devices=2)
print("ready", flush=True), sys.stdin.read()
_Watch(trainer, "run", parent={os.getpid()} + 1).start()
time.sleep(100)
"""
    pipe = subprocess.PIPE
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    rank = subprocess.Popen([sys.executable, "-c", program], stdin=pipe, stdout=pipe, stderr=pipe, env=environment)
    assert rank.stdin and rank.stdout and rank.stderr
    assert rank.stdout.readline() == b"ready\n"
    rank.stderr.close(), rank.stdin.close()
    assert rank.wait(timeout=30) == 1


@pytest.fixture(scope="module")
def uninterrupted(trained: Callable[..., Path]) -> Path:
    return trained(*RUN)


def errors(result: subprocess.CompletedProcess[str]) -> list[str]:
    """What is told beside Lightning's greeting, which a driver lets through."""
    return [line for line in result.stderr.splitlines() if not line.startswith("Initializing distributed")]


# One rank kills itself in a step of the second stage. Where the others would hang, as with NCCL, they sleep.
KILLER = """
import os, signal, time
from rmt_lightning.training.answering import FactClassifier
from rmt_lightning.train import run

original = FactClassifier.training_step

def step(self, *args):
    if self.global_step == 10 and self.global_rank == {victim}:
        open("died", "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    if self.global_step == 10 and {hangs}:
        time.sleep(1000)
    return original(self, *args)

FactClassifier.training_step = step
run()
"""


@pytest.mark.soak
@pytest.mark.parametrize(
    ("victim", "hangs"),
    [
        pytest.param(
            victim, hangs, id=f"rank-{victim}-{'hangs' if hangs else 'fails'}",
            marks=pytest.mark.fault(
                f"SIGKILL of rank {victim}, the other one {'hangs' if hangs else 'fails'} in its collective",
                f"all end within a minute, in one line; {SAME}",
            ),
        )
        for victim in (0, 1)
        for hangs in (False, True)
    ],
)  # fmt: skip
def test_a_rank_is_killed(victim: int, hangs: bool, uninterrupted: Path, train: Run, tmp_path: Path) -> None:
    # This returns when no process is left that could write to our pipe.
    killed = train(*RUN, driver=KILLER.format(victim=victim, hangs=hangs))
    assert time.time() - (tmp_path / "died").stat().st_mtime < 60
    assert killed.returncode == (1 if victim else -signal.SIGKILL)
    how = "rank 1 was killed by SIGKILL" if victim else "rank 0 has died"
    assert errors(killed) == [f"error: {how}, and the others with it; go on with resume=run"]
    resumed = train("resume=run", small=False)
    assert resumed.returncode == 0, resumed.stderr
    assert_identical(weights(uninterrupted), weights(tmp_path / "run"))


# One rank is stopped, as by a debugger, and goes on later. At the end the other one would be gone by then.
HALTED = """
import os, signal, subprocess
from lightning.pytorch.strategies import DDPStrategy
from rmt_lightning.training.answering import FactClassifier
from rmt_lightning.train import run

kind, name = {where}
original, halted = getattr(kind, name), []

def halt(self, *args):
    if int(os.environ.get("LOCAL_RANK", 0)) == {victim} and not halted:
        halted.append(True)
        subprocess.Popen(["sh", "-c", f"sleep 15; kill -CONT {{os.getpid()}}"])
        os.kill(os.getpid(), signal.SIGSTOP)
    return original(self, *args)

setattr(kind, name, halt)
run()
"""
MOMENTS = {
    "as processes meet": "DDPStrategy, 'setup_environment'",
    "in a step": "FactClassifier, 'training_step'",
    "in a validation": "FactClassifier, 'validation_step'",
    "at the end": "DDPStrategy, 'teardown'",
}


@pytest.mark.soak
@pytest.mark.parametrize(
    ("victim", "where"),
    [
        pytest.param(
            victim, where, id=f"rank-{victim}-{when.replace(' ', '-')}",
            marks=pytest.mark.fault(f"rank {victim} is stopped for 15 s {when}", "the run goes on and ends as ever"),
        )
        for victim in (0, 1)
        for when, where in MOMENTS.items()
    ],
)  # fmt: skip
def test_a_rank_is_stopped(victim: int, where: str, uninterrupted: Path, train: Run, tmp_path: Path) -> None:
    stopped = train(*RUN, driver=HALTED.format(victim=victim, where=where))
    assert stopped.returncode == 0 and errors(stopped) == []
    assert_identical(weights(uninterrupted), weights(tmp_path / "run"))


# The real command, which asks itself to stop in a step of the second stage.
STOPPER = """
import os, signal
from rmt_lightning.training.answering import FactClassifier
from rmt_lightning.train import run

original = FactClassifier.training_step

def step(self, *args):
    if self.global_step == 10 and (self.global_rank == 0 or {everyone}):
        os.kill(os.getpid(), signal.SIGTERM)
    return original(self, *args)

FactClassifier.training_step = step
run()
"""


@pytest.mark.soak
@pytest.mark.parametrize(
    "everyone",
    [
        pytest.param(
            everyone, marks=pytest.mark.fault(f"SIGTERM to {who} of two", f"saved once, exit code 143; {SAME}"), id=who
        )
        for everyone, who in ((False, "rank 0"), (True, "both ranks"))
    ],
)
def test_sigterm(everyone: bool, uninterrupted: Path, train: Run, tmp_path: Path) -> None:
    stopped = train(*RUN, driver=STOPPER.format(everyone=everyone))
    assert stopped.returncode == 143 and errors(stopped) == []
    assert stopped.stdout.count("stopped by SIGTERM and saved; go on with resume=run") == 1
    assert torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["global_step"] == 11
    assert train("resume=run", small=False).returncode == 0
    assert_identical(weights(uninterrupted), weights(tmp_path / "run"))


@pytest.mark.soak
@pytest.mark.parametrize("steps", [4, 14])
@pytest.mark.fault("trainer.max_steps ends a run of two ranks inside an epoch, in either of its phases", SAME)
def test_max_steps_inside_an_epoch(steps: int, train: Run, tmp_path: Path) -> None:
    held = ("hold=state_passing", "hold.steps=6", "hold.pool=8", "hold.until_rate=1", "curriculum.max_segments=2")
    held = (*held, "data.segment_length=48")
    assert train(*RUN, *held, "hydra.run.dir=whole").returncode == 0
    assert train(*RUN, *held, f"trainer.max_steps={steps}").returncode == 0
    resumed = train("resume=run", "trainer.max_steps=-1", small=False)
    assert resumed.returncode == 0, resumed.stderr
    assert_identical(weights(tmp_path / "whole"), weights(tmp_path / "run"))


@pytest.mark.fault("more processes than samples of a validation", "refused in one line, instead of waiting for ever")
@pytest.mark.parametrize("typed", ["data.validation_samples=1", "task=language_modeling data.validation_documents=1"])
def test_each_process_has_something_to_validate(typed: str, refused: Callable[..., str], tmp_path: Path) -> None:
    told = refused("trainer=ddp_cpu", "noise.documents=20", *typed.split(), "hydra.run.dir=run")
    assert told.startswith("error: trainer.devices × trainer.num_nodes = 2: a validation has 1 to share; give fewer"), (
        told
    )
    assert not (tmp_path / "run").exists()
