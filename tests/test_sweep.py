"""Sweeps: a process for each job whichever launcher starts it, going on after a stop, and one table over all jobs."""

from __future__ import annotations

import csv
import errno
import importlib.util
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import SMALL, Run
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from test_report import Page, pixels

from rmt_lightning import report
from rmt_lightning import train as front_door
from rmt_lightning.app.plotting import with_chances
from rmt_lightning.app.processes import RANK
from rmt_lightning.app.sweep import Sweep as Callback
from rmt_lightning.app.sweep import _known_settings, _name, _reason, _sweep_name, _swept
from rmt_lightning.core.errors import UserError
from rmt_lightning.reporting import figures
from rmt_lightning.reporting.sweeps import Job, Sweep, mean, read_sweep, sum_up

WITH_PLUGINS = pytest.mark.skipif(
    importlib.util.find_spec("hydra_plugins") is None, reason="pip install 'rmt-lightning[sweeps]'"
)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def only(folder: Path) -> Path:
    (sweep,) = (folder / "outputs" / "sweeps").glob("*/*")
    return sweep


@pytest.mark.soak
@pytest.mark.fault("a sweep has a budget inside an epoch, and one of its jobs fails", "the other one has a result")
def test_one_job_fails_and_the_other_is_not_run_twice(train: Run, tmp_path: Path) -> None:
    # A budget that ends inside an epoch, and between two rows of metrics.csv.
    first = train("model.memory_size=2,99", "trainer.max_steps=4", "cache_dir=mine", "--multirun")
    assert first.returncode == 1, first.stderr
    assert first.stderr == ""
    # What says where things are on this machine goes on to the jobs.
    assert (tmp_path / "mine" / "noise").is_dir()
    sweep = only(tmp_path)
    assert sweep.parent.name == "detect" and sweep.name.startswith("memory_size_2_99-")
    good, bad = rows(sweep / "sweep.csv")
    assert (good["model.memory_size"], good["status"], good["reason"]) == ("2", "stopped at max_steps", "")
    assert good["steps"] == "4"
    assert (bad["model.memory_size"], bad["status"]) == ("99", "failed")
    assert bad["reason"].startswith("data.segment_length=40: 99 memory and 3 special tokens leave no room for text")
    tested = rows(sweep / "memory_size_2" / "evaluation.csv")
    assert [good["accuracy_1"], good["accuracy_4"]] == [row["accuracy"] for row in tested]
    assert bad["reason"] in first.stdout and "memory_size_2: stopped at max_steps, " in first.stdout
    begun, ended = re.findall(r"^memory_size_\d+: .*(job .*|after .*)$", first.stdout, re.MULTILINE)[:2]
    assert begun == "job 1 of 2 started" and re.fullmatch(r"after [\d.]+ s, about [\d.]+ s left", ended)
    assert (sweep / "sweep.png").exists() and [row["with_result"] for row in rows(sweep / "summary.csv")] == ["1", "0"]
    # One run a job: nothing has begun a sweep or a run of its own beside it.
    assert {path.parent for path in tmp_path.rglob("train.log")} == {sweep / "memory_size_2"}

    kept = {path: path.stat().st_mtime_ns for path in (sweep / "memory_size_2").rglob("*")}
    again = train(
        "model.memory_size=choice(2)", "trainer.max_steps=4", "hydra.mode=MULTIRUN", f"hydra.sweep.dir={sweep}"
    )
    assert "memory_size_2: done before: stopped at max_steps, " in again.stdout, again.stderr
    assert {path: path.stat().st_mtime_ns for path in (sweep / "memory_size_2").rglob("*")} == kept


