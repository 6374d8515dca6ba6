"""What is read out of errors of Hydra and OmegaConf, held against the versions that are installed."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import hydra
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.errors import (
    ConfigCompositionException,
    InstantiationException,
    MissingConfigException,
    OverrideParseException,
)
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig
from omegaconf.errors import InterpolationKeyError

from rmt_lightning import attend, evaluate, export, flops
from rmt_lightning.app import hydra_errors
from rmt_lightning.app.schema import CONF


@pytest.fixture(autouse=True)
def no_hydra_left_over() -> Iterator[None]:
    yield
    GlobalHydra.instance().clear()


def compose(override: str) -> DictConfig:
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        return hydra.compose("train", [override])


def compose_a_run(override: str, mode: RunMode = RunMode.RUN) -> DictConfig:
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        return GlobalHydra.instance().config_loader().load_configuration("train", [override], mode)


def compose_a_sweep(override: str) -> DictConfig:
    return compose_a_run(override, RunMode.MULTIRUN)


def build_metric(override: str) -> object:
    return instantiate(compose(override).metrics)


def allocate(number: str) -> object:
    return torch.empty(int(number))


# For each pattern what is done, the error it brings, and what the pattern must find in it.
SAID: dict[str, tuple[Callable[[str], object], str, type[Exception], str]] = {
    "NO_DEFAULT": (compose, "sweep=memory_size", ConfigCompositionException, "sweep=memory_size"),
    "TWICE": (compose, "+model=lstm", ConfigCompositionException, "model"),
    "NO_VALUE": (compose_a_run, "hydra.mode=x", ConfigCompositionException, "hydra.mode=x"),
    "NO_SETTING": (compose, "hold.steps=9", ConfigCompositionException, "hold.steps"),
    "NOT_THERE": (compose, "~curriculum.patience", ConfigCompositionException, "curriculum.patience"),
    "NO_CHOICE": (compose, "hold=null", ValueError, "NoneType"),
    "THERE": (compose, "+seed=2", ConfigCompositionException, "seed"),
    "FUNCTION": (compose_a_run, "seed=range(3)", ConfigCompositionException, "seed=range(3"),
    "SWEPT": (compose_a_sweep, "hydra.sweep.dir=a,b", ConfigCompositionException, "hydra.sweep.dir=a,b"),
    "SEVERAL": (compose_a_run, "cache_dir=a,b", ConfigCompositionException, "cache_dir=a,b"),
    "ARGUMENTS": (
        build_metric,
        "+metrics.f1._target_=torchmetrics.classification.MulticlassF1Score",
        InstantiationException,
        "'num_classes'",
    ),
    "NO_MEMORY": (allocate, "1000000000000000", RuntimeError, "can't allocate memory"),
    "PLACE": (
        build_metric,
        "+metrics.f1._target_=torchmetrics.classification.MulticlassF1Score",
        InstantiationException,
        "metrics.f1",
    ),
}


@pytest.mark.parametrize("name", SAID)
def test_the_words_of_hydra(name: str) -> None:
    act, override, kind, found = SAID[name]
    with pytest.raises(kind) as raised:
        act(override)
    match = getattr(hydra_errors, name).search(str(raised.value))
    assert match and match[1].rstrip('")') == found, raised.value


def test_each_pattern_is_held() -> None:
    assert {name for name, value in vars(hydra_errors).items() if isinstance(value, re.Pattern)} == SAID.keys()


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("+model=lstm", "model: is among the defaults; write model=… without +"),
        ("++task=detect", "task: is among the defaults; write task=… without +"),
        ("~optim", "~optim: the run needs it; leave it out"),
        ("noise..documents=3", "'noise..documents=3': settings are given as key=value, such as seed=2"),
        ("=1", "'=1': settings are given as key=value, such as seed=2"),
        ("hydra.foo=1", "hydra.foo: no such setting; --cfg hydra shows those that there are"),
        ("--resolve", "The --resolve flag can only be used in conjunction with --cfg or --help"),
        (
            "+metrics.a/b.c=x",
            "+metrics.a/b.c=x: cannot be read; a key is made of names with points between them, such ",
        ),
        ("task=detect,", "task=detect,: no such choice; did you mean detect? allowed: babi, babilong, carried, "),
        (
            "test.segments=[1,2",
            "test.segments=[1,2: cannot be read; a text with such characters needs quotes, and a list looks like "
            "test.segments=[1,2]: type 'test.segments=",
        ),
        (
            "test.segments=range(3)",
            "test.segments=range(3): gives the values of a sweep (--multirun); for one text, type 'test.segments=",
        ),
        ("curriculum.steps={1:2}", "curriculum.steps={1: 2}: must be a valid integer or must be a valid list\n"),
        (
            "hydra.sweep.dir=[x]",
            "hydra.sweep.dir=[x]: Cannot convert 'list' to string: '['x']'; for a text, type 'hydra.sweep.dir=",
        ),
        ("+task=detect", "task: is among the defaults; write task=… without +\n"),
        ("+seed=2", "seed: is a setting already; write seed=… without +\n"),
        ("metrics={}", "metrics={}: sets nothing; name what is to be set, or leave it out\n"),
        ("noise._target_=os.absent", f"noise._target_=os.absent: cannot be imported ({os.__file__} has no absent); "),
        (
            "trainer.accumulate_grad_batches=2",
            "trainer.accumulate_grad_batches: no such setting; its yaml leaves it to the class; write "
            "+trainer.accumulate_grad_batches=…",
        ),
    ],
)
def test_a_line_that_helps(word: str, told: str, refused: Callable[..., str]) -> None:
    assert refused(word, "hydra.run.dir=run").startswith(f"error: {told}")


@pytest.mark.fault("RMT_LIGHTNING_CACHE is set to nothing", "the cache is where it is by default")
def test_an_empty_variable_is_none(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RMT_LIGHTNING_CACHE", "")
    assert refused("trust=absent", "hydra.run.dir=run").startswith("error: trust=absent: there is no module absent;")


@pytest.mark.fault("a command is given what it has not, with or without +", "refused in a line that says what it has")
@pytest.mark.parametrize(
    ("door", "word", "told"),
    [
        (evaluate, "+answer=generate", "answer: no such setting; allowed: checkpoint, stages, "),
        (evaluate, "data.batch_size=3", "data.batch_size: no such setting; allowed: checkpoint, "),
        (evaluate, "+zz.bar=1", "zz.bar: no such setting; allowed: checkpoint, "),
        (evaluate, "noise.documents=20", "noise.documents: no such setting; it comes with noise=prose\n"),
        (evaluate, "++noise.documents=20", "noise: names no class; choose one with noise=…, or give its yaml a "),
        (attend, "task.moves=2", "task.moves: no such setting; it comes with task=whereabouts\n"),
        (attend, "task=language_modeling", "task=language_modeling: is a kind of run of its own, which another cannot"),
        (export, "+noise=prose", "noise: no such setting; allowed: checkpoint, folder, merge, trust\n"),
        (flops, "+model=lstm", "model: no such setting; allowed: tokens, segment_length, text_length, fol"),
        (flops, "-m tokens=[1],[2]", "--multirun: the jobs would write over each other; give each a folder, such as"),
        (flops, "backbone.name=gpt2", "backbone.name: no such setting; it comes with backbone=bert_base_cased or big"),
    ],
)  # fmt: skip
def test_what_a_door_has_not(
    door: ModuleType,
    word: str,
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    given = {"checkpoint=run": door is not flops, "folder=there": door in (export, flops)}
    monkeypatch.setattr(sys, "argv", [door.__name__, *(name for name in given if given[name]), *word.split()])
    with pytest.raises(SystemExit) as left:
        door.run()
    said = capsys.readouterr().err
    assert left.value.code == 2 and said.startswith(f"error: {told}") and said.count("\n") == 1, said


def test_options_may_stand_anywhere() -> None:
    words = ["seed=1", "-m", "noise.documents=20", "--config-dir", "mine", "task=detect"]
    assert hydra_errors._options_first(words) == [
        "-m", "--config-dir", "mine", "seed=1", "noise.documents=20", "task=detect",
    ]  # fmt: skip


def test_what_errors_tell_without_words() -> None:
    with pytest.raises(MissingConfigException) as missing:
        compose("hold=state_pasing")
    assert (missing.value.missing_cfg_file, missing.value.options) == ("hold/state_pasing", ["state_passing"])
    with pytest.raises(OverrideParseException) as unread:
        compose("test.segments=[1")
    assert unread.value.override == "test.segments=[1"
    with pytest.raises(InterpolationKeyError) as absent:
        print(compose("model.memory_size=${absent}").model.memory_size)
    assert absent.value.full_key == "model.memory_size"


def test_choices_are_those_that_hydra_lists(tmp_path: Path) -> None:
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "own.yaml").write_text("defaults: [detect]\n")
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        loader = GlobalHydra.instance().config_loader()
        for group in ("", "task", "model", "model/update", "hydra/sweeper", "nix"):
            for kind in (ObjectType.CONFIG, ObjectType.GROUP):
                assert hydra_errors._choices(loader, group, kind) == hydra_errors._READ_AGAIN(loader, group, kind)
        place = [f"hydra.searchpath=[{tmp_path}]"]
        assert "own" in hydra_errors._choices(loader, "task", config_name="train", overrides=place)
