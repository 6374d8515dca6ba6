"""What only other libraries, this machine or a launcher could refuse, and what a run sets itself, is told in a line."""

from __future__ import annotations

import copy
import inspect
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import hydra
import lightning as L
import pytest
import torch
from conftest import SMALL, Run
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from rmt_lightning import RunTrainer, UserError, attend, evaluate
from rmt_lightning import train as front_door
from rmt_lightning.app import hydra_errors
from rmt_lightning.app.build import construct
from rmt_lightning.app.processes import RANK, forget_leftovers, is_first_process, share_cores
from rmt_lightning.app.schema import CONF, check
from rmt_lightning.app.trust import check_saved
from rmt_lightning.models import machine
from rmt_lightning.models.tiny import TinyBert
from rmt_lightning.reporting.reading import read_runs
from rmt_lightning.training.trainer import TimeBudget

# What Lightning's Trainer takes and a run does not: the run sets it itself, or it would be of no effect.
REFUSED = {
    "barebones", "check_val_every_n_epoch", "default_root_dir", "enable_autolog_hparams", "enable_checkpointing",
    "enable_model_summary", "enable_progress_bar", "fast_dev_run", "inference_mode", "limit_predict_batches",
    "limit_test_batches", "limit_train_batches", "limit_val_batches", "max_epochs", "min_epochs", "min_steps",
    "model_registry", "num_sanity_val_steps", "overfit_batches", "plugins", "profiler",
    "reload_dataloaders_every_n_epochs", "sync_batchnorm", "use_distributed_sampler", "val_check_interval",
}  # fmt: skip
CHECKED = [
    *((f"trainer.{name}", 1, "no such setting; ") for name in sorted(REFUSED)),
    ("trainer.profiler", 1, "no such setting; allowed: accelerator, devices, "),
    ("data.sampels", 1, "no such setting; allowed: segment_length, batch_size, "),
    # what the run sets itself
    *((key, value, "is set by the run itself; leave it out") for key, value in (
        ("data.keys", 3), ("data.placement", 1), ("model.encoder", 3), ("answer.model", "bert"), ("answer.phases", 1),
        ("answer.metrics", [3]), ("trainer.folder", "x"), ("trainer.logger", False), ("trainer.callbacks", []),
    )),
    # what says nothing
    *((key, "", "is empty; give a value, or leave it out") for key in (
        "resume", "cache_dir", "noise.documents", "curriculum.lengths", "data.num_workers", "backbone.width",
    )),
    # numbers
    ("seed", 5_000_000_000, "must be less than or equal to 4294967295"),
    ("noise.seed", 10**30, "must be less than or equal to 4294967295"),
    ("optim.lr", 1e38, "must be less than or equal to 1000000"),
    ("optim.lr", float("inf"), "must be "),
    ("optim.lr", float("nan"), "must be "),
    ("optim.lr", [1e-3, float("inf")], "must be "),
    ("optim.weight_decay", float("inf"), "must be a finite number"),
    ("optim.warmup", float("nan"), "must be a finite number"),
    ("data.steps_per_epoch", 10**12, "must be less than or equal to 4294967295"),
    ("optim.steps", [10**21], "must be less than or equal to 4294967295"),
    ("data.validation_samples", 10**12, "must be less than or equal to 1000000"),
    ("test.segments", [1, 10**12], "must be less than or equal to 4294967295"),
    ("test.samples", 10**12, "must be less than or equal to 1000000"),
    ("hold.pool", 10**12, "must be less than or equal to 4294967295"),
    ("hold.youth", 10**12, "must be less than or equal to 4294967295"),
    ("hold.jitter", 1e300, "must be less than or equal to 100"),
    ("noise.documents", 10**12, "must be less than or equal to 1000000"),
    ("backbone.width", 2_000_000, "must be less than or equal to 32768"),
    ("backbone.layers", 100_000, "must be less than or equal to 1000"),
    ("backbone.vocabulary_size", 10**12, "must be less than or equal to 1048576"),
    ("backbone.max_positions", 10**12, "must be less than or equal to 1048576"),
    ("backbone.dropout", 1.5, "must be less than 1"),
    ("curriculum.max_segments", 10**9, "must be less than or equal to 4096"),
    ("hold.lr", 1e39, "must be less than or equal to 1000000"),
    ("hold.jitter", float("nan"), "must be a finite number"),
    ("trainer.gradient_clip_val", -1, "must be greater than or equal to 0"),
    ("trainer.gradient_clip_algorithm", "sum", "must be 'norm' or 'value'"),
    ("trainer.max_steps", 0, "must be -1 or must be greater than or equal to 1"),
    ("trainer.max_steps", -5, "must be -1 or must be greater than or equal to 1"),
    ("trainer.log_every_n_steps", 0, "must be greater than or equal to 1"),
    ("trainer.accumulate_grad_batches", 0, "must be greater than or equal to 1"),
    ("trainer.deterministic", "yes", "must be a valid boolean or must be 'warn'"),
    # what has not been tried, and what there is not
    ("trainer.devices", 0, "must be 'auto' or -1 or must be greater than or equal to 1"),
    ("trainer.devices", "all", "must be 'auto' or -1 or must be "),
    ("trainer.num_nodes", 0, "must be greater than or equal to 1"),
    ("trainer.accelerator", "tpu", "must be 'auto', 'cpu', 'gpu', 'cuda' or 'mps'"),
    ("trainer.strategy", "ddp_spawn", "must be 'auto', 'ddp' or 'ddp_find_unused_parameters_true'"),
    ("trainer.strategy", "fsdp", "must be 'auto', 'ddp' or 'ddp_find_unused_parameters_true'"),
    ("trainer.precision", "transformer-engine", "must be 64, 32, 16"),
    ("trainer.precision", "16-true", "must be 64, 32, 16"),
    ("trainer.precision", "int8", "must be 64, 32, 16"),
]  # fmt: skip