SHARED = "two jobs would share this folder; give each value once, or 'hydra.sweep.subdir=${hydra:job.num}'"
DIFFERENT = [
    ("hydra.sweep.dir=", "hydra.sweep.dir=: is empty; name a folder, or leave it out"),
    ("hydra.sweep.subdir=", "hydra.sweep.subdir=: is empty; name a folder, or leave it out"),
    ("hydra.sweep.subdir=a", f"hydra.sweep.subdir=a: {SHARED}"),
    ("hydra.run.dir=x", "hydra.run.dir=x: is where a single run goes; of a sweep, give hydra.sweep.dir=…"),
    ("hydra.sweep.dir=run", "hydra.sweep.dir=run: holds a run; choose another folder"),
    ("hydra.sweep.dir=/proc/x", "hydra.sweep.dir=/proc/x: No such file or directory; choose another folder"),
    ("seed=3", "seed=1,2 and seed=3: is given twice, of which one would count; leave one of them out"),
    ("+data.x=1,1 data.batch_size=4", f"hydra.sweep.subdir=seed_1-x_1: {SHARED}"),
    ("model=glob(*) model=glob(r*)", "model=glob(*) and model=glob(r*): is given twice"),
    ("data.batch_size=glob(*)", "data.batch_size=glob(*): stands for no value; give some (glob is for the choices of"),
    ("task=glob(x*)", "task=glob(x*): stands for no value"),
    ("data.batch_size=range(5,1)", "data.batch_size=range(5,1): stands for no value"),
    (
        "optim.lr=interval(1,2)",
        "optim.lr=interval(1,2): is for a search; give values, such as optim.lr=…,…, or +sweep=",
    ),
]


