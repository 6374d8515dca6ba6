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
    other = train("model.memory_size=choice(2)", "optim.lr=0.5", f"hydra.sweep.dir={sweep}", "--multirun")
    assert other.returncode == 2 and other.stderr.count("\n") == 1
    assert "memory_size_2: holds a run with optim.lr=0.001, not 0.5; choose another folder" in other.stderr
    assert {path: path.stat().st_mtime_ns for path in (sweep / "memory_size_2").rglob("*")} == kept
