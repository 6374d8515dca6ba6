"""Sweeps: a process for each job whichever launcher starts it, going on after a stop, and one table over all jobs."""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import SMALL, Run
from omegaconf import OmegaConf
from test_report import Page

from rmt_lightning import report
from rmt_lightning.analysis import figures, plots
from rmt_lightning.analysis.runs import Run as RunFolder
from rmt_lightning.analysis.sweeps import Job, Sweep, mean, read_sweep, t_quantile
from rmt_lightning.sweep import _name, _reason, _sweep_name, _swept

OF_SMALL = [word.split("=")[0] for word in SMALL]


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def only(folder: Path) -> Path:
    (sweep,) = (folder / "outputs" / "sweeps").glob("*/*")
    return sweep


def test_one_job_fails_and_the_other_is_not_run_twice(train: Run, tmp_path: Path) -> None:
    first = train("model.memory_size=2,99", "--multirun")
    assert first.returncode == 1, first.stderr
    assert first.stderr == ""
    sweep = only(tmp_path)
    assert sweep.parent.name == "detect" and sweep.name.startswith("memory_size_2_99-")
    good, bad = rows(sweep / "sweep.csv")
    assert (good["model.memory_size"], good["status"], good["reason"]) == ("2", "finished", "")
    assert (bad["model.memory_size"], bad["status"]) == ("99", "failed")
    assert bad["reason"].startswith("data.segment_length=40: 99 memory and 3 special tokens leave no room for text")
    tested = rows(sweep / "memory_size_2" / "evaluation.csv")
    assert [good["accuracy_1"], good["accuracy_4"]] == [row["accuracy"] for row in tested]
    assert bad["reason"] in first.stdout and "memory_size_2: finished, " in first.stdout
    assert (sweep / "sweep.png").exists() and [row["with_result"] for row in rows(sweep / "summary.csv")] == ["1", "0"]
    # One run a job: nothing has begun a sweep or a run of its own beside it.
    assert {path.parent for path in tmp_path.rglob("train.log")} == {sweep / "memory_size_2"}

    kept = {path: path.stat().st_mtime_ns for path in (sweep / "memory_size_2").rglob("*")}
    again = train("model.memory_size=choice(2)", "hydra.mode=MULTIRUN", f"hydra.sweep.dir={sweep}")
    assert "memory_size_2: done before: finished, " in again.stdout, again.stderr
    assert {path: path.stat().st_mtime_ns for path in (sweep / "memory_size_2").rglob("*")} == kept


needs = {
    name: pytest.mark.skipif(importlib.util.find_spec(name) is None, reason="pip install 'rmt-lightning[sweeps]'")
    for name in ("hydra_plugins.hydra_joblib_launcher", "hydra_plugins.hydra_submitit_launcher",
                 "hydra_plugins.hydra_optuna_sweeper")
} if importlib.util.find_spec("hydra_plugins") else {}

# Writes down every Python process of the command, and kills rank 1 of one job.
WITNESS = """
import os, sys
if "rmt_lightning.train" in sys.orig_argv:
    with open({record!r}, "a") as file:
        file.write(f"{{os.environ.get('LOCAL_RANK', 0)}} {{' '.join(sys.orig_argv)}}\\n")
    if os.environ.get("LOCAL_RANK") == "1" and any("devices_2-memory_size_3" in word for word in sys.orig_argv):
        os._exit(7)
"""


@pytest.mark.soak
def test_ddp(train: Run, environment: dict[str, str], tmp_path: Path) -> None:
    """Each job starts its own ranks, as many as it asks for; one whose rank dies does not stop the others."""
    (tmp_path / "witness").mkdir()
    record = tmp_path / "processes.txt"
    (tmp_path / "witness" / "sitecustomize.py").write_text(WITNESS.format(record=str(record)))
    path = [str(tmp_path / "witness"), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    result = train("trainer=ddp_cpu", "trainer.devices=1,2", "model.memory_size=3,2", "--multirun")
    sweep = only(tmp_path)
    jobs = {row["job"]: row for row in rows(sweep / "sweep.csv")}
    statuses = {name: row["status"] for name, row in jobs.items()}
    assert statuses == {
        "devices_1-memory_size_3": "finished", "devices_1-memory_size_2": "finished",
        "devices_2-memory_size_3": "failed", "devices_2-memory_size_2": "finished",
    }, result.stdout + result.stderr  # fmt: skip
    assert result.returncode == 1
    # The sweep itself, and behind it each job's ranks; each in the folder of its job and none elsewhere.
    processes = [line.split(" ", 1) for line in record.read_text().splitlines()]
    ranks = {name: [rank for rank, words in processes if f"/{name}" in words] for name in jobs}
    assert ranks == {name: ["0", "1"] if row["trainer.devices"] == "2" else ["0"] for name, row in jobs.items()}
    assert len(processes) == 1 + 6
    for name in jobs:
        folder = sweep / name
        assert yaml.safe_load((folder / "config.yaml").read_text())["trainer"]["devices"] == int(jobs[name]["trainer.devices"])
        assert (folder / "evaluation.csv").exists() == (statuses[name] == "finished")
    assert {file.parent for file in tmp_path.rglob("config.yaml")} == {sweep / name for name in jobs}
    # Two ranks see twice as many samples a step: the runs are not the same.
    assert {jobs[name]["steps"] for name in jobs if statuses[name] == "finished"} == {"18"}
    assert not _alive(sweep)


def _alive(sweep: Path) -> list[str]:
    """Processes that still work for a sweep."""
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if str(sweep.name) in line and "rmt_lightning" in line]


