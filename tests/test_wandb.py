"""Runs and workspaces on W&B: what the file of an offline run holds, and what a server is told."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL, Run
from wandb.proto.wandb_internal_pb2 import Record
from wandb_server import serving

from rmt_lightning import dashboard
from rmt_lightning.core.errors import UserError
from rmt_lightning.core.files import read_csv
from rmt_lightning.reporting import workspace
from rmt_lightning.training.callbacks.wandb_run import WandbRun

# A key as W&B makes them, which nobody has.
KEY = "0123456789abcdef" * 3
# What panels of the workspace show of a run on facts.
SHOWN = {
    "train/loss", "train/tokens_per_second", "train/host_memory_mb", "val/accuracy", "stage", "curriculum/stage",
    "curriculum/steps", "curriculum/accuracy", "test/segments", "test/accuracy", "results/curriculum",
    "results/attention/last", "results/stages", "results/evaluation", "_step",
}  # fmt: skip
HELD = {"state_passing/step", "state_passing/rate"}
TRAIN = (sys.executable, "-m", "rmt_lightning.train")


def wandb_records(path: Path) -> list[Record]:
    """Read an offline run: a header of 7 bytes, then blocks of 32 KiB of LevelDB's log format."""
    data, position, records, parts = path.read_bytes(), 7, [], b""
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        length = int.from_bytes(data[position + 4 : position + 6], "little")
        kind = data[position + 6]
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a full record, or the last part of one
            records.append(Record.FromString(parts))
            parts = b""
    return records


class OfflineRun:
    """What the file of an offline run holds."""

    def __init__(self, path: Path) -> None:
        self.files = path.parent / "files"
        records = wandb_records(path)
        (self.run,) = (record.run for record in records if record.HasField("run"))
        self.rows = [_items(record.history.item) for record in records if record.HasField("history")]
        self.config = _items(item for record in records for item in record.config.update)
        self.summary = _items(item for record in records for item in record.summary.update)
        self.metrics = {m.name or m.glob_name: m for record in records if (m := record.metric)}
        self.artifacts = [record.artifact for record in records if record.HasField("artifact")]
        (self.exit_code,) = (record.exit.exit_code for record in records if record.HasField("exit"))

    @property
    def steps(self) -> list[int]:
        return [row["_step"] for row in self.rows]

    def logged(self, name: str) -> list[Any]:
        return [row[name] for row in self.rows if name in row]

    def file(self, name: str, kind: str) -> Path:
        """The file of a table or a picture, as the last row that has it names it."""
        entry = {key.removeprefix(f"{name}."): value for key, value in self.rows[-1].items() if key.startswith(name)}
        assert entry["_type"] == kind
        return self.files / entry["path"]


def _items(items: Any) -> dict[str, Any]:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def offline_runs(folder: Path) -> list[OfflineRun]:
    return [OfflineRun(path) for path in sorted(folder.glob("wandb/offline-run-*/*.wandb"))]


