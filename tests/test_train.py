"""The real command on tiny models: the curriculum, what a run leaves behind, loggers, workers, several processes."""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL, Run, final
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rmt_lightning.reporting.reading import read_runs
from rmt_lightning.training.callbacks.checkpoints import read_checkpoint
from rmt_lightning.training.phases.lessons import NOISY_LESSONS


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def metrics(folder: Path) -> dict[str, list[float]]:
    """Every column of the metrics of a run, without the empty cells."""
    table = rows(folder / "metrics" / "version_0" / "metrics.csv")
    return {name: [float(row[name]) for row in table if row[name]] for name in table[0]}


# Large enough to learn memorize in a minute: what the paper calls convergence really happens.
LEARNING = (
    "task=memorize", "backbone.width=64", "backbone.layers=2", "backbone.heads=2", "noise.documents=50",
    "data.segment_length=40", "data.steps_per_epoch=20", "data.validation_samples=128", "model.memory_size=4",
    "curriculum.max_segments=2", "curriculum.threshold=0.95", "test.segments=[1,2]", "test.samples=128",
)  # fmt: skip


def test_a_run_learns_and_leaves_everything_behind(train: Run, environment: dict[str, str], tmp_path: Path) -> None:
    keys = {name: f"{name}-do-not-tell" for name in ("HF_TOKEN", "WANDB_API_KEY")}
    environment |= keys
    result = train(*LEARNING, small=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stderr == ""
    (folder,) = (tmp_path / "outputs").glob("*/*")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d/\d\d-\d\d-\d\d-memorize", str(folder.relative_to(tmp_path / "outputs")))

    stages = rows(folder / "stages.csv")
    assert [row["stage"] for row in stages] == ["1", "2"]
    assert all(row["converged"] == "True" and float(row["accuracy"]) >= 0.95 for row in stages)
    evaluation = rows(folder / "evaluation.csv")
    assert [row["segments"] for row in evaluation] == ["1", "2"]
    for row in evaluation:
        assert float(row["accuracy"]) > 0.8 and row["samples"] == "128"
        assert float(row["low"]) <= float(row["accuracy"]) <= float(row["high"])

    # Keys are told nowhere.
    told = [result.stdout.encode(), *(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())]
    assert not any(key.encode() in text for key in keys.values() for text in told)

    # Both tables are shown, and where everything is; the log holds them too.
    log = (folder / "train.log").read_text()
    for word in ("Curriculum", "Test on unseen text, 128 samples each", "converged", str(folder.relative_to(tmp_path))):
        assert word in result.stdout and word in log
    assert "stage 2 converged" in log and f"{folder.relative_to(tmp_path)} holds " in log
    config = OmegaConf.load(folder / "config.yaml")
    assert config.optim.steps == config.curriculum.steps == 1500
    assert {"tokenizer.json", "tokenizer_config.json"} <= {p.name for p in (folder / "tokenizer").iterdir()}
    names = {"last.ckpt", "previous.ckpt", "stage-1.ckpt", "stage-2.ckpt"}
    assert {p.name for p in (folder / "checkpoints").iterdir()} == names
    assert (folder / "curriculum.png").read_bytes().startswith(b"\x89PNG")

    logged = metrics(folder)
    assert logged["train/loss"][-1] < logged["train/loss"][0]
    assert min(logged["train/tokens_per_second"]) > 0
    for name in (
        "accuracy",
        "accuracy_segments_1",
        "accuracy_segments_2",
        "accuracy_distance_0",
        "accuracy_distance_1",
    ):
        assert all(0 <= value <= 1 for value in logged[f"val/{name}"])
    # The stage's accuracy is that of its longest inputs.
    table = [row for row in rows(folder / "metrics" / "version_0" / "metrics.csv") if row["val/accuracy_segments_2"]]
    assert all(row["val/accuracy"] == row["val/accuracy_segments_2"] for row in table)


def test_a_stage_that_is_stuck_stops_the_run_with_a_clear_result(train: Run, tmp_path: Path) -> None:
    result = train("curriculum.when_stuck=stop", "hydra.run.dir=run")
    assert result.returncode == 1
    assert "stage 1 did not converge: raise curriculum.steps and go on with resume=" in result.stdout
    assert not list((tmp_path / "run" / "checkpoints").glob("stage-*"))
    (stage,) = rows(tmp_path / "run" / "stages.csv")
    assert (stage["stage"], stage["converged"], stage["steps"]) == ("1", "False", "6")
    assert "converged" in result.stdout
    # With a larger budget it goes on where it stopped.
    more = train(
        "resume=run", "curriculum.steps=9", "curriculum.threshold=0.01", "curriculum.validations=1", small=False
    )
    assert more.returncode == 0, more.stdout + more.stderr
    assert (tmp_path / "run" / "checkpoints" / "stage-1.ckpt").exists()
    stages = rows(tmp_path / "run" / "stages.csv")
    assert [(row["stage"], row["converged"], row["steps"]) for row in stages] == [
        ("1", "True", "9"), ("2", "True", "3"), ("3", "True", "3"),
    ]  # fmt: skip


@pytest.mark.soak
def test_stages_begin_with_lessons_which_are_resumed(train: Run, tmp_path: Path) -> None:
    reasoning = ("task=reasoning", "curriculum.lessons=true", "backbone=tiny_roformer", "hydra.run.dir=run")
    easy = ("curriculum.threshold=0.01", "curriculum.validations=1")
    stuck = train(*reasoning, "curriculum.when_stuck=stop")
    assert stuck.returncode == 1 and "stage 1 did not converge" in stuck.stdout
    assert "stage 1, lesson 1: step" in stuck.stdout and "lesson 2" not in stuck.stdout
    # Stopped within lesson 2, the run goes on there.
    assert train("resume=run", "curriculum.steps=9", "trainer.max_steps=10", *easy, small=False).returncode == 0
    assert read_checkpoint(tmp_path / "run/checkpoints/last.ckpt")["phases"]["curriculum"]["lesson"] == 2
    limits = ("curriculum.steps=9", "trainer.max_steps=-1", "curriculum.max_segments=1")
    result = train("resume=run", *limits, *easy, small=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "lesson 2: step" in result.stdout and "lesson 1" not in result.stdout
    assert read_checkpoint(tmp_path / "run/checkpoints/last.ckpt")["phases"]["curriculum"]["lesson"] is None
    result = train("resume=run", "curriculum.steps=9", "curriculum.max_segments=3", *easy, small=False)
    assert result.returncode == 0, result.stdout + result.stderr
    log = (tmp_path / "run" / "train.log").read_text()
    # Reasoning has one easier form.
    lessons = 2 + NOISY_LESSONS
    for stage, count in (1, lessons), (2, 2), (3, 2):
        assert f"stage {stage} converged after" in log
        assert log.count(f"stage {stage}, lesson ") >= 2 * count
        for lesson in range(1, count + 1):
            assert f"stage {stage}, lesson {lesson} converged after" in log
        assert f"stage {stage}, lesson {count + 1}" not in log
    # A stage counts the steps of its lessons, so that stages and steps of the run agree.
    stages = rows(tmp_path / "run" / "stages.csv")
    last = read_checkpoint(tmp_path / "run/checkpoints/last.ckpt")
    assert [row["stage"] for row in stages] == ["1", "2", "3"]
    assert sum(int(row["steps"]) for row in stages) == last["global_step"]
    # Accuracy on easier samples is in no curve, though it was logged.
    logged = [row for path in tmp_path.glob("run/metrics/*/metrics.csv") for row in rows(path) if row["val/accuracy"]]
    task = {int(row["step"]) + 1 for row in logged if row["lesson"] == "0.0"}
    assert {row["lesson"] for row in logged} == {str(float(lesson)) for lesson in range(lessons)}
    (run,), _ = read_runs([str(tmp_path / "run")])
    assert {point.step for point in run.curves["val/accuracy"]} == task


@pytest.mark.soak
def test_a_lesson_that_is_stuck_is_followed_by_the_next_where_stages_are(train: Run, tmp_path: Path) -> None:
    reasoning = ("task=reasoning", "curriculum.lessons=true", "backbone=tiny_roformer", "hydra.run.dir=run")
    stuck = train(*reasoning, "curriculum.when_stuck=stop", "curriculum.steps=3", "curriculum.max_segments=2")
    assert stuck.returncode == 1 and "stage 1, lesson 1 did not converge after 3 steps" in stuck.stdout
    result = train("resume=run", "curriculum.when_stuck=continue", small=False)
    assert result.returncode == 0, result.stdout + result.stderr
    for stage, count in (1, 2 + NOISY_LESSONS), (2, 2):
        for lesson in range(1 + (stage == 1), count + 1):
            assert f"stage {stage}, lesson {lesson} did not converge after" in result.stdout
    assert [row["stage"] for row in rows(tmp_path / "run/stages.csv")] == ["1", "2"]


def test_the_learning_rate_starts_anew_at_each_stage(train: Run, tmp_path: Path) -> None:
    driver = """
import json
from rmt_lightning.training.answering import FactClassifier
from rmt_lightning.train import run

def record(self, outputs, batch, batch_idx):
    optimizer = self.optimizers()
    rates.append((batch.input_ids.shape[1], optimizer.param_groups[0]["lr"], len(optimizer.state)))

rates = []
original = FactClassifier.on_train_batch_end
FactClassifier.on_train_batch_end = lambda self, *a: (record(self, *a), original(self, *a))
run()
json.dump(rates, open("rates.json", "w"))
"""
    result = train("curriculum.lengths=exact", "optim.lr=[0.01,0.1]", "optim.warmup=0.5", driver=driver)
    assert result.returncode == 0, result.stderr
    import json

    rates = json.loads((tmp_path / "rates.json").read_text())
    assert [segments for segments, *_ in rates] == [1] * 6 + [2] * 6 + [3] * 6
    # Warm-up over three of six steps, then decay; the rate after each step is that of the next.
    shape = [2 / 4, 3 / 4, 1, 2 / 3, 1 / 3, 0]
    for stage, peak in enumerate((0.01, 0.1, 0.1)):
        found = [rate for _, rate, _ in rates[6 * stage : 6 * stage + 6]]
        assert found == pytest.approx([peak * share for share in shape])


@pytest.mark.soak
def test_plateau_and_validations_in_a_row(train: Run, tmp_path: Path) -> None:
    patient = train("optim.lr=1e-30", "curriculum.patience=2", "curriculum.steps=60", "hydra.run.dir=patient")
    assert patient.returncode == 0
    assert [row["steps"] for row in rows(tmp_path / "patient" / "stages.csv")] == ["9"] * 3
    settings = (
        "curriculum.threshold=0.01",
        "curriculum.validations=2",
        "curriculum.steps=60",
        "data.validation_samples=64",
    )
    twice = train("optim.lr=1e-30", *settings, "hydra.run.dir=twice")
    assert twice.returncode == 0
    assert [row["steps"] for row in rows(tmp_path / "twice" / "stages.csv")] == ["6"] * 3


@pytest.mark.soak
def test_loader_workers_change_nothing(train: Run, tmp_path: Path) -> None:
    for workers in (0, 2):
        result = train(f"data.num_workers={workers}", f"hydra.run.dir=workers-{workers}")
        assert result.returncode == 0 and result.stderr == "", result.stderr
    plain, parallel = final(tmp_path / "workers-0"), final(tmp_path / "workers-2")
    assert all(torch.equal(plain[name], parallel[name]) for name in plain)


# The real command, which writes down what each rank reads, and what it has after 20 steps.
WITNESS = """
import os
import torch
from rmt_lightning.training.callbacks.checkpoints import AtomicCheckpointIO
from rmt_lightning.training.answering import FactModule
from rmt_lightning.train import run

seen = {"stages": [], "rows": [], "unused": [], "written": [], "world": 0}
training_step, save = FactModule.training_step, AtomicCheckpointIO.save_checkpoint

def step(self, batch, batch_idx):
    seen["world"] = self.trainer.world_size
    seen["stages"].append((self.global_step, self.phases.current.num_segments))
    seen["rows"].append([tuple(row.flatten().tolist()) for row in batch.input_ids])
    return training_step(self, batch, batch_idx)

def look(self, optimizer):
    seen["unused"] += [name for name, weight in self.named_parameters() if weight.requires_grad and weight.grad is None]
    if self.global_step == 20:
        trained = {name: weight for name, weight in self.named_parameters() if weight.requires_grad}
        seen["weights"] = {name: weight.detach().clone() for name, weight in trained.items()}
        seen["gradients"] = {name: weight.grad.clone() for name, weight in trained.items()}

def write(self, checkpoint, path, storage_options=None):
    seen["written"].append(os.path.basename(path))
    save(self, checkpoint, path, storage_options)

FactModule.training_step, FactModule.on_before_optimizer_step, AtomicCheckpointIO.save_checkpoint = step, look, write
run()
torch.save(seen, f"{seen['world']}-{os.environ.get('LOCAL_RANK', 0)}.pt")
"""


@pytest.mark.parametrize(
    "model",
    [
        ("model=rmt_encoder",),
        pytest.param(
            ("model=rmt_decoder", "model.memory_size=5", "backbone=tiny_gpt", "answer=generate"), marks=pytest.mark.soak
        ),
    ],
)
def test_two_processes(model: tuple[str, ...], train: Run, tmp_path: Path) -> None:
    """DDP: the same samples as one process with the whole batch, the curriculum in step, one set of files."""
    settings = (*model, "curriculum.lengths=exact", "model.bptt_depth=1", "backbone.dropout=0", "curriculum.steps=9")
    alone = train(*settings, "hydra.run.dir=alone", "data.batch_size=8", driver=WITNESS)
    both = train(*settings, "trainer=ddp_cpu", "hydra.run.dir=both", driver=WITNESS)
    assert alone.returncode == 0 and both.returncode == 0, alone.stderr + both.stderr
    one, *ranks = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1"))
    for rank in ranks:
        for kind in ("weights", "gradients"):  # after 20 steps
            for name in one[kind]:
                torch.testing.assert_close(rank[kind][name], one[kind][name], atol=1e-5, rtol=1e-4)
        # Every rank goes on to the next stage at the same step, and uses all weights from the first one on.
        assert rank["stages"] == one["stages"] == [(step, 1 + step // 9) for step in range(27)]
        assert rank["unused"] == []
    # Each sample is read by one rank, once.
    for alone_, *shared in zip(one["rows"], *(rank["rows"] for rank in ranks), strict=True):
        assert sorted(alone_) == sorted(row for rows in shared for row in rows) and len(set(alone_)) == 8
    # Checkpoints are written once.
    assert ranks[0]["written"] == one["written"] and ranks[1]["written"] == []
    assert sorted(one["written"]) == ["last.ckpt"] * 9 + ["stage-1.ckpt", "stage-2.ckpt", "stage-3.ckpt"]
    without_time = [
        [{k: v for k, v in row.items() if k != "seconds"} for row in rows(tmp_path / folder / "stages.csv")]
        for folder in ("alone", "both")
    ]
    assert without_time[0] == without_time[1]
    # Two ranks wrote one run folder, and nothing else.
    assert [path.name for path in tmp_path.iterdir() if path.is_dir() and path.name not in ("alone", "both")] == []
    assert [path.name for path in (tmp_path / "both" / "metrics").iterdir()] == ["version_0"]
    assert both.stdout.count("Curriculum") == 1


@pytest.mark.soak
def test_two_processes_resume(train: Run, tmp_path: Path) -> None:
    ddp = ("trainer=ddp_cpu", "backbone.dropout=0.1")
    assert train(*ddp, "hydra.run.dir=whole").returncode == 0
    first = train(*ddp, "hydra.run.dir=parts", "curriculum.max_segments=2")
    assert first.returncode == 0, first.stderr
    second = train("resume=parts", "curriculum.max_segments=3", small=False)
    assert second.returncode == 0, second.stderr
    whole, parts = final(tmp_path / "whole"), final(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole if not name.startswith("accuracy"))


@pytest.mark.soak
@pytest.mark.parametrize("choice", ["logger=tensorboard", "logger=wandb_and_tensorboard logger.wandb.mode=offline"])
def test_tensorboard_alone_and_beside_another(choice: str, train: Run, tmp_path: Path) -> None:
    result = train(*choice.split(), "hydra.run.dir=run")
    assert result.returncode == 0, result.stdout + result.stderr
    (file,) = (tmp_path / "run" / "tensorboard").rglob("events*")
    events = EventAccumulator(str(file))
    events.Reload()
    assert {"train/loss", "val/accuracy"} <= set(events.Tags()["scalars"])
    assert len(list((tmp_path / "run").glob("wandb/offline-run-*/*.wandb"))) == ("wandb" in choice)


@pytest.mark.soak
@pytest.mark.parametrize(
    "task", ["babi task.path=BABI/qa2_two-supporting-facts_train.txt", "babilong task.name=qa2 task.folder=BABI"]
)
def test_real_babi_among_real_stories(task: str, shared_data: Path, train: Run, tmp_path: Path) -> None:
    words = f"task={task} test.tokens=[0,1k]".replace("BABI", str(shared_data / "babi/en-10k")).split()
    result = train(
        *(setting for setting in SMALL if not setting.startswith("noise.")), *words,
        "noise=files", f"noise.path={shared_data / 'squality/dev.jsonl'}", "noise.field=document",
        "backbone.vocabulary_size=1500", "data.segment_length=96", "hydra.run.dir=run", small=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert (
        torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["state_dict"]["head.weight"].shape[0] == 6
    )


@pytest.mark.parametrize("flag", ["--help", "--cfg=job", "--info=defaults"])
def test_flags(flag: str, environment: dict[str, str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rmt_lightning.train", flag.split("=")[0], *flag.split("=")[1:]]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    words = {
        "--help": (
            "task: babi, babilong, carried, detect, key_value, language_modeling, memorize, mqar",
            "memory_size: 10",
            "resume=",
        ),
        "--cfg=job": ("memory_size: 10", "max_segments: 7"),
        "--info=defaults": ("task/detect",),
    }[flag]
    assert all(word in result.stdout for word in words), result.stdout
    assert list(tmp_path.iterdir()) == []


def test_shell_completion(environment: dict[str, str]) -> None:
    """What bash asks of Hydra's completion function, for the console script."""
    script = Path(sys.executable).parent / "rmt-train"
    if not script.exists():
        pytest.skip("the package is not installed, so there is no rmt-train")
    installed = subprocess.run(
        [script, "--shell-completion", "install=bash"], env=environment, capture_output=True, text=True, timeout=60
    )
    assert installed.returncode == 0 and "complete " in installed.stdout, installed.stderr
    for typed, expected in (("task=", "task=carried"), ("model.mem", "model.memory_size="), ("noi", "noise")):
        asked = environment | {
            "COMP_LINE": f"rmt-train {typed}",
            "COMP_POINT": str(len(f"rmt-train {typed}")),
            "COMP_CWORD": "1",
        }
        answer = subprocess.run(
            [script, "--shell-completion", "query=bash"], env=asked, capture_output=True, text=True, timeout=60
        )
        assert expected in answer.stdout, answer.stdout + answer.stderr


def test_from_a_wheel_in_any_folder(environment: dict[str, str], tmp_path: Path) -> None:
    """A wheel holds conf/; it is unpacked far from the checkout and used from there."""
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    built = subprocess.run(build, env=os.environ, capture_output=True, text=True, timeout=200)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    subprocess.run([sys.executable, "-m", "zipfile", "-e", str(wheel), str(site)], check=True)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    program = "import rmt_lightning.train as t; assert 'site' in t.__file__, t.__file__; t.run()"
    result = subprocess.run(
        [sys.executable, "-c", program, "--cfg", "job", "task=carried"],
        cwd=elsewhere, env=environment | {"PYTHONPATH": str(site)}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "rmt_lightning.Carried" in result.stdout
    # A copy of the example needs nothing else.
    shutil.copytree(ROOT / "examples" / "own_parts", elsewhere, dirs_exist_ok=True)
    readme = (elsewhere / "README.md").read_text()
    # One of them; the parts are the same.
    for line in re.findall(r"^python -m rmt_lightning.train (.*)$", readme, flags=re.MULTILINE)[:1]:
        result = subprocess.run(
            [sys.executable, "-m", "rmt_lightning.train", *line.split(), "--cfg", "job"],
            cwd=elsewhere, env=environment | {"PYTHONPATH": str(site)}, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        assert "parts.Colors" in result.stdout
