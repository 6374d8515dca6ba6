"""What a run goes through: a phase from outside the package, and runs that are resumed with other settings."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import hydra
import pytest
import yaml
from conftest import ROOT, SMALL, Run, assert_identical, final
from hydra.core.global_hydra import GlobalHydra

from rmt_lightning.app.resume import composed_again, save_config
from rmt_lightning.app.schema import CONF

HELD = ("hold=state_passing", "hold.steps=6", "hold.pool=8", "hold.until_rate=1")


def phases(folder: Path) -> list[dict]:
    return json.loads((folder / "phases.json").read_text())


# A third phase is two files: a class and a yaml.


@pytest.fixture
def with_cooldown(tmp_path: Path, command: Run) -> Run:
    """The command of a user who has written a phase."""
    shutil.copytree(ROOT / "examples" / "own_parts", tmp_path, dirs_exist_ok=True)
    return lambda *words: command("rmt_lightning.train", *words)


@pytest.mark.soak
def test_a_third_phase_is_two_files(
    with_cooldown: Run,
    refused: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    typed = ("--config-dir=conf", *SMALL, *HELD, "+cooldown=short")
    result = with_cooldown(*typed, "hydra.run.dir=run", "trainer.max_steps=25")
    assert result.returncode == 0, result.stdout + result.stderr
    assert [phase["name"] for phase in phases(tmp_path / "run")] == ["curriculum", "state_passing", "cooldown"]
    resumed = with_cooldown("resume=run", "trainer.max_steps=-1", "trust=parts")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "Cooldown" in resumed.stdout
    assert [(phase["first_step"], phase["steps"], phase["finished"]) for phase in phases(tmp_path / "run")] == [
        (0, 18, True), (18, 6, True), (24, 6, True),
    ]  # fmt: skip
    with (tmp_path / "run" / "cooldown.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["27", "30"]
    whole = with_cooldown(*typed, "hydra.run.dir=whole")
    assert whole.returncode == 0, whole.stderr
    assert_identical(final(tmp_path / "whole"), final(tmp_path / "run"))
    monkeypatch.syspath_prepend(tmp_path)
    wrong = refused("--config-dir=conf", *SMALL, "+cooldown=short", "cooldown.steps=x", "hydra.run.dir=wrong")
    assert wrong.startswith("error: cooldown.steps=x: must be a valid integer")


@pytest.mark.fault("a preset, a phase or a task of one's own that would do nothing", "it is refused in one line")
def test_what_is_no_part_of_a_run_is_refused(
    refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert refused(*SMALL, "+fases.steps=3").startswith("error: fases: is no part of a run")
    (tmp_path / "mine/experiment").mkdir(parents=True)
    (tmp_path / "mine/experiment/fast.yaml").write_text("optim:\n  lr: 0.1\n")
    told = refused("--config-dir=mine", *SMALL, "experiment=fast")
    assert told == "error: experiment: its yaml would change nothing; begin it with the line '# @package _global_'\n"
    told = refused(*SMALL, "+cooldown._target_=rmt_lightning.FixedSteps", "+cooldown.steps=2", "hydra.run.dir=a")
    assert told == "error: cooldown: a FixedSteps does not go with task=detect; leave out cooldown=…\n"
    (tmp_path / "unfinished.py").write_text("class Mine:\n    def draw(self): ...\n    def sentences(self): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    told = refused(*SMALL, "task._target_=unfinished.Mine", "hydra.run.dir=b")
    assert told == "error: task: a Mine has no name, as every task has; give it one\n"


@pytest.mark.fault("next to no question fits into a segment", "training is refused before it begins")
def test_a_stage_that_cannot_be_filled_is_refused(refused: Callable[..., str], tmp_path: Path) -> None:
    places = ("office", "garden", "kitchen", "hallway")
    crowd = "".join(f"{number} Mary went to the {places[number % 4]}.\n" for number in range(1, 31))
    story = f"{crowd}31 Where is Mary? \t{{place}}\t{{number}}\n"
    stories = [story.format(place=places[n % 4], number=n).replace("Mary", who) for n in range(1, 31) for who in "ABC"]
    (tmp_path / "qa.txt").write_text("".join(stories))
    easy = [f"1 {who} went to the {place}.\n2 Where is {who}? \t{place}\t1\n" for who in "ABC" for place in places]
    (tmp_path / "easy.txt").write_text("".join(easy))
    small = (*SMALL, "task=babi", "hydra.run.dir=run")
    room = "error: data.segment_length: leaves room for 27 tokens of text, too small for the facts and the question of "
    told = refused(*small, "task.path=qa.txt", "task.test_path=easy.txt", "data.num_workers=1")
    assert told.startswith(f"{room}task=babi: 0.0% of its questions fit into one segment; raise it to ")
    told = refused(*small, "task.path=easy.txt", "task.test_path=qa.txt", "test.segments=[1]")
    assert told.startswith(f"{room}task=babi: none of its questions fits into one segment, for they take ")
    told = refused(*small, "task.test_path=easy.txt")
    assert told == "error: task.path: is missing; give task.path=…\n"
    assert not (tmp_path / "run").exists()


def test_a_metric_is_a_setting(train: Run, refused: Callable[..., str], tmp_path: Path) -> None:
    f1 = ("+metrics.f1._target_=torchmetrics.classification.MulticlassF1Score", "+metrics.f1.num_classes=6")
    result = train(*f1, "hydra.run.dir=run", "curriculum.max_segments=1")
    assert result.returncode == 0, result.stderr
    with (tmp_path / "run" / "metrics" / "version_0" / "metrics.csv").open() as file:
        logged = [row for row in csv.DictReader(file) if row["val/f1"]]
    assert len(logged) == 2 and all(float(row["val/loss"]) > 0 for row in logged)
    missing = "error: metrics.f1: MulticlassF1Score.__init__() missing 1 required positional argument: 'num_classes'"
    assert refused(*SMALL, *f1[:1], "+metrics.f1.num_clases=6").startswith(missing)


# Faults of version 0.1, which are seen there by these tests.


SLOW = pytest.mark.soak


@pytest.mark.parametrize(
    ("model", "lengths"),
    [
        pytest.param("lstm", "exact", marks=SLOW),
        pytest.param("rmt_encoder", "exact", marks=SLOW),
        *(
            pytest.param(model, "uniform", marks=SLOW)
            for model in ("rmt_transformer_xl", "ntm", "memory_network", "armt", "prmt")
        ),
    ],
)
def test_an_interrupted_phase_goes_on_bit_for_bit(model: str, lengths: str, train: Run, tmp_path: Path) -> None:
    """Whatever tree a state is (it was not saved), and whatever lengths the curriculum had (they came back with it)."""
    settings = (f"model={model}", f"curriculum.lengths={lengths}", *HELD, "data.segment_length=48")
    assert train(*settings, "hydra.run.dir=whole").returncode == 0
    assert train(*settings, "hydra.run.dir=run", "trainer.max_steps=22").returncode == 0
    resumed = train("resume=run", "trainer.max_steps=-1", small=False)
    assert resumed.returncode == 0, resumed.stderr
    assert_identical(final(tmp_path / "whole"), final(tmp_path / "run"))


RATES = """
import json
from rmt_lightning.training.module import SegmentModule
from rmt_lightning.train import run

