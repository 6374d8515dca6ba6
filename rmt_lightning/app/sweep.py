"""Many runs from one command: what `python -m rmt_lightning.train --multirun …` does.

Hydra's launchers decide where jobs run and how many at a time. What a job is stands here: a process of its own,
`python -m rmt_lightning.train resume=<its folder>`. Lightning starts the other ranks of a run by repeating the command
line of its process; were that the sweep's, each rank would begin a sweep of its own.

A sweep folder holds a run folder for each job, with a job.json beside the run's own files, and sweep.csv, summary.csv
and sweep.png about all of them. It is named after what is swept, so that the same command goes on with the same sweep.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from math import prod
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict

from rmt_lightning.app.hydra_errors import check_places, told_in_one_line
from rmt_lightning.app.processes import RANK
from rmt_lightning.app.resume import DamagedConfig, overrides, presets, save_config, saved_config
from rmt_lightning.app.trust import check_trust, foreign_modules
from rmt_lightning.core.errors import UserError
from rmt_lightning.core.files import own_file, write_atomically
from rmt_lightning.core.progress import in_time
from rmt_lightning.core.quoting import setting
from rmt_lightning.core.run_folder import CONFIG, JOB

# While this file is in a sweep folder, running jobs save and stop, and no other begins: all processes of a sweep, on
# whatever machine a launcher has put them, see the same folder.
STOP = "stop"
OUTPUT = "output.log"
# Seconds of each job that this process has run.
_TOOK: list[float] = []


class Sweep(Callback):
    """Looks after a sweep from its start to its end.

    Args:
        swept: the settings that are swept, with all of their values.
    """

    def __init__(self, swept: Mapping[str, str]) -> None:
        self.swept = swept
        self.signum: int | None = None

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        # Hydra turns an exception of a callback into a warning, but lets it exit.
        with told_in_one_line("train"):
            check_places(config.hydra)
            check_trust(config.trust)
            _check_search(config)
            jobs = [config, *_jobs(config)]
            for job in jobs:
                _refuse_what_goes_wrong(job)
            _check_folders(config, jobs[1:])
            # Resolved here, for a job's config does not know the sweep's command line; Hydra hands the result on to it.
            self.folder = Path(config.hydra.sweep.dir)
            (self.folder / STOP).unlink(missing_ok=True)
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self._stop)
        print(f"{self.folder}: Ctrl-C stops this sweep, the same command goes on with it", flush=True)

    def _stop(self, signum: int, frame: Any) -> None:
        if self.signum is not None:
            raise KeyboardInterrupt
        self.signum = signum
        self.folder.mkdir(parents=True, exist_ok=True)
        own_file(self.folder / STOP).touch()
        print(f"{signal.Signals(signum).name}: what runs is saved; once more to leave at once", flush=True)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        from rmt_lightning.app.plotting import with_chances
        from rmt_lightning.reporting.sweeps import SETTLED, read_sweep, sum_up

        with told_in_one_line("train"):
            (self.folder / STOP).unlink(missing_ok=True)
            sweep = with_chances(read_sweep(self.folder))
            sum_up(sweep, self.folder)
        if self.signum is not None:
            print(f"stopped by {signal.Signals(self.signum).name}; the same command goes on", flush=True)
            sys.exit(128 + self.signum)
        if not all(job.status in SETTLED and job.status != "did not converge" for job in sweep.jobs):
            sys.exit(1)


def run_job(config: DictConfig) -> float:
    """Train and test one job of a sweep, unless that has been done before.

    Returns:
        What a search makes small: the share of wrong answers at the longest test, or the perplexity; infinity if there
        is no result.

    Raises:
        UserError: if the folder holds a run with other settings, or several processes were started for the job.
    """
    from rmt_lightning.reporting.sweeps import SETTLED, read_job

    hydra: Any = HydraConfig.get()
    folder, sweep = Path(hydra.runtime.output_dir), Path(hydra.sweep.dir)
    if (sweep / STOP).exists():
        # Hydra has made the folder already.
        with suppress(OSError):
            folder.rmdir()
        return float("inf")
    # logger=wandb takes from there what the runs of a sweep have in common.
    os.environ.setdefault("WANDB_RUN_GROUP", sweep.name)
    os.environ.setdefault("WANDB_JOB_TYPE", "sweep")
    _refuse_what_goes_wrong(config)
    # What was typed for the sweep is trusted in its jobs.
    trust = foreign_modules(OmegaConf.to_container(config))
    known = _known_settings(config, folder, trust)
    if known and (job := read_job(folder)).status in SETTLED:
        print(f"{folder.name}: done before: {job.told()}", flush=True)
        return job.objective
    typed = _values(hydra.callbacks.sweep.swept, hydra.overrides.task)
    values = {key: yaml.safe_load(value) for key, value in typed.items()}
    record: dict[str, Any] = {"number": hydra.job.num, "settings": values, "failed": None}
    write_atomically(folder / JOB, json.dumps(record, indent=2).encode())
    if not known:
        save_config(folder, config, overrides(hydra), presets(hydra))
    of = f" of {jobs}" if (jobs := _jobs_of(hydra)) else ""
    print(f"{folder.name}: job {hydra.job.num + 1}{of} started", flush=True)
    began = time.monotonic()
    choices = presets(hydra)
    options = [f"trust=[{','.join(trust)}]", setting("cache_dir", config.cache_dir)]
    options += [f"--config-dir={choices}"] if choices else []
    code, reason = _train(folder, sweep / STOP, options)
    job = read_job(folder)
    stopped = code != 0 and (sweep / STOP).exists()
    if not stopped and (code != 0 or job.status not in SETTLED) and job.status != "did not converge":
        write_atomically(folder / JOB, json.dumps(record | {"failed": reason}, indent=2).encode())
        job = read_job(folder)
    _TOOK.append(time.monotonic() - began)
    print(f"{folder.name}: {job.told()} after {in_time(_TOOK[-1])}{_left(hydra)}", flush=True)
    return job.objective


def _jobs_of(hydra: Any) -> int | None:
    """How many jobs the sweep of a job has; None if only its sweeper knows."""
    if "n_trials" in hydra.sweeper:
        return int(hydra.sweeper.n_trials)
    if not _is_grid(hydra.sweeper):
        return None
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    swept = [parser.parse_override(f"{key}={values}") for key, values in hydra.callbacks.sweep.swept.items()]
    return prod(len(list(word.sweep_string_iterator())) for word in swept)


def _left(hydra: Any) -> str:
    """How long the jobs that are left will take, if they are run one after the other."""
    left = (_jobs_of(hydra) or 0) - hydra.job.num - 1
    one_by_one = str(hydra.launcher._target_).endswith("BasicLauncher")
    return f", about {in_time(fmean(_TOOK) * left)} left" if left > 0 and one_by_one else ""


def _train(folder: Path, stop: Path, options: Sequence[str]) -> tuple[int, str]:
    """Run a job's process to its end, or until it is asked to stop. Returns its exit code and what it said at last.

    Args:
        options: what lets it use all that its folder names.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # The process of a launcher: Ctrl-C reaches it too, but it is the sweep that says what that means.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A job starts its own ranks.
    environment = {name: value for name, value in os.environ.items() if not RANK.fullmatch(name)}
    command = [sys.executable, "-m", "rmt_lightning.train", setting("resume", folder), *options]
    with open(own_file(folder / OUTPUT), "ab") as output:
        begin = output.tell()
        # In a session of its own, so that a signal reaches it once, and all of its ranks.
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    try:
        asked = False
        while process.poll() is None:
            time.sleep(0.2)
            if not asked and stop.exists():
                asked = True
                os.killpg(process.pid, signal.SIGTERM)
    finally:
        with suppress(ProcessLookupError):
            # A rank that has outlived the others, or all of them if the sweep is left at once.
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    with open(folder / OUTPUT, "rb") as output:
        output.seek(begin)
        return process.returncode, _reason(process.returncode, output.read().decode(errors="replace"))