@pytest.fixture(scope="module")
def composed() -> DictConfig:
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        config = hydra.compose("train", ["hold=state_passing"])
    GlobalHydra.instance().clear()
    OmegaConf.set_struct(config, False)
    # What Hydra knows while a job runs.
    config.pop("logger")
    return config


@pytest.mark.parametrize(("key", "value", "message"), CHECKED, ids=[f"{key}={value}" for key, value, _ in CHECKED])
def test_refused_by_a_signature(key: str, value: Any, message: str, composed: DictConfig) -> None:
    config = copy.deepcopy(composed)
    OmegaConf.update(config, key, value)
    with pytest.raises(UserError) as refused:
        check(config, front_door.Root)
    told = str(refused.value)
    of_the_key = message.startswith(("no such", "is set by"))
    assert told.startswith(f"{key}: {message}" if of_the_key else f"{key}={value}: {message}"), told


PARTS = {
    "task": ["Prose", "StatePassing"], "noise": ["Detect", "TinyGPT"], "backbone": ["Prose", "RMTEncoder"],
    "model": ["Detect", "TinyBert", "WarmupDecay"], "model.update": ["Prose"], "answer": ["RMTEncoder"],
    "data": ["LengthTest"], "curriculum": ["WarmupDecay"], "hold": ["Detect", "Prose"], "optim": ["FixedSteps"],
    "metrics.accuracy": ["Prose"], "trainer": ["Phases"],
}  # fmt: skip


@pytest.mark.fault("a part of a config is of another kind than its group", "refused in one line, nothing is built")
@pytest.mark.parametrize(("group", "name"), [(group, name) for group, names in PARTS.items() for name in names])
def test_a_part_of_another_kind(group: str, name: str, composed: DictConfig) -> None:
    config = copy.deepcopy(composed)
    OmegaConf.update(config, f"{group}._target_", f"rmt_lightning.{name}")
    with pytest.raises(UserError) as refused:
        check(config, front_door.Root)
    told = str(refused.value)
    what = group.partition(".accuracy")[0]
    assert told.startswith(f"{group}._target_=rmt_lightning.{name}: is nothing for {what}, for it has no "), told


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rmt_lightning.Nope", f"cannot be imported ({sys.modules['rmt_lightning'].__file__} has no Nope); give "),
        ("absent.Noise", "cannot be imported (No module named 'absent'); give <module>.<class>"),
        ("", "cannot be imported (Empty path); give"), (3, "cannot be imported ("), ("Noise", "cannot be imported ("),
        ("os.sep", "is no class; give one"), (["a"], "cannot be imported ("),
    ],
)  # fmt: skip
def test_a_target_that_is_not_there(name: Any, message: str, composed: DictConfig) -> None:
    config = copy.deepcopy(composed)
    OmegaConf.update(config, "noise._target_", name)
    with pytest.raises(UserError, match=rf"^noise\._target_={re.escape(f'{name}: {message}')}"):
        check(config, front_door.Root)


