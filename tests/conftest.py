"""A small world that most tests share, and a table of the faults that were tried."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from itertools import chain
from multiprocessing import forkserver
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
import warm
from hydra.core.global_hydra import GlobalHydra
from transformers import PreTrainedTokenizerBase

from rmt_lightning.core.files import write_csv
from rmt_lightning.models.rmt import RMTEncoder
from rmt_lightning.models.tiny import TinyBert
from rmt_lightning.tasks.corpus import Corpus, tokenize
from rmt_lightning.tasks.facts import Carried, Detect, Reasoning, Split
from rmt_lightning.tasks.noise import Prose
from rmt_lightning.tasks.placement import Placement

# Two cores are shared by two test processes.
torch.set_num_threads(1)

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "data"

# A run of a few seconds: three stages of two short epochs each, whatever the accuracy.
SMALL = (
    "backbone.width=16",
    "backbone.layers=1",
    "backbone.heads=2",
    "backbone.vocabulary_size=900",
    "noise.documents=20",
    "data.segment_length=40",
    "data.batch_size=4",
    "data.steps_per_epoch=3",
    "data.validation_samples=16",
    "curriculum.max_segments=3",
    "curriculum.steps=6",
    "curriculum.when_stuck=continue",
    "curriculum.validations=99",
    "test.segments=[1,4]",
    "test.samples=8",
)


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """A command that runs within a test sends what is logged to its screen, where later tests would not see it."""
    loggers = [logging.getLogger(name) for name in ("rmt_lightning", "py.warnings", "lightning", "lightning.pytorch")]
    before = [(logger.handlers, logger.propagate, logger.level) for logger in loggers]
    yield
    for logger, (handlers, propagate, level) in zip(loggers, before, strict=True):
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    if not SHARED.is_dir():
        pytest.skip("the data folder that is shared between developers is not here")
    return SHARED


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    texts = chain(Detect().sentences(), Carried().sentences(), Reasoning().sentences())
    prose = (sentence for document in Prose(20).documents("train") for sentence in document)
    return TinyBert(vocabulary_size=900).tokenizer(chain(texts, prose))


@pytest.fixture(scope="session")
def corpora(tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> dict[Split, Corpus]:
    return tokenize(Prose(20), tokenizer, tmp_path_factory.mktemp("cache"))


@pytest.fixture
def placement(corpora: dict[Split, Corpus], tokenizer: PreTrainedTokenizerBase) -> Placement:
    return Placement(Detect(), corpora, tokenizer, text_length=30, seed=7)


@pytest.fixture
def make_model(tokenizer: PreTrainedTokenizerBase) -> Callable[..., RMTEncoder]:
    def make(segment_length: int = 20, memory_size: int = 4, double: bool = True, **options: int) -> RMTEncoder:
        torch.manual_seed(0)
        encoder = TinyBert(width=16, layers=2, heads=2, max_positions=64).encoder(tokenizer)
        model = RMTEncoder(encoder, segment_length, memory_size, **options)
        # In double precision, differences between two ways to the same result are rounding only.
        return model.double() if double else model

    return make


Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("noise-cache")


def final(folder: Path) -> dict[str, torch.Tensor]:
    """The weights that a run has ended with."""
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def assert_identical(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


@pytest.fixture
def environment(cache: Path) -> dict[str, str]:
    """What a stranger's shell would have: no key, no terminal, a cache of its own."""
    private = ("WANDB_", "RMT_", "LOCAL_RANK", "NODE_RANK", "PYTEST_", "GOMP_")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(private)}
    own = {"RMT_LIGHTNING_CACHE": str(cache), "OMP_NUM_THREADS": "1", "COLUMNS": "200", "HF_HUB_OFFLINE": "1"}
    return kept | own | {"NETRC": os.devnull, "WANDB_SILENT": "true"}