rates = []
original = SegmentModule.on_train_batch_start

def record(self, *given):
    rates.append((self.global_step, self.optimizers().param_groups[0]["lr"],
                  self.optimizers().param_groups[0]["weight_decay"]))
    return original(self, *given)

SegmentModule.on_train_batch_start = record
try:
    run()
finally:
    json.dump(rates, open("rates.json", "w"))
"""


def rates(folder: Path) -> list[list[float]]:
    return json.loads((folder / "rates.json").read_text())


def test_a_larger_budget_gives_the_learning_rate_of_a_larger_budget(train: Run, tmp_path: Path) -> None:
    stuck = ("curriculum.when_stuck=stop", "curriculum.max_segments=1", "optim.warmup=0")
    assert train(*stuck, "hydra.run.dir=run").returncode == 1
    assert train("resume=run", "curriculum.steps=12", small=False, driver=RATES).returncode == 1
    found = rates(tmp_path)
    assert [step for step, *_ in found] == list(range(6, 12))
    assert [rate for _, rate, _ in found] == pytest.approx([1e-3 * (12 - step) / 12 for step in range(6, 12)])
    text = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert text["optim"]["steps"] == text["curriculum"]["steps"] == 12


def test_what_is_typed_on_resuming_takes_effect_and_is_kept(train: Run, tmp_path: Path) -> None:
    first = (*SMALL, "trainer.max_steps=4", "optim.warmup=0", "+trainer.benchmark=false")
    assert train(*first, "hydra.run.dir=run", small=False).returncode == 0
    assert yaml.safe_load((tmp_path / "run" / "overrides.yaml").read_text()) == list(first)
    # What had to be added then need not be added again.
    typed = ("trainer.max_steps=6", "optim.lr=0.5", "optim.weight_decay=0.25", "trainer.benchmark=true")
    assert train("resume=run", *typed, small=False, driver=RATES).returncode == 0
    assert rates(tmp_path) == [[4, pytest.approx(0.5 * 2 / 6), 0.25], [5, pytest.approx(0.5 * 1 / 6), 0.25]]
    kept = yaml.safe_load((tmp_path / "run" / "overrides.yaml").read_text())
    assert kept == [*SMALL, "optim.warmup=0", *typed[:3], "+trainer.benchmark=true"]


# What was typed then, what is typed now, and what is composed of it.
AGAIN = [
    ("noise=files noise.path=old seed=3", "noise.path=/new/book", "noise=files seed=3 noise.path=/new/book"),
    ("noise=files noise.path=a", "noise=files noise.field=b", "noise.path=a noise=files noise.field=b"),
    ("noise.documents=20 +noise.x=1 seed=3", "noise=files noise.path=b", "seed=3 noise=files noise.path=b"),
    ("noise=quality noise.limit=9", "noise=wikitext", "noise.limit=9 noise=wikitext"),
    ("noise=quality noise.limit=9", "noise=prose", "noise=prose"),
    ("logger=wandb logger.mode=offline", "logger=csv", "logger=csv"),
    ("logger=wandb", "logger.mode=offline", "logger=wandb logger.mode=offline"),
    ("hold=state_passing hold.steps=6 hold.until_rate=1 seed=2", "~hold", "seed=2 ~hold"),
    ("trainer.devices=4 +trainer.x=2", "trainer=ddp_cpu", "trainer.devices=4 +trainer.x=2 trainer=ddp_cpu"),
    ("experiment=paper_detect noise.limit=7", "noise=pg19", "experiment=paper_detect noise.limit=7 noise=pg19"),
    ("+metrics.f1.num_classes=6", "~metrics.f1", "+metrics.f1.num_classes=6 ~metrics.f1"),
]  # fmt: skip


@pytest.mark.parametrize(("then", "now", "composed"), AGAIN, ids=[f"{then}; {now}" for then, now, _ in AGAIN])
def test_what_is_chosen_anew_leaves_its_old_settings_behind(
    then: str, now: str, composed: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("seed: 1\n")
    (tmp_path / "run" / "overrides.yaml").write_text(yaml.safe_dump(then.split()))
    assert sorted(composed_again(["resume=run", *now.split()])) == sorted(["resume=run", *composed.split()])


@pytest.mark.fault("a default is another than when a run began", "the run keeps what it began with")
def test_a_default_of_an_earlier_version_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As of another backbone, of other settings; but for what is typed now, and what follows it."""
    monkeypatch.chdir(tmp_path)
    earlier = ["backbone=tiny_bert", "backbone.width=96", "curriculum.validations=1", "optim.lr=0.5"]
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        config = hydra.compose("train", [*earlier, "curriculum.steps=7"])
    GlobalHydra.instance().clear()
    (tmp_path / "run").mkdir()
    save_config(tmp_path / "run", config, ["curriculum.steps=7"], None)
    again = composed_again(["resume=run", "optim.lr=0.25", "curriculum.steps=9"])
    assert sorted(again) == sorted([*earlier[:3], "resume=run", "optim.lr=0.25", "curriculum.steps=9"])