def at_a_terminal(command: tuple[str, ...], folder: Path, environment: dict[str, str]) -> str:
    """Run a command that may ask, and tell what it has printed; nobody answers."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(command, cwd=folder, env=environment, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        printed = b""
        try:
            while some := os.read(ours, 4096):
                printed += some
        except OSError:  # how Linux tells that the other side has been closed
            pass
        os.close(ours)
        assert process.wait(240) == 0, printed.decode()
    return printed.decode()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, cache: Path, launch: Run) -> Path:
    """A run of a sweep that was trained without a key, then resumed with one but offline."""
    folder = tmp_path_factory.mktemp("wandb")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB_", "RMT_", "LOCAL_RANK"))}
    alone = {"RMT_LIGHTNING_CACHE": str(cache), "OMP_NUM_THREADS": "1", "NETRC": os.devnull, "HOME": str(folder)}
    sweep = {"WANDB_RUN_GROUP": "our-sweep", "WANDB_JOB_TYPE": "sweep"}
    first = (*TRAIN, *SMALL, "logger=wandb", "logger.log_checkpoints=true", "hydra.run.dir=run")
    printed = at_a_terminal(first, folder, kept | alone | sweep)
    assert "offline; wandb sync run/wandb uploads it" in printed
    secret = {"WANDB_API_KEY": KEY, "WANDB_MODE": "offline"}
    again = ("resume=run", "curriculum.max_segments=4")
    result = launch("rmt_lightning.train", *again, folder=folder, environment=kept | alone | secret)
    assert result.returncode == 0, result.stderr
    return folder / "run"


def test_a_run_without_a_key_and_its_resumption(folder: Path) -> None:
    """All in one test, so that one of several test processes trains, and once."""
    holds_everything(folder)
    holds_tables_and_pictures(folder)
    holds_checkpoints(folder)
    goes_on_as_the_same_run(folder)
    # The key is in no file, and all that W&B keeps is kept in the run folder.
    assert [path for path in folder.parent.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()] == []
    assert not (folder.parent / ".local").exists() and not (folder.parent / ".netrc").exists()


def holds_everything(folder: Path) -> None:
    found, _ = offline_runs(folder)
    assert (found.run.project, found.run.run_group, found.run.job_type) == ("rmt_lightning", "our-sweep", "sweep")
    assert set(found.run.tags) == {"detect", "rmt_encoder", "tiny_roformer"}
    assert found.run.display_name == "/".join(folder.parts[-2:])
    assert found.exit_code == 0
    assert {key.split(".")[0] for row in found.rows for key in row} >= SHOWN

    # The settings, and on what hardware and from which commit.
    assert found.config["model"]["memory_size"] == 10 and found.config["curriculum"]["max_segments"] == 3
    (start, _) = json.loads((folder / "hardware.json").read_text())
    assert found.config["hardware"] == start | {"began": found.config["hardware"]["began"]}
    assert {"commit", "cpu", "gpus", "torch"} <= start.keys()

    # All that metrics/ holds, at the steps of the optimizer.
    table = read_csv(folder / "metrics" / "version_0" / "metrics.csv")
    for name in table[0].keys() - {"step"}:
        told = {int(row["step"]): float(row[name]) for row in table if row[name]}
        assert {row["_step"]: row[name] for row in found.rows if name in row} == pytest.approx(told), name
    assert {"train/loss", "val/accuracy", "val/accuracy_segments_3", "val/accuracy_distance_2"} <= table[0].keys()
    assert found.summary["train/tokens_per_second"]["mean"] > 0 and found.summary["train/host_memory_mb"]["max"] > 0

    # The stages against their number, the test against the number of segments.
    stages = read_csv(folder / "stages.csv")
    assert found.logged("stage") == [1, 1, 2, 2, 3, 3]
    assert found.metrics["curriculum/*"].step_metric == "curriculum/stage"
    assert found.logged("curriculum/accuracy") == pytest.approx([float(stage["accuracy"]) for stage in stages[:3]])
    assert found.logged("curriculum/steps") == [6, 6, 6]
    assert found.metrics["test/accuracy"].step_metric == "test/segments"
    assert found.logged("test/segments") == [1, 4]
    assert found.summary["test/accuracy_segments_4"] == found.logged("test/accuracy")[1]


def holds_tables_and_pictures(folder: Path) -> None:
    found = offline_runs(folder)[-1]
    for name in ("stages", "evaluation"):
        table = json.loads(found.file(f"results/{name}", "table-file").read_text())
        rows = read_csv(folder / f"{name}.csv")
        assert table["columns"] == list(rows[0])
        told = [["" if cell is None else str(cell) for cell in row] for row in table["data"]]
        assert told == [list(row.values()) for row in rows]
    for name in ("curriculum", "attention/last"):
        assert found.file(f"results/{name}", "image-file").read_bytes() == (folder / f"{name}.png").read_bytes()
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def holds_checkpoints(folder: Path) -> None:
    for found, stages in zip(offline_runs(folder), ((1, 2, 3), (4,)), strict=True):
        versions = [artifact for artifact in found.artifacts if artifact.name == f"stages-{found.run.run_id}"]
        for artifact, stage in zip(versions, stages, strict=True):
            assert f"stage-{stage}" in artifact.aliases
            (entry,) = artifact.manifest.contents
            assert json.loads(artifact.metadata)["stage"] == stage
            # It is uploaded from where it stands.
            assert Path(entry.local_path) == folder / "checkpoints" / f"stage-{stage}.ckpt"
            assert Path(entry.local_path).stat().st_size == entry.size


def goes_on_as_the_same_run(folder: Path) -> None:
    first, second = offline_runs(folder)
    assert first.run.run_id == second.run.run_id
    # It is still the sweep's, though the environment no longer says so.
    assert (second.run.run_group, second.run.job_type) == ("our-sweep", "sweep")
    assert second.run.resume
    # wandb sync puts the parts one after the other; no step may be there twice.
    assert first.steps + second.steps == sorted({*first.steps, *second.steps})
    assert second.logged("stage") == [4, 4] and second.logged("curriculum/steps") == [6]
    assert second.logged("trainer/global_step")[:2] == [20, 23]


def test_a_project_that_wandb_would_not_take() -> None:
    with pytest.raises(UserError, match=r"^logger.project=a/b: must be a name without"):
        WandbRun("run", project="a/b")


def test_a_language_model(train: Run, tmp_path: Path) -> None:
    few = ("task=language_modeling", "curriculum.steps=6", "test.documents=2", "noise.documents=20")
    small = tuple(setting for setting in SMALL if setting.startswith(("backbone", "data.s", "data.b")))
    result = train(*few, *small, "logger=wandb", "hydra.run.dir=run", small=False)
    assert result.returncode == 0, result.stdout + result.stderr
    (found,) = offline_runs(tmp_path / "run")
    assert found.logged("val/perplexity") and found.logged("val/bits_per_byte") and not found.logged("stage")
    assert found.logged("test/perplexity")[0] == float(read_csv(tmp_path / "run" / "evaluation.csv")[0]["perplexity"])
    assert found.file("results/perplexity", "image-file").exists()
    assert found.file("results/documents", "table-file").exists()


@pytest.mark.soak
def test_what_was_found_since_is_logged_when_an_ended_run_is_resumed(folder: Path, train: Run, tmp_path: Path) -> None:
    run = shutil.copytree(folder, tmp_path / "run", symlinks=True)
    for name, source in (
        ("evaluations/last/evaluation.csv", "evaluation.csv"),
        ("attention/x/map.png", "curriculum.png"),
    ):
        (run / name).parent.mkdir(parents=True)
        shutil.copy(run / source, run / name)
    # What is damaged is left out, and so is what is elsewhere.
    (run / "damaged.png").write_text("no picture")
    (run / "damaged.csv").write_bytes(b"a\n\xff\n")
    (tmp_path / "secret.csv").write_text("a\nhunter2\n")
    (run / "linked.csv").symlink_to(tmp_path / "secret.csv")
    result = train("resume=run", small=False)
    assert result.returncode == 0, result.stdout + result.stderr
    *earlier, found = offline_runs(run)
    assert found.file("results/evaluations/last/evaluation", "table-file").exists()
    assert found.file("results/attention/x/map", "image-file").exists()
    assert not [path for path in run.rglob("*.table.json") if "hunter2" in path.read_text()]
    assert min(found.steps) > max(earlier[-1].steps)


@pytest.mark.soak
def test_one_process_of_several_logs(train: Run, tmp_path: Path) -> None:
    result = train("logger=wandb", "trainer=ddp_cpu", "hydra.run.dir=run")
    assert result.returncode == 0, result.stdout + result.stderr
    (found,) = offline_runs(tmp_path / "run")
    assert found.config["hardware"]["processes"] == 2 and found.logged("curriculum/steps") == [6, 6, 6]


@pytest.mark.soak
def test_runs_of_a_sweep_share_group_and_job_type(train: Run, tmp_path: Path) -> None:
    result = train("logger=wandb", "seed=1,2", "hydra.sweep.dir=seeds", "--multirun")
    assert result.returncode == 0, result.stdout + result.stderr
    found = [run for folder in sorted(tmp_path.glob("seeds/*/")) for run in offline_runs(folder)]
    assert [(run.run.run_group, run.run.job_type) for run in found] == [("seeds", "sweep")] * 2
    assert len({run.run.run_id for run in found}) == 2


@pytest.mark.soak
def test_with_a_key_and_no_network_a_run_is_kept_offline(
    train: Run, environment: dict[str, str], tmp_path: Path
) -> None:
    # Nobody listens at this port.
    environment |= {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    result = train("logger=wandb", "hydra.run.dir=run")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("The run is kept offline") == 1
    (found,) = offline_runs(tmp_path / "run")
    assert found.logged("val/accuracy")


@pytest.fixture
def online(environment: dict[str, str]) -> Iterator[Any]:
    """A server, to which the commands of the test turn."""
    with serving() as server:
        environment |= {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": server.url}
        yield server


@pytest.mark.soak
def test_online(online: Any, train: Run, tmp_path: Path) -> None:
    for part in (("logger=wandb", "hydra.run.dir=run", *SMALL), ("resume=run", "curriculum.max_segments=4")):
        result = train(*part, small=False)
        assert result.returncode == 0, result.stdout + result.stderr
        assert f"{online.url}/someone/rmt_lightning/runs/" in result.stdout
    (rows,) = online.history.values()
    steps = [row["_step"] for row in rows]
    assert steps == sorted(set(steps))
    assert [row["curriculum/steps"] for row in rows if "curriculum/steps" in row] == [6, 6, 6, 6]
    assert any(name.startswith("media/images/results/attention/last") for name in online.files)


@pytest.mark.soak
def test_parts_that_were_logged_offline_are_uploaded_as_one_run(
    online: Any, folder: Path, environment: dict[str, str]
) -> None:
    """The command that the log and the README name."""
    command = [Path(sys.executable).parent / "wandb", "sync", folder / "wandb"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert [row["_step"] for row in next(iter(online.history.values()))] == [
        step for part in offline_runs(folder) for step in part.steps
    ]
    assert {alias["alias"] for artifact in online.artifacts for alias in artifact["aliases"]} > {"stage-1", "stage-4"}


def dashboard_of(*arguments: str, folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rmt_lightning.dashboard", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def panels(spec: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    sections = spec["section"]["panelBankConfig"]["sections"]
    return {section["name"]: [panel["config"] for panel in section["panels"]] for section in sections}


def test_a_dashboard_without_a_key_is_a_file(
    environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = dashboard_of("--project", "mine", folder=tmp_path, environment=environment)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    assert "no key" in result.stdout and "dashboard.json holds the view" in result.stdout
    view = json.loads((tmp_path / "dashboard.json").read_text())
    assert (view["project"], view["name"]) == ("mine", "Recurrent memory")
    shown = panels(view["spec"])
    assert list(shown) == ["Curriculum", "Extrapolation", "Sweeps", "Running text", "Hardware"]
    # Whatever a panel shows of a run on facts has been logged by one.
    for name in ("Curriculum", "Extrapolation", "Sweeps", "Hardware"):
        for panel in shown[name]:
            asked = {*panel.get("metrics", ()), *panel.get("mediaKeys", ()), *filter(None, [panel.get("xAxis")])}
            assert {key for key in asked if not key.startswith("config:")} <= SHOWN | HELD | {"train/device_memory_mb"}
    columns = [column["accessor"] for column in shown["Sweeps"][0]["columns"]]
    assert columns == [
        "config:model.value.memory_size", "config:model.value.bptt_depth", "config:curriculum.value.max_segments",
        "summary:test/accuracy",
    ]  # fmt: skip
    # It may be written again, but nothing else is overwritten.
    (tmp_path / "other.json").write_text("{}")
    monkeypatch.setenv("WANDB_MODE", "offline")
    with pytest.raises(UserError, match="is something else than a dashboard"):
        dashboard.main(["--output", "/dev/full"])  # which has no end
    with pytest.raises(UserError, match="is something else than a dashboard"):
        dashboard.main(["--output", str(tmp_path / "other.json")])
    assert (tmp_path / "other.json").read_text() == "{}" and workspace._is_view(tmp_path / "dashboard.json")


def test_a_dashboard_without_its_library(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    monkeypatch.setattr(sys, "argv", ["rmt-dashboard"])
    with pytest.raises(SystemExit, match="2"):
        dashboard.run()
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.soak
def test_a_dashboard_with_a_key_is_saved(online: Any, environment: dict[str, str], tmp_path: Path) -> None:
    result = dashboard_of(folder=tmp_path, environment=environment)
    assert result.returncode == 0 and f"{online.url}/someone/rmt_lightning?nw=" in result.stdout, result.stderr
    (view,) = online.views
    assert "Extrapolation" in panels(json.loads(view["spec"]))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.soak
def test_a_dashboard_with_a_key_and_no_network_is_a_file(environment: dict[str, str], tmp_path: Path) -> None:
    began = time.monotonic()
    environment |= {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    result = dashboard_of(folder=tmp_path, environment=environment)
    assert result.returncode == 0 and (tmp_path / "dashboard.json").exists(), result.stderr
    assert time.monotonic() - began < 60