@pytest.mark.soak
def test_torchrun(environment: dict[str, str], tmp_path: Path) -> None:
    def torchrun(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "-m", "rmt_lightning.train"]
        return subprocess.run(
            [*command, *SMALL, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
        )

    refused = torchrun("trainer=ddp_cpu", "model.memory_size=2,3", "--multirun")
    assert refused.returncode != 0 and not (tmp_path / "outputs").exists()
    assert "error: --multirun: several processes would each run the whole sweep; start it without torchrun" in refused.stderr
    result = torchrun("trainer=ddp_cpu", "hydra.run.dir=run")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run" / "evaluation.csv").exists() and not (tmp_path / "outputs").exists()
    starts = json.loads((tmp_path / "run" / "hardware.json").read_text())
    assert len(starts) == 1


LONG = ("curriculum.max_segments=2", "curriculum.steps=300", "test.segments=[1]", "model.memory_size=2,3,4")


def wait_for(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.soak
@pytest.mark.skipif(importlib.util.find_spec("hydra_plugins") is None, reason="needs rmt-lightning[sweeps]")
def test_stopped_and_started_again(environment: dict[str, str], tmp_path: Path) -> None:
    """Ctrl-C reaches every process at a terminal, SIGTERM often one alone: either way what runs is saved."""
    settings = [word for word in SMALL if word.split("=")[0] not in {long.split("=")[0] for long in LONG}]
    command = [sys.executable, "-m", "rmt_lightning.train", *settings, *LONG, "--multirun"]

    def start(*words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*command[:3], *words, *command[3:]], cwd=tmp_path, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip

    def saved(name: str) -> bool:
        return bool(list(tmp_path.glob(f"outputs/sweeps/*/*/{name}/checkpoints/last.ckpt")))

    process = start("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    wait_for(lambda: saved("memory_size_2") and saved("memory_size_3"))
    os.killpg(process.pid, signal.SIGINT)
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    sweep = only(tmp_path)
    assert errors == "" and "memory_size_3: interrupted" in out and "memory_size_4" not in out
    assert [row["status"] for row in rows(sweep / "sweep.csv")] == ["interrupted or running"] * 2
    for name in ("memory_size_2", "memory_size_3"):
        assert "SIGTERM: saving after this step" in (sweep / name / "train.log").read_text()
    assert not _alive(sweep) and not (sweep / "stop").exists()

    process = start()
    wait_for(lambda: "memory_size_3" in " ".join(_alive(sweep)) or saved("memory_size_4"))
    process.send_signal(signal.SIGTERM)
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 143, errors
    assert "memory_size_2: finished, " in out and not _alive(sweep)

    process = start()
    out, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert "memory_size_2: done before: finished" in out
    assert [row["status"] for row in rows(sweep / "sweep.csv")] == ["finished"] * 3
    # Each was trained as long as it would have been at one go.
    assert {row["steps"] for row in rows(sweep / "sweep.csv")} == {"600"}


@pytest.mark.soak
@pytest.mark.skipif(importlib.util.find_spec("hydra_plugins") is None, reason="needs rmt-lightning[sweeps]")
def test_submitit_runs_what_slurm_would(train: Run, environment: dict[str, str], tmp_path: Path) -> None:
    # What SLURM tells a job's only task must not reach the ranks that the job starts itself.
    environment |= {"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_NAME": "job"}
    result = train(
        "hydra/launcher=submitit_local", "trainer=ddp_cpu", "model.memory_size=2,99", "--multirun"
    )
    assert result.returncode == 1, result.stderr
    sweep = only(tmp_path)
    assert [row["status"] for row in rows(sweep / "sweep.csv")] == ["finished", "failed"]


@pytest.mark.soak
@pytest.mark.skipif(importlib.util.find_spec("hydra_plugins") is None, reason="needs rmt-lightning[sweeps]")
def test_optuna_searches(train: Run, tmp_path: Path) -> None:
    words = ("+sweep=search", "hydra.sweeper.n_trials=3", "hydra.sweeper.params={model.memory_size:'choice(2,3,99)'}")
    result = train(*words)
    sweep = only(tmp_path)
    jobs = rows(sweep / "sweep.csv")
    assert {row["model.memory_size"] for row in jobs} <= {"2", "3", "99"}, result.stderr
    best = yaml.safe_load((sweep / "optimization_results.yaml").read_text())
    assert best["best_value"] == pytest.approx(min(1 - float(row["accuracy_4"]) for row in jobs if row["accuracy_4"]))
    again = train(*words)
    assert again.stdout.count("done before") >= 1
    assert len(rows(sweep / "sweep.csv")) == len(jobs)
    refused = train(*words, "hydra.sweeper.direction=maximize")
    assert refused.returncode == 2 and "leave it at minimize" in refused.stderr