@pytest.mark.fault("a sweep does something else than was typed", "refused in one line, no job begins")
@pytest.mark.parametrize(("typed", "message"), DIFFERENT, ids=[typed for typed, _ in DIFFERENT])
def test_a_sweep_that_would_not_be_the_one_that_was_typed(
    typed: str, message: str, refused: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    assert refused("--multirun", "seed=1,2", *typed.split()).startswith(f"error: {message}")
    assert [path.name for path in tmp_path.rglob("*")] == ["run", "config.yaml"]


def test_a_plugin_that_is_not_installed(refused: Callable[..., str]) -> None:
    told = refused("--multirun", "hydra/launcher=absent", "seed=1,2")
    assert told.endswith("; others come with pip install 'rmt-lightning[sweeps]'\n")


@WITH_PLUGINS
def test_a_search_of_nothing(refused: Callable[..., str]) -> None:
    told = refused("--multirun", "hydra/sweeper=optuna", "seed=3")
    assert told.startswith(
        "error: hydra/sweeper: a search has nothing to choose from; give values, such as model.memory"
    )


def test_jobs_that_are_numbered_share_no_folder(refused: Callable[..., str]) -> None:
    for number in ("hydra:job.num", "hydra.job.num"):
        words = ("--multirun", "seed=1,1", f"hydra.sweep.subdir=${{{number}}}", "trainer.num_nodes=2")
        # The next thing that is looked at.
        assert refused(*words).startswith("error: trainer.num_nodes=2: a job of a sweep runs on one machine")


def test_names_need_no_quotes() -> None:
    swept = {"model.memory_size": "2,5,10", "seed": "1,2"}
    folder = _sweep_name("detect", swept, ["model.memory_size=2,5,10", "seed=1,2"])
    assert folder == "detect/memory_size_2_5_10-seed_1_2"
    # What else was typed makes another sweep; the order in which it was typed does not.
    fixed = [_sweep_name("detect", swept, [*order, "seed=1,2"]) for order in (["a.b=1", "+c=2"], ["c=2", "a.b=1"])]
    assert fixed[0] == fixed[1] != folder and fixed[0].startswith(f"{folder}-")
    assert _sweep_name("detect", swept, ["+sweep=memory_size"]) == folder
    names = [
        _name({"model.bptt_depth": "-1", "seed": "1"}),
        _name({"optim.lr": "1e-05", "hold.lr": "0.1"}),
        _name({"noise.path": "'books/*.txt'", "optim.lr": "interval(1e-5,1e-3)", "model": "lstm"}),
        _name({"test.segments": str(list(range(100)))}),
    ]
    assert names[:2] == ["bptt_depth_-1-seed_1", "optim.lr_1e-05-hold.lr_0.1"]
    assert names[2] == "path__books_.txt_-lr_interval_1e-5_1e-3_-model_lstm"
    assert len(names[3]) <= 100 and names[3] != _name({"test.segments": str(list(range(101)))})
    for name in [folder, *names]:
        assert OverridesParser.create().parse_override(f"resume=outputs/{name}").value() == f"outputs/{name}"


def test_what_is_swept() -> None:
    sweeper = OmegaConf.create({"params": {"model.memory_size": "2,5", "seed": "1,2,3"}})
    assert _swept(["+sweep=memory_size", "seed=4", "optim.lr=1e-3,1e-4", "test.segments=[1,2]"], sweeper) == {
        "model.memory_size": "2,5", "seed": "4", "optim.lr": "1e-3,1e-4",
    }  # fmt: skip


def test_a_folder_with_another_run_is_left_alone(tmp_path: Path) -> None:
    config = OmegaConf.create(
        {"optim": {"lr": 0.1}, "logger": {"save_dir": "here"}, "cache_dir": "a", "data": "${seed}"}
    )
    config.seed = 3
    parts = ("answer", "task", "noise", "backbone", "model")
    config.update({part: {} for part in parts})
    assert not _known_settings(config, tmp_path, [])
    # As a full disk leaves it.
    (tmp_path / "config.yaml").touch()
    assert not _known_settings(config, tmp_path, [])
    (tmp_path / "config.yaml").write_text(
        "optim: {lr: 0.1}\nlogger: {}\ncache_dir: b\nseed: 3\ndata: 3\n" + "".join(f"{part}: {{}}\n" for part in parts)
    )
    assert _known_settings(config, tmp_path, [])
    config.optim.lr = 0.2
    with pytest.raises(
        UserError, match=r"holds a run with optim\.lr=0\.1, not 0\.2; choose another folder with hydra\."
    ):
        _known_settings(config, tmp_path, [])


def test_why_a_job_failed() -> None:
    assert _reason(-9, "1 of 2\n") == "killed by SIGKILL, perhaps for want of memory"
    assert _reason(2, "noise\nerror: seed=-1: must be positive\n") == "seed=-1: must be positive"
    trace = (
        "Traceback (most recent call last):\n  File x\ntorch.OutOfMemoryError: CUDA out of memory. Tried 2 GiB\nbye\n"
    )
    assert _reason(1, trace) == "torch.OutOfMemoryError: CUDA out of memory. Tried 2 GiB"
    assert _reason(1, "so long\n\n") == "so long" and _reason(3, "") == "exit code 3"


def test_a_job_is_told_of_no_rank_but_of_its_devices() -> None:
    ranks = "RANK LOCAL_RANK NODE_RANK GROUP_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT SLURM_NTASKS"
    assert all(RANK.fullmatch(name) for name in [*ranks.split(), "TORCHELASTIC_RUN_ID", "SLURM_PROCID"])
    assert not any(RANK.fullmatch(name) for name in ("CUDA_VISIBLE_DEVICES", "PATH", "OMP_NUM_THREADS", "NCCL_DEBUG"))


def test_students_t() -> None:
    assert mean([0.5]).half is None
    found = mean([0.8, 0.9, 1.0])
    assert (found.value, found.half) == pytest.approx((0.9, 4.3027 * 0.1 / math.sqrt(3)), rel=1e-4)
    # 95 of 100 intervals hold the true mean.
    draw = random.Random(1)
    samples = [mean([draw.gauss(0, 1) for _ in range(3)]) for _ in range(4000)]
    assert sum(abs(one.value) <= (one.half or 0) for one in samples) / 4000 == pytest.approx(0.95, abs=0.01)


def grid(**axes: list[Any]) -> Sweep:
    """All combinations of some values; the score is 0.1 times the first, plus 0.01 times the seed."""
    jobs = []
    for number, values in enumerate(itertools.product(*axes.values())):
        settings = dict(zip(axes, values, strict=True))
        score = 0.1 * values[0] + 0.01 * settings.get("seed", 0)
        jobs.append(
            Job(f"job{number}", number, settings, "finished", "", None, {"accuracy_1": 1.0, "accuracy_64": score})
        )
    return Sweep("test", jobs)


def test_groups_over_seeds() -> None:
    sweep = grid(memory=[2, 5], seed=[1, 2, 3])
    failed = Job("late", 9, {"memory": 5, "seed": 4}, "failed", "out of memory", None, {})
    lost = Sweep("test", [*sweep.jobs, failed])
    two, five = lost.groups
    assert (lost.axes, lost.measures) == (["memory"], ["accuracy_1", "accuracy_64"])
    assert two.scores["accuracy_64"].value == pytest.approx(0.22)
    assert two.scores["accuracy_64"].half == pytest.approx(4.3027 * 0.01 / math.sqrt(3), rel=1e-4)
    assert (two.statuses(), five.statuses()) == ("finished", "3 finished, 1 failed")
    assert (five.row()["jobs"], five.row()["with_result"]) == (4, 3)
    assert five.scores == sweep.groups[1].scores
    assert failed.objective == math.inf and sweep.jobs[0].objective == pytest.approx(1 - 0.21)
    assert Job("text", 0, {}, "finished", "", None, {"bits_per_byte": 1.2, "perplexity": 30.0}).objective == 30


@pytest.mark.parametrize(
    ("axes", "form", "panels"),
    [
        ({"memory": [2, 5, 10]}, "curves", 1),
        ({"memory": [2, 5], "seed": [1, 2]}, "curves", 1),
        ({"memory": [2, 5], "depth": [1, -1], "seed": [1, 2]}, "map", 1),
        ({"memory": [2, 5], "depth": [1, 2], "model": ["lstm", "ntm"]}, "slices", 3),
        ({"lr": [number / 100 for number in range(1, 30)]}, "slices", 1),
        ({"seed": [1, 2, 3]}, "slices", 1),
    ],
)
def test_figures(axes: dict[str, list[Any]], form: str, panels: int) -> None:
    sweep = grid(**axes)
    assert sweep.form == form
    figure = figures.sweep(sweep)
    # A heat map has a panel for its colors, too.
    assert len(figure.axes) - (form == "map") == panels
    figure.canvas.draw()
    assert [figure.axes[place].get_xlabel() for place in range(panels)] == [*axes][:panels]


def test_numbers_in_the_figures() -> None:
    sweep = grid(memory=[2, 5], depth=[1, -1], seed=[1, 2])
    heat = figures.sweep(sweep).axes[0]
    image = heat.images[0].get_array()
    assert image is not None and image.tolist() == [pytest.approx([0.215, 0.515])] * 2
    assert [label.get_text() for label in heat.get_xticklabels()] == ["2", "5"]
    assert [label.get_text() for label in heat.get_yticklabels()] == ["1", "-1"]
    assert "21.5%\n± 6.4%" in [text.get_text() for text in heat.texts]
    # Of each measure the means, the ends of their intervals and the seeds.
    drawn = figures.sweep(grid(memory=[2, 5], seed=[1, 2])).axes[0].lines
    dots, line = drawn[1], drawn[-1]
    assert list(line.get_ydata()) == pytest.approx([0.215, 0.515])
    assert list(dots.get_ydata()) == pytest.approx([0.21, 0.22, 0.51, 0.52])


def test_the_report_of_a_sweep(finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number, (size, seed) in enumerate(itertools.product((2, 5), (1, 2))):
        folder = tmp_path / "sweep" / f"memory_size_{size}-seed_{seed}"
        shutil.copytree(finished_run, folder)
        settings = {"model.memory_size": size, "seed": seed}
        reason = "<b>no</b> space left" if (size, seed) == (5, 2) else None
        (folder / "job.json").write_text(json.dumps({"number": number, "settings": settings, "failed": reason}))
    report.main(["sweep"])
    page = Page(Path("report.html"))
    accuracy = float(rows(finished_run / "evaluation.csv")[-1]["accuracy"])
    _, two, five = ([cell.strip() for cell in row] for row in page.tables["sweep-0-groups"])
    assert two[:2] == ["2", "2"] and two[3] == f"{accuracy:.1%} ± 0.0%" and two[-1] == "finished"
    assert five[:2] == ["5", "2"] and five[3] == f"{accuracy:.1%}" and five[-1] == "1 finished, 1 failed"
    assert "memory_size_5-seed_2: <b>no</b> space left" in page.text
    (picture,) = [attributes for tag, attributes in page.tags if tag == "img"]
    assert picture["alt"] == "Figure of sweep sweep"
    assert pixels(str(picture["src"])) == pixels(Path("sweep/sweep.png").read_bytes())
    # Both with a line for guessing.
    assert with_chances(read_sweep(Path("sweep"))).chances == [1 / 6]
    assert len(page.tables["runs"]) == 5
    assert [row["status"] for row in rows(Path("sweep/sweep.csv"))] == ["finished"] * 3 + ["failed"]
    assert {path.name for path in Path("sweep").iterdir() if path.is_file()} == {
        "sweep.csv", "summary.csv", "sweep.png", "sweep.pdf",
    }  # fmt: skip
    # With a single value nothing is swept: there is a table, and nothing to draw.
    alone = Path("sweep") / "memory_size_2-seed_1" / "job.json"
    alone.write_text(json.dumps({"number": 0, "settings": {}, "failed": None}))
    shutil.copytree(alone.parent, "alone/job")
    sum_up(read_sweep(Path("alone")), Path("alone"))
    assert {path.name for path in Path("alone").iterdir() if path.is_file()} == {"sweep.csv", "summary.csv"}
    alone.write_text("{")
    assert {job.number for job in read_sweep(Path("sweep")).jobs} == {0, 1, 2, 3}


REFUSED = [
    ("resume=run model.memory_size=2,3 --multirun", "resume: a sweep that was stopped goes on with the same command"),
    (
        "trainer.num_nodes=2 model.memory_size=2,3 --multirun",
        "trainer.num_nodes=2: a job of a sweep runs on one machin",
    ),
    ("trainer.num_nodes=1,2 --multirun", "trainer.num_nodes=2: a job of a sweep runs on one machine"),
    ("sweep=memory_size", "sweep=memory_size: is not among the defaults; write +sweep=memory_size"),
    ("model.memory_sise=2,3 --multirun", "model.memory_sise: no such setting; did you mean memory_size?"),
    ("model=lstm,lsmt --multirun", "model=lsmt: no such choice; did you mean lstm?"),
    ("model.memory_size=2,3", "model.memory_size=2,3: a comma separates the values of a sweep"),
    (
        "hydra.sweep.dir=a,b --multirun",
        """hydra.sweep.dir=a,b: is one for all jobs; for one text with commas, type 'hydra.sweep.dir="a,b"'""",
    ),
]


@pytest.mark.fault("the disk is full while a sweep's tables are written", "one line, exit code 1; those before stay")
def test_a_full_disk_at_the_end(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished_run, tmp_path / "seed_1")
    (tmp_path / "seed_1" / "job.json").write_text('{"number": 0, "settings": {"seed": 1}, "failed": null}')
    sum_up(read_sweep(tmp_path), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.glob("*.*")}
    assert {path.name for path in before} == {"summary.csv", "sweep.csv", "sweep.pdf", "sweep.png"}
    callback = Callback({"seed": "1"})
    callback.folder = tmp_path

    def no_space(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patched, pytest.raises(SystemExit, match="1"):
            patched.setattr(os, name, no_space)
            callback.on_multirun_end(OmegaConf.create())
        told = capsys.readouterr().err
        assert told.startswith(f"error: no space left while writing {tmp_path}/sweep.csv: free some, and ")
        assert told.count("\n") == 1 and {path: path.read_bytes() for path in tmp_path.glob("*.*")} == before


@pytest.mark.parametrize(("typed", "message"), REFUSED, ids=[typed for typed, _ in REFUSED])
def test_refused(
    typed: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train", *typed.split()])
    with pytest.raises(SystemExit) as exit_:
        front_door.run()
    GlobalHydra.instance().clear()
    told = capsys.readouterr().err
    assert exit_.value.code == 2 and told.startswith(f"error: {message}") and told.count("\n") == 1
    assert not (tmp_path / "outputs").exists()


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
    assert jobs["devices_2-memory_size_3"]["reason"].startswith("rank 1 ended with exit code 7")
    # Each job's ranks, each in the folder of its job and none elsewhere; the sweep itself has been forked.
    processes = [line.split(" ", 1) for line in record.read_text().splitlines()]
    ranks = {name: [rank for rank, words in processes if f"/{name}" in words] for name in jobs}
    assert ranks == {name: ["0", "1"] if row["trainer.devices"] == "2" else ["0"] for name, row in jobs.items()}
    assert len(processes) == 6
    for name in jobs:
        folder = sweep / name
        assert yaml.safe_load((folder / "config.yaml").read_text())["trainer"]["devices"] == int(
            jobs[name]["trainer.devices"]
        )
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
    assert (
        "error: --multirun: several processes would each run the whole sweep; start it without torchrun"
        in refused.stderr
    )
    result = torchrun("trainer=ddp_cpu", "hydra.run.dir=run")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run" / "evaluation.csv").exists() and not (tmp_path / "outputs").exists()
    starts = json.loads((tmp_path / "run" / "hardware.json").read_text())
    assert len(starts) == 1


LONG = ("curriculum.max_segments=2", "curriculum.steps=150", "test.segments=[1]", "model.memory_size=2,3,4")


def wait_for(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.soak
@WITH_PLUGINS
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
    wait_for((sweep / "memory_size_2" / "metrics" / "version_1").exists)
    process.send_signal(signal.SIGTERM)
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 143, errors
    assert "memory_size_2: " in out and "memory_size_4" not in out and not _alive(sweep)

    process = start()
    out, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    assert [row["status"] for row in rows(sweep / "sweep.csv")] == ["finished"] * 3
    # Each was trained as long as it would have been at one go.
    assert {row["steps"] for row in rows(sweep / "sweep.csv")} == {"300"}


@pytest.mark.soak
@WITH_PLUGINS
def test_submitit_runs_what_slurm_would(train: Run, environment: dict[str, str], tmp_path: Path) -> None:
    # What SLURM tells a job's only task must not reach the ranks that the job starts itself.
    environment |= {"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_NAME": "job"}
    result = train("hydra/launcher=submitit_local", "trainer=ddp_cpu", "model.memory_size=2,99", "--multirun")
    assert result.returncode == 1, result.stderr
    sweep = only(tmp_path)
    assert [row["status"] for row in rows(sweep / "sweep.csv")] == ["finished", "failed"]


@pytest.mark.soak
def test_ray_runs_jobs_of_several_processes(train: Run, environment: dict[str, str], tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_ray_launcher", reason="the extra ray is not installed")
    environment |= {"RAY_AUTH_MODE": "disabled"}
    result = train("hydra/launcher=ray", "trainer=ddp_cpu", "model.memory_size=2,99", "--multirun")
    assert result.returncode == 1, result.stderr
    assert [row["status"] for row in rows(only(tmp_path) / "sweep.csv")] == ["finished", "failed"]


@pytest.mark.soak
@WITH_PLUGINS
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