@pytest.mark.fault("what is typed on resuming belongs to a phase that is over", "it is refused in one line")
def test_what_comes_too_late_is_refused(train: Run, refused: Callable[..., str], tmp_path: Path) -> None:
    """Of a run in its second phase, then of one that has finished."""
    typed = (*HELD, "curriculum.max_segments=2", "data.segment_length=48", "hydra.run.dir=run")
    assert train(*typed, "trainer.max_steps=15").returncode == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").glob("*.*") if path.suffix != ".log"}
    late = "comes too late, for what it sets is over in this run; leave it out"
    for words, message in (
        ("optim.lr=0.5", f"optim.lr=0.5: {late}"),
        ("curriculum.threshold=0.5", f"curriculum.threshold=0.5: {late}"),
        ("curriculum.steps=12", f"curriculum.steps=12: {late}"),
        ("trainer.max_steps=8", "trainer.max_steps=8: the run has taken 15 steps already; give more, or -1 for any"),
        ("optim.betas=[0.9,0.95]", "optim.betas: no such setting; "),
    ):
        assert refused("resume=run", *words.split()).startswith(f"error: {message}"), words
    assert {path: path.read_bytes() for path in before} == before
    more = train("resume=run", "hold.steps=9", "hold.lr=0.25", "trainer.max_steps=-1", small=False, driver=RATES)
    assert more.returncode == 0, more.stderr
    assert [(step, lr > 0.01) for step, lr, _ in rates(tmp_path)] == [(step, True) for step in range(15, 21)]
    for word in ("hold.share=0.25", "optim.warmup=0.5", "answer.all_questions=true"):
        assert refused("resume=run", word).startswith(f"error: {word}: {late}")