@pytest.mark.fault("a module of one's own ends the program when it is imported", "one line says so")
@pytest.mark.parametrize(("content", "reason"), [("raise SystemExit(3)", "3"), ("raise ValueError('odd')", "odd")])
def test_a_module_that_cannot_be_imported(
    content: str, reason: str, composed: DictConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"module_{reason}"
    (tmp_path / f"{name}.py").write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    config = copy.deepcopy(composed)
    OmegaConf.update(config, "noise._target_", f"{name}.Noise")
    with pytest.raises(UserError, match=rf"^noise\._target_={name}\.Noise: cannot be imported \({reason}\); give"):
        check(config, front_door.Root)
    with pytest.raises(UserError, match=rf"^{name}: cannot be imported \(\w+ {reason}\); mend it$"):
        check_saved({"noise": {"_target_": f"{name}.Noise"}}, Path("config.yaml"), [name])


class Unannotated:
    """A noise whose arguments may be anything, in several ways of saying so."""

    def __init__(self, days, of: Any, some: list, rows: dict[str, list[int]], other: object = 3, **more) -> None: ...  # type: ignore[no-untyped-def, type-arg]

    def documents(self, split: str) -> None: ...

    def fingerprint(self) -> None: ...


def test_what_may_be_anything_can_be_typed(composed: DictConfig) -> None:
    config = copy.deepcopy(composed)
    given = {"days": 3, "of": "x", "some": [1], "rows": {"a": [1]}, "other": 2.0, "further": "y"}
    config.noise = {"_target_": f"{__name__}.Unannotated", **given}
    check(config, front_door.Root)


def test_a_group_without_a_class_has_no_settings(composed: DictConfig) -> None:
    for group, key in (("logger", "project"), ("metrics", "f1")):
        config = copy.deepcopy(composed)
        OmegaConf.update(config, f"{group}.{key}", 3)
        with pytest.raises(UserError, match=rf"^{group}\.{key}: no such setting; there is none here"):
            check(config, front_door.Root)


@pytest.mark.parametrize(("door", "key"), [(attend, "streams"), (evaluate, "batch_size")])
def test_samples_side_by_side_that_no_machine_holds(door: Any, key: str) -> None:
    with pytest.raises(UserError, match=rf"{key}=100000000000: must be less than or equal to 65536"):
        check(OmegaConf.create({key: 10**11}), door.Root)


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in filter(RANK.fullmatch, list(os.environ)):
        monkeypatch.delenv(name)


def test_each_setting_of_a_trainer_is_obeyed_or_refused() -> None:
    theirs = set(inspect.signature(L.Trainer.__init__).parameters) - {"self"}
    ours = set(inspect.signature(RunTrainer).parameters) - {"folder", "threads", "compile"}
    assert theirs == ours | REFUSED and not ours & REFUSED


def test_the_others_are_obeyed(tmp_path: Path, clean: None, monkeypatch: pytest.MonkeyPatch) -> None:
    # Lightning takes defaults from there, which no config.yaml tells of.
    monkeypatch.setenv("PL_TRAINER_LIMIT_VAL_BATCHES", "0")
    monkeypatch.setenv("PL_TRAINER_MAX_TIME", "00:00:00:01")
    before = torch.backends.cudnn.benchmark
    trainer = RunTrainer(
        tmp_path, [], [], "cpu", 2, 1, "ddp_find_unused_parameters_true", "bf16-true", 7, {"hours": 1}, 0.5, "value",
        3, 2, "warn", True, True,
    )  # fmt: skip
    try:
        assert (trainer.num_devices, trainer.num_nodes, trainer.max_steps, trainer.precision) == (2, 1, 7, "bf16-true")
        assert trainer.strategy._ddp_kwargs == {"find_unused_parameters": True}
        assert (trainer.gradient_clip_val, trainer.gradient_clip_algorithm) == (0.5, "value")
        assert (trainer.accumulate_grad_batches, trainer.log_every_n_steps) == (3, 2)
        assert trainer._detect_anomaly and torch.backends.cudnn.benchmark
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert trainer.budget is not None and trainer.budget.seconds == 3600
        assert trainer.limit_val_batches == 1.0 and trainer.max_epochs == -1
        assert [type(callback) for callback in trainer.callbacks] == [TimeBudget]
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark = before


MACHINE: list[tuple[dict[str, Any], str]] = [
    ({"devices": [0]}, "trainer.devices=[0]: names GPUs; on a CPU give the number of processes, or auto"),
    ({"devices": -1}, "trainer.devices=-1: names GPUs"),
    ({"threads": 100_000}, "trainer.threads=100000: too many for "),
    ({"devices": 9999}, "trainer.devices=9999: too many processes for "),
    ({"accelerator": "cuda"}, "trainer.accelerator=cuda: torch finds no GPU; give cpu or auto"),
    ({"accelerator": "mps"}, "trainer.accelerator=mps: torch finds no GPU; give cpu or auto"),
    ({"num_nodes": 2}, "trainer.num_nodes=2: nothing starts the other machines; use srun or torchrun, or set MASTER_"),
    ({"precision": "16-mixed"}, "trainer.precision=16-mixed: is for GPUs alone; give bf16-mixed or 32-true"),
    ({"precision": 16}, "trainer.precision=16: is for GPUs alone"),
    (
        {"gradient_clip_algorithm": "value"},
        "trainer.gradient_clip_algorithm=value: clips nothing without trainer.gradie",
    ),
    ({"max_time": "soon"}, "trainer.max_time=soon: is no time; give days:hours:minutes:seconds, such as 00:08:00:00"),
    ({"max_time": "08:00"}, "trainer.max_time=08:00: is no time"),
    ({"max_time": "00:00:00:-1"}, "trainer.max_time=00:00:00:-1: is no time"),
    ({"max_time": "-00:00:00:09"}, "trainer.max_time=-00:00:00:09: is no time"),
    ({"max_time": {"fortnights": 1}}, "trainer.max_time={'fortnights': 1}: is no time"),
    ({"max_time": "99999999999:00:00:00"}, "trainer.max_time=99999999999:00:00:00: is no time"),
    (
        {"strategy": L.pytorch.strategies.DDPStrategy(start_method="spawn"), "devices": 2},
        "trainer.strategy=DDPStrategy: has not been tried with this program; give auto or ddp",
    ),
]


@pytest.mark.skipif("torch.cuda.is_available()")
@pytest.mark.parametrize(("settings", "message"), MACHINE, ids=[message[:40] for _, message in MACHINE])
def test_refused_on_this_machine(settings: dict[str, Any], message: str, tmp_path: Path, clean: None) -> None:
    with pytest.raises(UserError) as refused:
        RunTrainer(tmp_path, [], [], **{"accelerator": "cpu"} | settings)
    assert str(refused.value).startswith(message)


def test_what_the_run_gives_a_part_is_no_setting() -> None:
    part = OmegaConf.create({"trainer": {"_target_": "builtins.dict", "callbacks": []}}).trainer
    with pytest.raises(UserError, match=r"trainer\.callbacks: is set by the run itself; leave it out"):
        construct(part, callbacks=[1])
    assert construct(part, folder=1) == {"callbacks": [], "folder": 1}


@pytest.mark.parametrize(
    ("typed", "code", "message"),
    [
        ("+trainer.callbacks=[]", 2, "trainer.callbacks: is set by the run itself; leave it out"),
        ("data.batch_size=1000000000", 2, "data.batch_size=1000000000: a batch of 3 segments takes at least "),
        (
            "curriculum.max_segments=1000000000",
            2,
            "curriculum.max_segments=1000000000: must be less than or equal to 4096",
        ),
        ("data.num_workers=100000", 2, "data.num_workers=100000: too many processes for "),
        (
            "hold=state_passing hold.pool=1000000000",
            2,
            "hold.pool=1000000000: that many memories take ",
        ),
        (
            "hold=state_passing hold.fragments=1000",
            2,
            "hold.fragments=1000: more pieces than a segment of 27 tokens has room for; give less",
        ),
        ("+model.update.width=3", 2, "model.update.width: is set by the run itself; leave it out"),
        ("model=ntm model.slots=1000000000", 2, "model: its state takes 88 GB, and this machine has "),
    ],
)
def test_refused_by_the_command(
    typed: str, code: int, message: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RMT_LIGHTNING_CACHE", str(cache))
    monkeypatch.setattr(sys, "argv", ["train", *SMALL, *typed.split(), "hydra.run.dir=run"])
    with pytest.raises(SystemExit) as left:
        front_door.run()
    GlobalHydra.instance().clear()
    told = capsys.readouterr().err
    assert left.value.code == code and told.startswith(f"error: {message}") and told.count("\n") == 1, told
    assert not (tmp_path / "run").exists()


# Which process this is.


TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}
SRUN = {
    "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_PROCID": "1",
    "SLURM_LOCALID": "1", "SLURM_NODEID": "0",
}  # fmt: skip
BY_HAND = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "LOCAL_RANK": "1"}
LEFT: list[dict[str, str]] = [
    {"LOCAL_RANK": "1"}, {"LOCAL_RANK": "abc"}, {"LOCAL_RANK": ""}, {"RANK": "3", "WORLD_SIZE": "4"},
    {"NODE_RANK": "1"}, {"GROUP_RANK": "2"}, {"RMT_LIGHTNING_PARENT": "77"}, {"RMT_LIGHTNING_PARENT": "x"},
    {"SLURM_NTASKS": "4", "SLURM_PROCID": "2", "SLURM_LOCALID": "2", "SLURM_JOB_NAME": "job"},
    SRUN | {"SLURM_STEP_NUM_TASKS": "1"}, {"SLURM_PROCID": "nonsense"},
]  # fmt: skip