@pytest.fixture(scope="session")
def forks() -> Any:
    """Processes that are forked from one which has imported what takes seconds to import."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["warm"])
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        forkserver.ensure_running()
    return context


@pytest.fixture(scope="session")
def launch(tmp_path_factory: pytest.TempPathFactory, forks: Any) -> Run:
    """A module or a program as a process of its own, in a folder."""

    def run(program: str, *words: str, folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
        here = tmp_path_factory.mktemp("output")
        output = [str(here / name) for name in ("stdout", "stderr")]
        told: dict[str, str] = {}
        for name in output:
            os.mkfifo(name)
        # A pipe ends when no process is left that could write to it: those that this one has started may outlive it.
        readers = [
            Thread(target=lambda name=name: told.update({name: Path(name).read_text()}), daemon=True) for name in output
        ]
        for reader in readers:
            reader.start()
        process = forks.Process(target=warm.command, args=(program, list(words), str(folder), environment, output))
        process.start()
        process.join(240)
        assert process.exitcode is not None, "it hangs"
        for name, reader in zip(output, readers, strict=True):
            with suppress(OSError):
                # If it has died before it opened the pipe, nobody else will.
                os.close(os.open(name, os.O_WRONLY | os.O_NONBLOCK))
            reader.join(60)
        return subprocess.CompletedProcess([program, *words], process.exitcode, *(told[name] for name in output))

    return run


@pytest.fixture
def command(environment: dict[str, str], tmp_path: Path, launch: Run) -> Run:
    """The same in an empty folder, with a stranger's environment."""
    return partial(launch, folder=tmp_path, environment=environment)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, cache: Path, launch: Run) -> Callable[..., Path]:
    """The folder of a small run, trained to its end for several tests."""

    def train(*settings: str) -> Path:
        folder = tmp_path_factory.mktemp("trained")
        environment = os.environ | {"RMT_LIGHTNING_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
        words = (*SMALL, "hydra.run.dir=run", *settings)
        result = launch("rmt_lightning.train", *words, folder=folder, environment=environment)
        assert result.returncode == 0, result.stdout + result.stderr
        return folder / "run"

    return train


@pytest.fixture(scope="session")
def finished_run(trained: Callable[..., Path]) -> Path:
    """The folder of a run that was trained to three segments, to be copied."""
    return trained("data.segment_length=48")


@pytest.fixture
def train(command: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The real command; or a driver, a program that changes something and runs the command."""

    def run(*overrides: str, small: bool = True, driver: str | None = None) -> subprocess.CompletedProcess[str]:
        program = "rmt_lightning.train"
        if driver:
            # A file, because Lightning starts other ranks by its name.
            program = str(tmp_path_factory.mktemp("driver") / "driver.py")
            Path(program).write_text(driver)
        return command(program, *(SMALL if small else ()), *overrides)

    return run


@pytest.fixture
def refused(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., str]]:
    """What the command says to settings that it refuses, without the seconds that a new process takes to start."""
    # Imported here: processes that run the module read this file before they do.
    from rmt_lightning import train as front_door

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RMT_LIGHTNING_CACHE", str(cache))

    def run(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["train", *words])
        with pytest.raises(SystemExit) as left:
            front_door.run()
        GlobalHydra.instance().clear()
        told = capsys.readouterr().err
        assert left.value.code == 2 and told.count("\n") == 1, told
        return told

    yield run
    GlobalHydra.instance().clear()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--faults-csv", type=Path, help="where to write the table of faults as csv")


def pytest_collection_finish() -> None:
    # All modules are there: no garbage, which the collector need not look at again and again.
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000)


def pytest_itemcollected(item: pytest.Item) -> None:
    # Properties travel with a report from worker processes to the one that prints.
    if mark := item.get_closest_marker("fault"):
        item.user_properties.append(("fault", list(mark.args)))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """The faults that were tried, what had to follow, and how often it did."""
    found: dict[tuple[str, ...], dict[str, float]] = {}
    for outcome, column in (("passed", "survived"), ("failed", "lost"), ("error", "lost")):
        for report in terminalreporter.stats.get(outcome, ()):
            properties = dict(getattr(report, "user_properties", ()))
            if "fault" in properties:
                area = Path(report.nodeid.partition("::")[0]).stem.removeprefix("test_")
                counts = found.setdefault((area, *properties["fault"]), {"survived": 0, "lost": 0, "seconds": 0})
                counts[column] += 1
                counts["seconds"] += report.duration
    rows = [
        dict(zip(("area", "fault", "must follow"), named, strict=True)) | {k: f"{n:.0f}" for k, n in counts.items()}
        for named, counts in sorted(found.items())
    ]
    if not rows or "fault" not in config.option.markexpr:
        return
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in rows[0]}
    terminalreporter.section("faults")
    for row in [{name: name for name in widths}, *rows]:
        terminalreporter.line("  ".join(value.ljust(widths[name]) for name, value in row.items()).rstrip())
    if config.option.faults_csv:
        write_csv(config.option.faults_csv, rows)