def _reason(code: int, output: str) -> str:
    """Why a job ended, in one line: the first error that it told, else its last word."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"error: |[\w.]+(Error|Exception)\b", line)]
    if code < 0 and not errors:
        name = signal.Signals(-code).name
        return f"killed by {name}{', perhaps for want of memory' if name == 'SIGKILL' else ''}"
    return (errors or lines[-1:] or [f"exit code {code}"])[0].removeprefix("error: ")


def _known_settings(config: DictConfig, folder: Path, trust: list[str]) -> bool:
    """Whether the folder holds this very run, and its config can be read.

    Args:
        trust: modules whose classes it may name.

    Raises:
        UserError: if it holds another one.
    """
    try:
        saved = saved_config(folder, trust)
    except DamagedConfig:
        return False
    from rmt_lightning.reporting.runs import differences

    texts = [OmegaConf.to_yaml(given, resolve=True) for given in (config, saved)]
    for key, (wanted, there) in differences([yaml.safe_load(text) for text in texts]).items():
        # Where metrics and tokenized noise go decides nothing.
        if key.split(".")[0] not in ("logger", "cache_dir", "trust"):
            raise UserError(
                f"{os.path.relpath(folder)}: holds a run with {key}={there}, not {wanted}; "
                "choose another folder with hydra.sweep.dir=…"
            )
    return True


def _refuse_what_goes_wrong(config: DictConfig) -> None:
    """Raise UserError where Lightning would wait for ever, or jobs would be run several times over."""
    if max(int(os.environ.get(name, 1)) for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS")) > 1:
        raise UserError(
            "--multirun: several processes would each run the whole sweep; start it without torchrun or srun, for each "
            "job starts processes of its own (with a launcher for SLURM: hydra.launcher.tasks_per_node=1)"
        )
    if config.trainer.num_nodes > 1:
        raise UserError(
            f"trainer.num_nodes={config.trainer.num_nodes}: a job of a sweep runs on one machine; give 1, or start "
            "this run by itself"
        )
    if config.resume is not None:
        raise UserError("resume: a sweep that was stopped goes on with the same command; leave resume out")
    hydra: Any = config.get("hydra") or HydraConfig.get()
    direction = OmegaConf.select(hydra, "sweeper.direction", default="minimize")
    if getattr(direction, "name", direction) != "minimize":
        raise UserError(
            f"hydra.sweeper.direction={direction}: a job returns its share of wrong answers or its "
            "perplexity; leave it at minimize"
        )


def _check_search(config: DictConfig) -> None:
    """Raise UserError if what was typed to be swept, or searched, would not be."""
    loader = GlobalHydra.instance().config_loader()
    typed = OverridesParser.create(config_loader=loader).parse_overrides(overrides(config.hydra))
    keys = [word.get_key_element().lstrip("+") for word in typed]
    for word, key in zip(typed, keys, strict=True):
        if not word.is_sweep_override():
            continue
        if keys.count(key) > 1:
            both = " and ".join(str(other.input_line) for other, name in zip(typed, keys, strict=True) if name == key)
            raise UserError(f"{both}: is given twice, of which one would count; leave one of them out")
        if not word.is_discrete_sweep():
            if _is_grid(config.hydra.sweeper):
                raise UserError(f"{word.input_line}: is for a search; give values, such as {key}=…,…, or +sweep=search")
        elif not list(word.sweep_string_iterator()):
            raise UserError(f"{word.input_line}: stands for no value; give some (glob is for the choices of a group)")
    if not _is_grid(config.hydra.sweeper) and not config.hydra.callbacks.sweep.swept:
        raise UserError(
            "hydra/sweeper: a search has nothing to choose from; give values, such as model.memory_size=2,5"
        )


def _check_folders(config: DictConfig, jobs: Sequence[DictConfig]) -> None:
    """Raise UserError if jobs would share a folder, or the sweep one with a run."""
    folder = Path(config.hydra.sweep.dir)
    if (folder / CONFIG).exists():
        raise UserError(f"hydra.sweep.dir={folder}: holds a run; choose another folder")
    names = []
    for number, job in enumerate(jobs):
        with open_dict(job):
            job.hydra.job.num, job.hydra.job.id = number, str(number)
        HydraConfig.instance().set_config(job)
        names.append(job.hydra.sweep.subdir)
        if names.index(names[-1]) < number:
            raise UserError(
                f"hydra.sweep.subdir={names[-1]}: two jobs would share this folder; give each value once, or "
                "'hydra.sweep.subdir=${hydra:job.num}'"
            )


def _is_grid(sweeper: DictConfig) -> bool:
    return str(sweeper._target_).endswith("BasicSweeper")


def _jobs(config: DictConfig) -> Iterator[DictConfig]:
    """The jobs of a grid, so that what is wrong with one is told before anything is written.

    The jobs of a search are not known beforehand.
    """
    if _is_grid(config.hydra.sweeper):
        loader = GlobalHydra.instance().config_loader()
        params = [f"{key}={value}" for key, value in (config.hydra.sweeper.params or {}).items()]
        words = OverridesParser.create(config_loader=loader).parse_overrides([*params, *config.hydra.overrides.task])
        for overrides in BasicSweeper.split_arguments(words, max_batch_size=None)[0]:
            yield loader.load_sweep_config(config, overrides)


def _swept(words: Sequence[str], sweeper: DictConfig) -> dict[str, str]:
    """The settings that are swept, with all of their values as they were typed."""
    space = {**(sweeper.get("params") or {}), **(sweeper.get("search_space") or {})}
    parser, given = OverridesParser.create(), _given(words)
    typed = [
        word.get_key_element().lstrip("+") for word in parser.parse_overrides(list(words)) if word.is_sweep_override()
    ]
    # A preset may also say what all jobs have in common.
    varied = [key for key in space if key in given or parser.parse_override(f"{key}={space[key]}").is_sweep_override()]
    return {key: str(given.get(key, space.get(key))) for key in dict.fromkeys([*varied, *typed])}


def _given(words: Iterable[str]) -> dict[str, str]:
    return dict(word.lstrip("+").partition("=")[::2] for word in words)


def _sweep_name(task: str, swept: Mapping[str, str], words: Sequence[str]) -> str:
    """<task>/<what is swept>, and a mark of what else was typed."""
    others = sorted(f"{key}={value}" for key, value in _given(words).items() if key not in [*swept, "sweep"])
    return "/".join((_safe(task), _name(swept) + (f"-{_mark(*others)}" if others else "")))


def _values(swept: Mapping[str, str], words: Sequence[str]) -> dict[str, str]:
    """The values of what is swept in one job."""
    return {key: value for key, value in _given(words).items() if key in swept}


def _name(values: Mapping[str, str]) -> str:
    """Swept settings as a name that needs no quotes, neither in a shell nor in Hydra: memory_size_2-seed_1."""
    ends = [key.rsplit(".", 1)[-1] for key in values]
    words = [f"{end if ends.count(end) == 1 else key}_{values[key]}" for end, key in zip(ends, values, strict=True)]
    name = _safe("-".join(words) or "sweep")
    return name if len(name) <= 100 else f"{name[:90]}-{_mark(name)}"


def _safe(text: str) -> str:
    return re.sub(r"[^\w.+-]+", "_", text).strip("_")


def _mark(*words: str) -> str:
    return hashlib.sha256("\n".join(words).encode()).hexdigest()[:6]


OmegaConf.register_new_resolver("swept", _swept, replace=True, use_cache=True)
OmegaConf.register_new_resolver("sweep_name", _sweep_name, replace=True, use_cache=True)
OmegaConf.register_new_resolver("job_name", lambda swept, words: _name(_values(swept, words)), replace=True)