@pytest.mark.fault("a rank's variables are left over from another program", "the run is a process by itself")
@pytest.mark.parametrize("left", LEFT, ids=str)
def test_left_over(left: dict[str, str], clean: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", dict(left))
    forget_leftovers(["train"])
    assert os.environ == {} and is_first_process()


@pytest.mark.parametrize("told", [TORCHRUN, SRUN, BY_HAND, SRUN | {"SLURM_JOB_NAME": "bash"}], ids=str)
def test_told_by_a_launcher(told: dict[str, str], clean: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", told | {"RMT_LIGHTNING_PARENT": "1"})
    forget_leftovers(["train"])
    told = {name: value for name, value in told.items() if name != "SLURM_JOB_NAME"}
    assert os.environ == told and not is_first_process()
    # Only Lightning starts ranks that watch their parent.
    os.environ |= {"RMT_LIGHTNING_PARENT": "1"}
    forget_leftovers(["train", "hydra.job.name=train_ddp_process_1"])
    assert os.environ == told | {"RMT_LIGHTNING_PARENT": "1"}


@pytest.mark.parametrize(
    ("told", "spins"), [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)], ids=str
)
def test_threads_wait_as_the_environment_says(
    told: dict[str, str], spins: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, told.get(name, ""))
        if name not in told:
            monkeypatch.delenv(name)
    share_cores()
    assert os.environ.get("GOMP_SPINCOUNT") == spins


WRONG = [TORCHRUN | {"RANK": "x"}, {"TORCHELASTIC_RUN_ID": "x"}, SRUN | {"SLURM_PROCID": ""}, {"MASTER_PORT": "any"}]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_told_wrongly(wrong: dict[str, str], clean: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", dict(wrong))
    with pytest.raises(UserError, match=r"(RANK|PROCID|MASTER_PORT)=.*: tells which process of a run this is"):
        forget_leftovers(["train"])


@pytest.mark.parametrize("told", [TORCHRUN, SRUN, BY_HAND, BY_HAND | {"LOCAL_RANK": "0", "WORLD_SIZE": "2"}], ids=str)
@pytest.mark.skipif("torch.cuda.is_available()")
def test_another_number_of_processes(
    told: dict[str, str], clean: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"= 1: but (2 processes were started|LOCAL_RANK=1); give as many as"):
        RunTrainer(tmp_path, [], [], accelerator="cpu")


@pytest.mark.parametrize("settings", [{"width": 2**15}, {"width": 2**13, "layers": 100}], ids=str)
def test_weights_that_this_machine_cannot_hold(settings: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "machine_memory", lambda: 2**34)
    with pytest.raises(UserError, match=r"backbone: its [\d,]+ weights take [\d,]+ GB, and this machine has 17; make"):
        TinyBert(**settings)


# What a budget ends.


def test_a_budget_of_time(train: Run, tmp_path: Path) -> None:
    two = ("curriculum.max_segments=2", "curriculum.steps=3", "data.steps_per_epoch=3")
    held = ("hold=state_passing", "hold.steps=2", "hold.pool=8", "hold.until_rate=1")
    short = train("trainer.max_time=00:00:00:00", *two, *held, "hydra.run.dir=run")
    assert short.returncode == 0, short.stderr
    assert "stopped by trainer.max_time=00:00:00:00; go on with resume=run" in short.stdout
    assert torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["global_step"] == 1
    assert (tmp_path / "run/evaluation.csv").exists()
    (run,), _ = read_runs([str(tmp_path / "run")])
    assert run.status == "stopped at max_time" and [phase.out_of_time for phase in run.phases] == [True, False]
    resumed = train("resume=run", "trainer.max_time=null", small=False)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    phases = json.loads((tmp_path / "run/phases.json").read_text())
    # Not with the epoch, a step later.
    assert [(phase["finished"], phase["steps"], phase["out_of_time"]) for phase in phases] == [
        (True, 6, False), (True, 2, False),
    ]  # fmt: skip


@pytest.mark.soak
def test_a_budget_of_steps_within_an_epoch(train: Run, tmp_path: Path) -> None:
    text = (
        "task=language_modeling", "model.width=8", "model.layers=1", "model.heads=2", "noise.documents=20",
        "backbone.vocabulary_size=600", "data.segment_length=20", "data.steps_per_epoch=4", "curriculum.steps=3",
        "data.validation_documents=1", "test.documents=2", "hydra.run.dir=run",
    )  # fmt: skip
    for words, steps in ((text, 3), (("resume=run", "curriculum.steps=6"), 6)):
        result = train(*words, small=False)
        assert result.returncode == 0, result.stdout + result.stderr
        assert torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["global_step"] == steps
        assert f"step {steps}: perplexity" in result.stdout


# What is said of a loss that is no number.

SPOILED = """
import torch
from rmt_lightning.training.answering import FactClassifier
from rmt_lightning.train import run

def spoil(self):
    torch.nn.init.constant_(self.head.weight, float("nan"))

FactClassifier.on_fit_start = spoil
run()
"""


@pytest.mark.fault("weights that are no numbers at the start", "a line that does not blame the learning rate")
def test_weights_that_are_no_numbers(train: Run) -> None:
    result = train("hydra.run.dir=run", driver=SPOILED)
    assert result.returncode == 1 and result.stderr == (
        "error: the loss became nan at step 0; no step has been made since the start, where head.weight is not finite: "
        "begin with other weights; there is no good checkpoint\n"
    )


@pytest.mark.soak
@pytest.mark.fault("a learning rate that is too high", "the line names what set it, and a checkpoint that is good")
def test_a_learning_rate_that_is_too_high(train: Run) -> None:
    held = ("curriculum.max_segments=2", "hold=state_passing", "hold.steps=6", "hold.pool=8", "hold.lr=1e30")
    result = train(*held, "trainer.gradient_clip_val=null", "hydra.run.dir=run")
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert "lower the learning rate of the phase state_passing; the last good checkpoint is run/ch" in result.stderr
    # The last checkpoint fails in its very next step.
    last = train("hydra.run.dir=last", "optim.lr=1e30", "optim.warmup=0", "data.steps_per_epoch=1")
    assert last.returncode == 1 and last.stderr.endswith("; there is no good checkpoint\n"), last.stderr


# A command that pip made finds classes of one's own where `python -m` does.


@pytest.mark.parametrize("first", ["bin", ""])
def test_own_modules_beside_a_script(first: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path / first), *sys.path])
    monkeypatch.setattr(sys, "argv", ["rmt-train", "--version"])
    with pytest.raises(SystemExit):
        hydra_errors.front_door(lambda config: None, "train")()
    assert sys.path.count(str(tmp_path)) == 1
    GlobalHydra.instance().clear()