@pytest.mark.soak
@pytest.mark.fault("a loss that is no number", "with a lower optim.lr, typed on resuming, the run goes on and ends")
@pytest.mark.parametrize("checkpoint", ["run", "run/checkpoints/stage-1.ckpt"])
def test_a_lower_learning_rate_helps(checkpoint: str, train: Run, tmp_path: Path) -> None:
    typed = ("optim.warmup=0", "hydra.run.dir=run", "curriculum.max_segments=2")
    assert train(*typed, "trainer.max_steps=7").returncode == 0
    wild = train(f"resume={checkpoint}", "trainer.max_steps=-1", "optim.lr=1e30", "hydra.run.dir=wild", small=False)
    assert wild.returncode == 1 and "lower optim.lr" in wild.stderr, wild.stderr
    tame = ("trainer.max_steps=-1", "optim.lr=2e-3", "hydra.run.dir=tame")
    driven = train(f"resume={checkpoint}", *tame, small=False, driver=RATES)
    assert driven.returncode == 0, driven.stderr
    assert all(lr <= 2e-3 for _, lr, _ in rates(tmp_path)) and rates(tmp_path)[-1][0] == 11
    assert yaml.safe_load((tmp_path / "tame" / "config.yaml").read_text())["optim"]["lr"] == 2e-3


@pytest.mark.soak
def test_settings_are_checked_against_the_choices_of_the_run(
    train: Run, refused: Callable[..., str], tmp_path: Path
) -> None:
    text = (
        "task=language_modeling", "model.width=8", "model.layers=1", "model.heads=2", "noise.documents=20",
        "backbone.vocabulary_size=600", "data.segment_length=20", "data.steps_per_epoch=2", "curriculum.steps=2",
        "data.validation_documents=1", "test.documents=2",
    )  # fmt: skip
    assert train(*text, "hydra.run.dir=run", small=False).returncode == 0
    again = train("resume=run", "test.documents=1", small=False)
    assert again.returncode == 0, again.stderr
    with (tmp_path / "run" / "documents.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 1
    before = {path: path.read_bytes() for path in (tmp_path / "run").glob("*.*") if path.suffix != ".log"}
    for typed, message in (
        ("test.documnts=1", "test.documnts: no such setting; did you mean documents?"),
        ("data.segment_length=24", "data.segment_length=24: a resumed run keeps its data.segment_length"),
        ("data.steps_per_epoch=3", "data.steps_per_epoch=3: a resumed run keeps its data.steps_per_epoch"),
        ("data.num_segments=3", "data.num_segments=3: a resumed run keeps its data.num_segments"),
        (
            "model.width=16",
            "model.width=16: a resumed run keeps its model (model.width=8); start a new run to change it",
        ),
        ("backbone=tiny_gpt", "backbone=tiny_gpt: a resumed run keeps its backbone"),
        ("task=detect", "task=detect: a resumed run keeps its task"),
        ("experiment=tiny_carried", "experiment=tiny_carried: a resumed run keeps its experiment; leave it out"),
        ("model=lstm", "model=lstm: a resumed run keeps its model; leave it out, or start a new run"),
    ):
        assert refused("resume=run", typed).startswith(f"error: {message}"), typed
    assert {path: path.read_bytes() for path in before} == before


def test_steps_that_share_an_optimizer_step_draw_other_numbers(train: Run, tmp_path: Path) -> None:
    driver = """
import json, torch
from rmt_lightning.training.module import SegmentModule
from rmt_lightning.train import run

seeds = []
original = SegmentModule.on_train_batch_start

def record(self, *given):
    original(self, *given)
    seeds.append(torch.initial_seed())

SegmentModule.on_train_batch_start = record
run()
json.dump(seeds, open("seeds.json", "w"))
"""
    result = train("+trainer.accumulate_grad_batches=2", "curriculum.max_segments=1", driver=driver)
    assert result.returncode == 0, result.stderr
    seeds = json.loads((tmp_path / "seeds.json").read_text())
    assert len(seeds) == len(set(seeds)) > 6


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("optim.steps=[]", "optim.steps=[]: "),
        ("data.batch_size=1 hold=state_passing", "data.batch_size=1: hold=state_passing shares a batch between old me"),
        ("model=full_attention hold=state_passing", "hold=state_passing: this model has no memory to hold; leave it o"),
        ("~metrics.accuracy", "metrics.accuracy: phases decide by it; leave it in"),
        ("optim.weight_decay=1e4", "weight_decay=10000: with lr=0.001 a step would take more from the weights"),
        ("model=longformer backbone=tiny_bert", "model=longformer: reads all at once with a longformer alone, and the"),
    ],
)  # fmt: skip
def test_one_line(typed: str, message: str, refused: Callable[..., str], tmp_path: Path) -> None:
    told = refused(*SMALL, *typed.split(), "backbone.max_positions=256", "hydra.run.dir=run")
    assert told.startswith(f"error: {message}"), told
    assert not (tmp_path / "run").exists()
