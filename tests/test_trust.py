"""A run folder that came from elsewhere: nothing in it is executed or looked up, and no link leads out of it."""

from __future__ import annotations

import importlib
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Run
from hydra.core.global_hydra import GlobalHydra

from rmt_lightning.app.resume import composed_again
from rmt_lightning.app.trust import check_saved, check_trust
from rmt_lightning.core.errors import UserError
from rmt_lightning.core.run_folder import findings

OLD = Path(__file__).parent / "version_0_1" / "facts"
DOORS = {
    "train": ["resume=run"],
    "evaluate": ["checkpoint=run", "segments=[1]", "samples=8", "device=cpu"],
    "attend": ["checkpoint=run", "device=cpu"],
    "export": ["checkpoint=run", "folder=model"],
}
REFUSED = "refused in one line, before anything is imported"


@pytest.fixture
def foreign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder, beside a pickle and a module that leave a file if they are executed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("SECRET", "hunter2")
    shutil.copytree(OLD, "run")
    Path("run/overrides.yaml").write_text("[]")

    class Evil:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
            return os.system, ("touch executed",)

    Path("evil.pkl").write_bytes(pickle.dumps(Evil()))
    code = "import os, torch\nos.system('touch executed')\nclass Detect:\n    name = 'x'\n"
    for name in ("evil_task.py", "run/evil_task.py"):
        Path(name).write_text(code)
    return tmp_path / "run"


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What a door says to what it refuses."""

    def run(door: str, *words: str) -> str:
        monkeypatch.setattr(sys, "argv", [door, *DOORS[door], *words])
        GlobalHydra.instance().clear()
        with pytest.raises(SystemExit) as left:
            importlib.import_module(f"rmt_lightning.{door}").run()
        GlobalHydra.instance().clear()
        told = capsys.readouterr().err
        assert left.value.code == 2 and told.count("\n") == 1, told
        assert not Path("executed").exists() and "hunter2" not in told
        assert {path.name for path in Path().iterdir()} <= {
            "run",
            "evil.pkl",
            "evil_task.py",
            "mine",
            "mine.py",
            "__pycache__",
        }
        return told

    return run


def change(run: Path, key: str, value: Any) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    *parents, name = key.split(".")
    node = config
    for parent in parents:
        node = node.setdefault(parent, {})
    node[name] = value
    (run / "config.yaml").write_text(yaml.safe_dump(config))


LOADED = {"_target_": "torch.load", "f": "evil.pkl", "weights_only": False}
CONFIGS = {
    "noise": LOADED,
    "metrics": {"deep": [[{"_target_": "os.system", "_args_": ["touch executed"]}]]},
    "model.update": {"_target_": "builtins.exec", "_partial_": True, "_args_": ["open('executed', 'w')"]},
    "task._target_": "evil_task.Detect",
    "backbone._target_": "run.evil_task.Detect",
    "answer._target_": "rmt_lightning.core.files.write_atomically",
    "optim._target_": "rmt_lightning.generate",
    "data._target_": "rmt_lightning.UserError",
    "test._target_": {"of": "os.system"},
    "hold._target_": ["os.system"],
    "trainer.callbacks": [{"_target_": "lightning.pytorch.callbacks.LambdaCallback"}],
    "curriculum._target_": "${task.name}",
    "task.name": "${oc.env:SECRET}",
    "noise.documents": "${oc.decode:'${oc.env:SECRET}'}",
    "model.memory_size": "${${task.name}:SECRET}",
    "hydra.job.chdir": True,
    "hydra/launcher": "joblib",
}


@pytest.mark.fault("config.yaml of a run names what is executed, or looks something up", REFUSED)
@pytest.mark.parametrize(("key", "value"), CONFIGS.items(), ids=CONFIGS)
def test_a_config_from_elsewhere(key: str, value: Any, foreign: Path, refused: Callable[..., str]) -> None:
    change(foreign, key, value)
    # All doors read it in the same way.
    for door in DOORS if key == "noise" else ["train"]:
        assert refused(door).startswith("error: run/config.yaml: ")


WORDS = [
    "noise._target_=torch.load", "+metrics.f1={_target_: os.system, command: 'touch executed'}",
    "++trainer.callbacks=[{_target_: evil_task.Detect}]", "task@hydra.job=detect", "hydra.searchpath=[pkg://evil_task]",
    "hydra.run.dir=elsewhere", "hydra/launcher=joblib", "+hydra.job.env_set.PATH=.", "hydra.job.chdir=true",
    "noise.documents=${oc.env:SECRET}", "logger.project='a ${oc.env:SECRET}'", "~hydra.callbacks", "seed=1,2",
    "", "a", "a[0]=1", "a=extend_list(1)",
    "--experimental-rerun=evil.pkl", "--config-path=mine", "-m", "task=../../run/x",
]  # fmt: skip


@pytest.mark.fault("overrides.yaml of a run sets what is executed, looked up, or Hydra's", REFUSED)
@pytest.mark.parametrize("word", WORDS)
def test_words_from_elsewhere(word: str, foreign: Path, refused: Callable[..., str]) -> None:
    (foreign / "overrides.yaml").write_text(yaml.safe_dump([word]))
    assert refused("train").startswith("error: run/overrides.yaml: ")
    # What is typed now is the user's own word.
    if word.startswith("noise.documents"):
        assert "must be greater than or equal to 10" in refused("train", "noise.documents=5")


@pytest.mark.fault("overrides.yaml of a run says where the cache is", "it is where this machine and its user say")
def test_a_cache_from_elsewhere(foreign: Path) -> None:
    for word in ("cache_dir=elsewhere", "++cache_dir=elsewhere", "cache_dir='elsewhere'"):
        (foreign / "overrides.yaml").write_text(yaml.safe_dump([word, "seed=3"]))
        again = composed_again(["resume=run"])
        assert again[-2:] == ["seed=3", "resume=run"] and not any("cache_dir" in other for other in again)
        assert composed_again(["resume=run", "cache_dir=mine"])[-2:] == ["resume=run", "cache_dir=mine"]


CHOICES = {
    "task/evil.yaml": "_target_: evil_task.Detect",
    "noise/prose2.yaml": "_target_: rmt_lightning.Prose\ndocuments: ${oc.env:SECRET}",
    "experiment/x.yaml": "# @package _global_\nhydra:\n  job: {chdir: true}",
    "experiment/y.yaml": "# @package hydra.job\nchdir: true",
    "hydra/job_logging/z.yaml": "disable_existing_loggers: true",
    "experiment/cache.yaml": "# @package _global_\ncache_dir: elsewhere",
    "noise/broken.yaml": "a: [",
    "noise/cycle.yaml": "a: &a [*a]",
}


@pytest.mark.fault("a run names a folder of choices that are executed, looked up, or Hydra's", REFUSED)
@pytest.mark.parametrize("name", CHOICES)
def test_choices_from_elsewhere(name: str, foreign: Path, refused: Callable[..., str]) -> None:
    path = foreign.parent / "mine" / name
    path.parent.mkdir(parents=True)
    path.write_text(CHOICES[name])
    (foreign / "overrides.yaml").write_text(yaml.safe_dump([f"--config-dir={foreign.parent}/mine"]))
    assert str(path.parent.parent.name) in refused("train")


@pytest.mark.fault("config.yaml of a run says what its classes do not take", "one line names the setting")
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("noise._partial_", True), ("task._partial_", True), ("model._args_", [1]), ("answer._convert_", "none"),
        ("backbone.width", "wide"), ("answer", None), ("seed", None),
    ],
)  # fmt: skip
def test_a_config_that_cannot_be_built(key: str, value: Any, foreign: Path, refused: Callable[..., str]) -> None:
    change(foreign, key, value)
    for door in ("evaluate", "attend", *(["export"] if key.startswith("model") else [])):
        told = refused(door)
        assert told.startswith((f"error: {key}", "error: run/config.yaml: is damaged, or not that of a run; "))


def test_a_module_is_trusted_with_its_own_classes_alone(foreign: Path, refused: Callable[..., str]) -> None:
    Path("mine.py").write_text("import os, torch\n\ndef make(): ...\n")
    change(foreign, "task._target_", "mine.Colors")
    assert refused("export").endswith("if it is yours, add trust=mine\n")
    change(foreign, "noise._target_", "evil_task.Rain")
    assert refused("train").endswith("if it is yours, add trust=[evil_task,mine]\n")
    for name in ("torch.load", "mine.make", "mine.os", "minefield.Rain", "os.system"):
        change(foreign, "noise._target_", name)
        assert f"noise._target_={name}" in refused("train", "trust=mine")
    change(foreign, "noise._target_", "mine.torch.Tensor")
    assert refused("export", "trust=mine").startswith("error: mine.torch: cannot be imported")
    assert refused("train", "trust=3").startswith("error: trust=3: give the name of a module")


LINKS = [
    ".lock", "train.log", "curriculum.png", "config.yaml", "config.yaml.partial", "phases.json.partial",
    "hardware.json", "evaluation.csv", ".tokenizer.partial", ".backbone.lock", "checkpoints/last.ckpt.partial",
    "checkpoints/previous.ckpt", "checkpoints/stage-4.ckpt.partial",
]  # fmt: skip


@pytest.mark.fault("files of a run folder are links, or names of other files", "they are made anew, the others stay")
def test_links_are_not_written_through(finished_run: Path, train: Run, tmp_path: Path) -> None:
    shutil.copytree(finished_run, tmp_path / "real")
    (tmp_path / "real" / "checkpoints" / "previous.ckpt").unlink()
    (tmp_path / "victims").mkdir()
    for number, name in enumerate(LINKS):
        victim, place = tmp_path / "victims" / str(number), tmp_path / "real" / name
        if place.exists():
            place.rename(victim)
        if not victim.exists() or not victim.stat().st_size:
            victim.write_text("mine")
        place.symlink_to(victim)
    os.link(tmp_path / "victims" / "0", tmp_path / "real" / "overrides.yaml.partial")
    (tmp_path / "real" / "stages.csv.partial").symlink_to(tmp_path / "victims" / "absent")
    # TensorBoard would write through it.
    (tmp_path / "real" / "tensorboard" / "version_0").mkdir(parents=True)
    (tmp_path / "real" / "tensorboard" / "version_0" / "hparams.yaml").symlink_to(tmp_path / "victims" / "absent.yaml")
    # The folder itself may be one.
    (tmp_path / "run").symlink_to("real")
    before = {path: path.read_bytes() for path in (tmp_path / "victims").iterdir()}
    logger = ("logger=tensorboard", "+logger.version=0")
    result = train("resume=run", "curriculum.max_segments=4", *logger, small=False)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "real" / "tensorboard" / "version_0" / "hparams.yaml").stat().st_size
    assert {path: path.read_bytes() for path in (tmp_path / "victims").iterdir()} == before
    assert [path.name for path in (tmp_path / "real").rglob("*") if path.is_symlink()] == []


@pytest.mark.fault("a folder in a run folder is a link that leads out of it", "refused in one line, nothing is written")
@pytest.mark.parametrize(
    ("door", "name"),
    [
        ("train", "checkpoints"), ("train", "metrics"), ("train", "evaluations/last-detect-1/inner"),
        ("evaluate", "evaluations"), ("attend", "attention"),
    ],
)  # fmt: skip
def test_no_folder_leads_out(door: str, name: str, foreign: Path, refused: Callable[..., str]) -> None:
    for target in ("elsewhere", "absent"):
        (foreign.parent / "mine" / "elsewhere").mkdir(parents=True, exist_ok=True)
        place = foreign / name
        if place.exists() and not place.is_symlink():
            place.rename(place.with_name("old"))
        place.unlink(missing_ok=True)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(foreign.parent / "mine" / target)
        assert refused(door).startswith(f"error: run/{name}: is a link that leads out of the run folder; ")
        assert list((foreign.parent / "mine").rglob("*")) == [foreign.parent / "mine" / "elsewhere"]


@pytest.mark.fault("a pipe or a device stands where a file belongs", "refused in one line, instead of waiting for ever")
@pytest.mark.parametrize(
    "name", ["config.yaml", "overrides.yaml", "text.json", "checkpoints/last.ckpt", "evaluations/x"]
)
def test_no_pipe_is_opened(name: str, foreign: Path, refused: Callable[..., str]) -> None:
    place = foreign / name
    place.unlink(missing_ok=True)
    place.parent.mkdir(exist_ok=True)
    os.mkfifo(place)
    for door in DOORS:
        assert refused(door) == f"error: run/{name}: is no plain file; remove it, or put the file back\n"
    place.unlink()
    place.symlink_to("/dev/zero")
    assert refused("evaluate").startswith(f"error: run/{name}: is no plain file; ")


def test_results_stay_in_the_run_folder_whatever_a_task_is_called(tmp_path: Path) -> None:
    found = findings(tmp_path, "evaluations", "last-../../../x", {})
    assert found.parent == tmp_path / "evaluations"


@pytest.mark.fault("a part of a run folder is somebody else's alone", "said in one line; it is not taken for missing")
@pytest.mark.parametrize(
    ("name", "doors"),
    [
        ("checkpoints", DOORS), ("config.yaml", DOORS), ("overrides.yaml", ["train"]), ("text.json", ["evaluate"]),
        ("tokenizer", ["export", "evaluate"]), ("backbone/config.json", ["export"]), ("adapter", ["export"]),
    ],
)  # fmt: skip
def test_what_may_not_be_read(
    name: str, doors: Any, foreign: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "adapter":
        (foreign / name).mkdir()
    (foreign / "text.json").touch()
    access = os.access
    # The superuser may read all.
    monkeypatch.setattr(os, "access", lambda path, mode: access(path, mode) and Path(path) != place)
    place = foreign / name
    for door in doors:
        assert refused(door) == f"error: run/{name}: cannot be read (Permission denied); ask whose it is for that\n"


@pytest.mark.fault("a logger is called by a path", "refused in one line, nothing is written")
def test_a_logger_stays_in_the_run_folder(foreign: Path, refused: Callable[..., str]) -> None:
    (foreign / "overrides.yaml").unlink()
    told = refused("train", "logger=tensorboard", "logger.name=../../mine")
    assert "outside of the run folder; give another logger.name" in told


@pytest.mark.fault("trust names a module that is not there", REFUSED)
@pytest.mark.parametrize(
    "name", ["absent", "absent.module", "[evil_task,evil_task.Detect]", "os.absent.path", '""', "a b"]
)
def test_a_module_that_is_not_there(name: str, foreign: Path, refused: Callable[..., str]) -> None:
    for door in DOORS if name == "absent.module" else ["evaluate"]:
        assert refused(door, f"trust={name}").startswith("error: trust=")


@pytest.mark.fault("trust names a module that is not there", REFUSED)
def test_a_new_run_that_trusts_a_module_that_is_not_there(
    foreign: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(DOORS, "train", ["trust=absent.module"])
    for words in (["hydra.run.dir=run/x"], ["--multirun", "seed=1,2"]):
        assert refused("train", *words) == (
            "error: trust=absent.module: there is no module absent.module; give one as Python imports it, and start "
            "the command where it is\n"
        )


def test_a_module_is_found_without_importing_what_it_is_part_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "whole" / "inner").mkdir(parents=True)
    (tmp_path / "whole" / "__init__.py").write_text("raise SystemExit('executed')")
    (tmp_path / "whole" / "inner" / "part.py").touch()
    check_trust(["whole", "whole.inner", "whole.inner.part", "__main__", "torch.nn"])
    with pytest.raises(UserError, match=r"there is no module whole\.inner\.other; give"):
        check_trust("whole.inner.other")


@pytest.mark.parametrize(
    "target",
    [
        "torch.load", "subprocess.Popen", "os.system", "numpy.DataSource", "exec", "rmt_lightning.UserError",
        "torchmetrics.absent.Metric",
    ],
)  # fmt: skip
def test_nobody_is_advised_to_trust_a_library(target: str) -> None:
    with pytest.raises(UserError, match=r"use a run folder that you know$"):
        check_saved({"metrics": {"x": {"_target_": target}}}, Path("run/config.yaml"), None)
