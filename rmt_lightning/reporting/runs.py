"""What a run folder tells, read without opening a checkpoint. What cannot be read is named, never fatal."""

from __future__ import annotations

import csv
import glob
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from io import StringIO
from itertools import chain, repeat
from math import isfinite, isnan, nan
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, cast

import numpy as np
import pandas as pd
import yaml
from pydantic import TypeAdapter

from rmt_lightning.core.errors import UserError
from rmt_lightning.core.names import public_name
from rmt_lightning.core.run_folder import (
    CHECKPOINTS,
    CONFIG,
    EVALUATION,
    HARDWARE,
    HOLD,
    LAST,
    METRICS,
    PHASES,
    PROBES,
    STAGES,
)
from rmt_lightning.reporting.redaction import public, public_text

Status = Literal[
    "finished", "stopped at max_steps", "stopped at max_time", "did not converge", "interrupted or running"
]
Row = dict[str, float]
AT_THE_END = "at the end of training"
Content = TypeVar("Content")


@dataclass(frozen=True)
class Phase:
    """A phase of a run, as phases.json has it.

    Attributes:
        title: names it.
        first_step: optimizer steps of the run before it; None if it has not begun.
        steps: optimizer steps it has taken so far.
        finished: whether it has come to its end.
        stuck: whether it has stopped short of it, and the run with it.
        out_of_time: whether the run has stopped here because its time was up.
        table: the csv file with its rows, if it has one.
        rows: the cells of that file.
    """

    title: str
    first_step: int | None
    steps: int
    finished: bool
    stuck: bool
    table: str | None
    rows: list[dict[str, str]] = field(default_factory=list)
    out_of_time: bool = False

    @property
    def staged(self) -> bool:
        """Whether it is told stage by stage."""
        return self.table == STAGES


@dataclass(frozen=True)
class Stage:
    """A stage of the curriculum.

    Attributes:
        number: segments of its longest inputs.
        steps: optimizer steps it took, or has taken so far.
        seconds: wall-clock time it took; None if it has not been written down.
        accuracy: at its last validation.
        converged: whether it ended by converging rather than by running out of steps; None while it goes on.
    """

    number: int
    steps: int
    seconds: float | None
    accuracy: float
    converged: bool | None


class Point(NamedTuple):
    """A logged value: at which optimizer step (the first is 1), and in which stage or phase."""

    step: int
    place: str
    value: float


@dataclass(frozen=True)
class Evaluation:
    """Accuracy, and perhaps speed and memory, on inputs of several lengths.

    Attributes:
        label: what it was tested on, if that is not what it was trained on, and with which checkpoint.
        own: whether the last weights were tested on the run's own task and noise.
        stage: whose weights were tested; None for the last ones.
        device: a GPU's name, "cpu", or nothing if it has not been written down.
        rows: the csv file, in the order of lengths.
        followed: memories that were asked on their way: age (in segments), right, streams.
        probes: what shows what has been learnt: name and numbers of each row of the csv file.
        settings: the checkpoint, task and noise it names, without secrets and home folders.
    """

    label: str
    own: bool
    stage: int | None
    device: str
    rows: list[Row]
    followed: list[Row]
    probes: list[tuple[str, Row]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """A run folder.

    Attributes:
        name: the end of its path, as long as it takes to tell it from the others.
        config: the resolved settings, without secrets and home folders.
        phases: in order.
        stages: of its curriculum, in order.
        curves: what was logged, by metric.
        evaluations: the one at the end of the run first.
        losses: memories lost in training, in the phase that makes memory hold: step, rate, rate_low, rate_high.
        text_score: perplexity of the documents that a language model was tested on at the end.
        hardware: what each start of the run ran on.
        attention: pictures (png) of attention maps, by their path without the ending.
        problems: files that could not be read, or not to their end.
    """

    name: str
    config: dict[str, Any]
    phases: list[Phase]
    stages: list[Stage]
    curves: dict[str, list[Point]]
    evaluations: list[Evaluation]
    losses: list[Row]
    text_score: Row | None
    hardware: list[dict[str, Any]]
    attention: dict[str, bytes]
    problems: list[str]

    @property
    def steps(self) -> int:
        logged = [curve[-1].step for curve in self.curves.values()]
        return max([*logged, sum(phase.steps for phase in self.phases)])

    @property
    def seconds(self) -> float | None:
        known = [stage.seconds for stage in self.stages if stage.seconds is not None]
        return sum(known) if known else None

    @property
    def untimed(self) -> list[Phase]:
        """Phases that have begun beside the stages, which alone tell how long they took."""
        return [phase for phase in self.phases if phase.steps and not phase.staged] if self.stages else []

    @property
    def reached(self) -> int:
        """Segments of the last stage that has begun, 0 before the first validation."""
        return self.stages[-1].number if self.stages else 0

    @property
    def status(self) -> Status:
        if any(phase.stuck for phase in self.phases):
            return "did not converge"
        if all(phase.finished for phase in self.phases):
            return "finished"
        if any(phase.out_of_time for phase in self.phases):
            return "stopped at max_time"
        stopped = 0 <= _limit(self.config, "trainer", "max_steps") <= self.steps
        return "stopped at max_steps" if stopped else "interrupted or running"

    def logged(self, metric: str) -> list[float]:
        """All values of a metric; there may be none."""
        return [point.value for point in self.curves.get(metric, [])]

    @property
    def longest_test(self) -> Row | None:
        """The longest inputs of its own task and noise that its last weights were tested on."""
        rows = [row for evaluation in self.evaluations if evaluation.own for row in evaluation.rows]
        return max(rows, key=lambda row: (row["segments"], row["samples"]), default=None)


def read_runs(places: Sequence[str]) -> tuple[list[Run], list[str]]:
    """Read every run that is found in some folders.

    Args:
        places: run folders, folders that hold some at any depth, or patterns of either.

    Returns:
        The runs, and a line for each place that could not be read: where and why.
    """
    runs: list[tuple[Path, Run]] = []
    skipped: list[str] = []
    folders, reasons = _find(places)
    skipped += reasons
    for folder in folders:
        try:
            _refuse_links_out(folder)
            runs.append((folder, _read_run(folder)))
        except (OSError, UserError) as error:
            skipped.append(f"{folder}: {_reason(error)}")
    names = _names([folder.resolve() for folder, _ in runs])
    named = [replace(run, name=name) for (_, run), name in zip(runs, names, strict=True)]
    return named, [public_text(line) for line in skipped]


class Tested(NamedTuple):
    """What some weights can do.

    Attributes:
        run: whose they are.
        config: its settings, and whatever else was tested: its task, its noise or its checkpoint.
        tests: on what the run has learnt, if its folder was named; or the one whose folder was named.
    """

    run: Run
    config: dict[str, Any]
    tests: list[Evaluation]


def read_tests(places: Sequence[str]) -> tuple[list[Tested], list[str]]:
    """Read what runs have been found able to do.

    Args:
        places: as of `read_runs`; where there is no run, there may be evaluations, at any depth.

    Returns:
        One for each run and for each evaluation, and a line for each place that could not be read: where and why.
    """
    apart = {place: [path for match in matching(place) for path in _evaluations_in(match)] for place in places}
    runs, skipped = read_runs([place for place in places if not apart[place]])
    found = [Tested(run, run.config, [test for test in run.evaluations if test.own]) for run in runs]
    for path in {path.resolve(): path for paths in apart.values() for path in paths}.values():
        try:
            _refuse_links_out(path.parent)
            found.append(_tested(path))
        except (OSError, UserError) as error:
            skipped.append(public_text(f"{path.parent}: {_reason(error)}"))
    return found, skipped


def _evaluations_in(place: Path) -> list[Path]:
    """Where evaluations stand that were written elsewhere than into a run, or were named without it."""
    return [] if next(_run_folders(place, []), None) else sorted(place.rglob(EVALUATION))


def _tested(path: Path) -> Tested:
    """An evaluation, and its run if it stands in one; raises OSError or UserError if it cannot be read."""
    # Without the key of its settings, which tells nobody anything.
    name = public_text(re.sub(r"-[0-9a-f]{8}$", "", path.parent.name))
    run = Run(name, {}, [], [], {}, [], [], None, [], {}, [])
    home = path.resolve().parents[2]
    if path.resolve().parents[1].name == "evaluations" and (home / CONFIG).is_file():
        _refuse_links_out(home)
        run = _read_run(home)
        run = replace(run, name=f"{public_text(run.name)}/{name}")
    problems: list[str] = []
    if not (test := _evaluation(path, run.config, problems)):
        raise UserError("; ".join(problems) or "has no row yet")
    return Tested(run, run.config | test.settings, [test])


def _find(places: Iterable[str]) -> tuple[list[Path], list[str]]:
    """Run folders in the order of `places`, each once, and what is wrong with places that lead to none."""
    found: dict[Path, Path] = {}
    reasons: list[str] = []
    for place in places:
        matches = matching(place)
        if not matches:
            reasons.append(f"{place}: does not exist")
        for match in matches:
            errors: list[OSError] = []
            inside = list(_run_folders(match, errors))
            reasons += [f"{error.filename}: {_reason(error)}" for error in errors]
            if not inside and not errors:
                reasons.append(f"{match}: holds no run")
            for folder in inside:
                found.setdefault(folder.resolve(), folder)
    return list(found.values()), reasons


def matching(place: str) -> list[Path]:
    """The path, or all paths that it stands for as a pattern."""
    return [Path(name) for name in ([place] if os.path.lexists(place) else sorted(glob.glob(place, recursive=True)))]


def _run_folders(place: Path, errors: list[OSError]) -> Iterator[Path]:
    for folder, inner, files in os.walk(place, onerror=errors.append):
        if {CONFIG, STAGES} & set(files) or {CHECKPOINTS, METRICS} & set(inner):
            inner.clear()
            yield Path(folder)
        inner[:] = sorted(name for name in inner if not name.startswith("."))


def _refuse_links_out(run: Path) -> None:
    """Make sure that a page shows nothing that a run folder from elsewhere only points to.

    Raises:
        UserError: naming what leads out of the folder, or would be waited for.
    """
    home = run.resolve()
    for path in (Path(place, name) for place, *inner in os.walk(run) for name in chain(*inner)):
        # W&B keeps links to its own logs, and nothing of what is in there is read.
        if Path("wandb") in path.relative_to(run).parents:
            continue
        if path.is_symlink() and not path.resolve().is_relative_to(home):
            raise UserError(f"{path.relative_to(run)} is a link that leads out of the run folder")
        if path.is_fifo():
            raise UserError(f"{path.relative_to(run)} is no file")


def _names(folders: list[Path]) -> list[str]:
    """The shortest ends of paths that tell them apart."""
    paths = [Path(public_text(str(folder))).parts for folder in folders]
    # The folders of a sweep are called 0, 1, 2 …
    lengths = range(1 + any(parts[-1].isdigit() for parts in paths), max(map(len, paths), default=0) + 1)
    for length in lengths:
        names = ["/".join(parts[-length:]) for parts in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{number} {parts[-1]}" for number, parts in enumerate(paths, start=1)]


def _read_run(folder: Path) -> Run:
    """Read a run folder.

    Raises:
        UserError, OSError: if its config cannot be read; without it nothing else makes sense.
    """
    config = _config(folder / CONFIG)
    problems: list[str] = []
    logged = _metrics(folder / METRICS, problems)
    phases = _json(folder / PHASES, list[Phase], problems) or []
    passed = _rows(folder / STAGES, problems, ("stage", "steps", "seconds", "accuracy", "converged"))
    titles, validations = _titles(logged, phases), _validations(logged)
    staged = titles == ""
    stages = _stages(passed, validations[staged[validations.index]], logged["step"][staged].min(), config)
    phases = phases or _phases_of_earlier_versions(config, stages, logged)
    tests = _rows(folder / EVALUATION, problems, _LENGTHS, ("documents", "tokens", "perplexity", "bits_per_byte"))
    of_text = bool(tests) and "documents" in tests[0]
    return Run(
        name=folder.name,
        config=config,
        phases=[_with_rows(phase, folder, problems) for phase in phases],
        stages=stages,
        curves=_curves(logged, validations, stages, phases),
        evaluations=list(_evaluations(folder, [] if of_text else tests, config, problems)),
        # There is no rate where no memory has been carried on yet.
        losses=[
            row for row in _rows(folder / HOLD, problems, ("step",)) if {"rate", "rate_low", "rate_high"} <= row.keys()
        ],
        text_score=tests[0] if of_text else None,
        hardware=public(_json(folder / HARDWARE, list[dict[str, Any]], problems) or []),
        attention=dict(_pictures(folder / "attention", problems)),
        problems=[public_text(problem.removeprefix(f"{folder}/")) for problem in dict.fromkeys(problems)],
    )


def _config(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        config = public(yaml.load(text, Loader=_FAST if len(text) < 8192 else yaml.SafeLoader))
    except (ValueError, yaml.YAMLError, RecursionError):
        raise UserError(f"{CONFIG} is damaged") from None
    if not config:
        raise UserError(f"{CONFIG} is empty")
    if not isinstance(config, dict) or not all(isinstance(config.get(part), dict) for part in _PARTS):
        raise UserError(f"{CONFIG} is not that of a run")
    return {name: _renamed(part) for name, part in config.items()}


def _renamed(part: Any) -> Any:
    """A component with the public name of its class, which earlier versions called by its place."""
    if not isinstance(part, dict) or "_target_" not in part:
        return part
    return part | {"_target_": public_name(str(part["_target_"]))}


# Where there is one written in C, it takes a tenth of the time; but deep nesting, which takes more text, crashes it.
_FAST = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_PARTS = ("task", "noise", "backbone", "model", "curriculum", "trainer")


def _limit(config: dict[str, Any], part: str, name: str) -> float:
    settings = config.get(part)
    limit = settings.get(name) if isinstance(settings, dict) else None
    return limit if isinstance(limit, int) else float("inf")


def _table(path: Path, problems: list[str]) -> tuple[list[str], list[dict[str, str]]]:
    """The columns and rows of a csv file; without a file, or if it is no table, there are none."""
    try:
        text = path.read_text(encoding="utf-8")
        # Its last line is half written, or still being written, if it does not end.
        whole = text[: text.rfind("\n") + 1]
        reader = csv.reader(StringIO(whole))
        columns = next(reader)
        # A row with more cells than there are columns loses those; what a row lacks is empty.
        rows = [dict(zip(columns, chain(row, repeat("")), strict=False)) for row in reader if row]
    except FileNotFoundError:
        return [], []
    except (OSError, ValueError, csv.Error, StopIteration) as error:
        problems.append(f"{path}: {_reason(error)}")
        return [], []
    if whole != text:
        problems.append(f"{path}: is incomplete; {len(rows)} rows could be read")
    return columns, rows


def _with_rows(phase: Phase, folder: Path, problems: list[str]) -> Phase:
    """A phase with the rows of its csv file, whatever its columns are, and nothing that a page must not tell."""
    # The name of the file stands in another, which may come from anybody.
    columns, rows = _table(folder / Path(phase.table).name, problems) if phase.table else ([], [])
    names = {column: public_text(column) for column in columns}
    shown = [{names[column]: public(cell, column) for column, cell in row.items()} for row in rows]
    return replace(phase, title=public_text(phase.title), rows=shown)


def _numbers(path: Path, problems: list[str], *choices: Sequence[str]) -> list[Row]:
    """The rows of a csv file that hold a number in all columns of one of `choices`; what is none elsewhere is NaN."""
    return [numbers for _, numbers in _good_rows(path, problems, *choices)]


def _good_rows(path: Path, problems: list[str], *choices: Sequence[str]) -> list[tuple[dict[str, str], Row]]:
    """The same, each as it stands there and as numbers."""
    columns, table = _table(path, problems)
    needed = next((some for some in choices if some[0] in columns), choices[0])
    if missing := [name for name in needed if name not in columns]:
        if columns:
            problems.append(f"{path}: has no column {missing[0]}")
        return []
    rows = [(row, {name: _number(cell) for name, cell in row.items()}) for row in table]
    good = [
        (row, numbers) for row, numbers in rows
        if not any(isnan(numbers[name]) for name in needed)
        and all(numbers.get(name, 1) >= 1 for name in ("segments", "samples"))
    ]  # fmt: skip
    if len(good) < len(table):
        problems.append(f"{path}: is incomplete; {len(good)} rows could be read")
    return good


def _number(cell: str) -> float:
    """A cell as a number, NaN if it is none; a loss that is infinite has no place in a plot."""
    try:
        number = _TRUTHS[cell] if cell in _TRUTHS else float(cell)
    except ValueError:
        return nan
    return number if isfinite(number) else nan


_TRUTHS = {"True": 1.0, "False": 0.0, "": nan}


def _rows(path: Path, problems: list[str], *choices: Sequence[str]) -> list[Row]:
    rows = _numbers(path, problems, *choices)
    return [{name: value for name, value in row.items() if not isnan(value)} for row in rows]


def _metrics(folder: Path, problems: list[str]) -> pd.DataFrame:
    """All that was logged. Each start of a run writes a new file; what it repeats of an earlier one replaces it."""
    versions = sorted(folder.glob("version_*/metrics.csv"), key=lambda path: (len(path.parent.name), path.parent.name))
    logged: list[Row] = []
    for path in versions:
        if rows := _numbers(path, problems, ("step",)):
            logged = [row for row in logged if row["step"] < rows[0]["step"]] + rows
    return pd.DataFrame(logged or {"step": []}, dtype=float)


def _phases_of_earlier_versions(config: dict[str, Any], stages: list[Stage], logged: pd.DataFrame) -> list[Phase]:
    """What phases.json would say of a run that was begun before runs wrote it."""
    taken = sum(stage.steps for stage in stages)
    steps = int(logged["step"].max()) + 1 if len(logged) else taken
    if "max_segments" not in config["curriculum"]:
        return [Phase("Training", 0, steps, steps >= _limit(config, "curriculum", "steps"), False, None)]
    last = stages[-1] if stages else None
    stuck = bool(last and last.converged is False and not _goes_on_when_stuck(config))
    ended = bool(last and last.converged is not None and last.number >= _limit(config, "curriculum", "max_segments"))
    over = ended and not stuck
    phases = [Phase("Curriculum", 0, taken, over, stuck, STAGES)]
    if config.get("hold"):
        held = max(0, steps - taken) if over else 0
        finished = over and held >= _limit(config, "hold", "steps")
        phases.append(Phase("State passing", taken if held else None, held, finished, False, HOLD))
    return phases


def _goes_on_when_stuck(config: dict[str, Any]) -> bool:
    return config["curriculum"].get("when_stuck") == "continue"


def _titles(logged: pd.DataFrame, phases: list[Phase]) -> pd.Series[str]:
    """For each row the title of its phase; none in a curriculum, whose stages tell more."""
    titles = pd.Series("", index=logged.index, dtype=object)
    for phase in phases:
        if phase.first_step is not None:
            titles[logged["step"] >= phase.first_step] = "" if phase.staged else phase.title
    return titles


def _validations(logged: pd.DataFrame) -> pd.DataFrame:
    """Step, stage and accuracy of each; the stage is the number of segments of the longest inputs."""
    lengths = {name: int(found[1]) for name in logged if (found := _SEGMENTS.fullmatch(name))}
    measured = logged[list(lengths)].notna().to_numpy()
    stage = (measured * np.array([*lengths.values()], dtype=float)).max(axis=1, initial=0)
    accuracy = logged[ACCURACY] if ACCURACY in logged else float("nan")
    found = pd.DataFrame({"step": logged["step"] + 1, "stage": stage, "accuracy": accuracy})
    return found[found["stage"] > 0].dropna().astype({"step": int, "stage": int})


_SEGMENTS = re.compile(r"val/accuracy_segments_(\d+)")


def _stages(passed: list[Row], validations: pd.DataFrame, first_step: float, config: dict[str, Any]) -> list[Stage]:
    """Stages that are over, as stages.csv has them, and the one that goes on, as the validations tell it."""
    stages = {
        int(row["stage"]): Stage(
            int(row["stage"]), int(row["steps"]), row["seconds"], row["accuracy"], bool(row["converged"])
        )
        for row in passed
    }
    began = 0 if 1 in validations["stage"].values else first_step
    for number, last in validations.groupby("stage"):
        step, _, accuracy = last.iloc[-1]
        known = stages.get(number)
        # A stage that was stuck may go on in a resumed run; what follows the last one that was passed is another phase.
        done = known and (known.converged or _goes_on_when_stuck(config))
        if not known or (not done and step - began > known.steps):
            over = number < validations["stage"].iloc[-1]
            stages[number] = Stage(number, int(step - began), None, accuracy, True if over else None)
        began = step
    return [stages[number] for number in sorted(stages)]


def _curves(
    logged: pd.DataFrame, validations: pd.DataFrame, stages: list[Stage], phases: list[Phase]
) -> dict[str, list[Point]]:
    """What was logged, by metric: of validation whatever there is, except for slices of an accuracy."""
    stage = validations["stage"].reindex(logged.index)
    # A value belongs to the stage of the next validation; after the last one, to the stage that then goes on.
    last = stage.max() if stage.notna().any() else 0
    going_on = last + (last in {0, *(known.number for known in stages if known.converged)})
    stage = stage.groupby(logged["step"]).transform("max").bfill().fillna(going_on).astype(int)
    titles = _titles(logged, phases)
    places = titles.where(titles != "", "stage " + stage.astype(str))
    if [phase.staged for phase in phases] == [False]:
        # The only phase needs no name.
        places[:] = ""
    # Accuracy on the easier samples of a lesson is not that of the task.
    easier = (logged["lesson"] if "lesson" in logged else 0 * logged["step"]).to_numpy() > 0
    # Cell by cell, pandas would take most of the time of a report.
    steps, named = logged["step"].to_numpy().astype(int) + 1, places.to_numpy()
    curves: dict[str, list[Point]] = {}
    for name in logged:
        validated = name.startswith("val/") and not _SLICE.search(name)
        if validated or name in (LOSS, SPEED, HOST_MEMORY, DEVICE_MEMORY):
            values = logged[name].to_numpy()
            known = ~np.isnan(values) & ~(easier & validated)
            columns = (steps[known], named[known], values[known])
            points = [Point(*cells) for cells in zip(*(column.tolist() for column in columns), strict=True)]
            curves |= {public_text(name): points} if points else {}
    return curves


LOSS = "train/loss"
ACCURACY = "val/accuracy"
SPEED = "train/tokens_per_second"
HOST_MEMORY = "train/host_memory_mb"
DEVICE_MEMORY = "train/device_memory_mb"
_SLICE = re.compile(r"_(segments|distance)_\d+$")
_LENGTHS = ("segments", "right", "samples", "accuracy", "low", "high")
_PROBED = (*_LENGTHS, "decoy", "last_place", "commonest_place")


def _evaluations(
    folder: Path, at_the_end: list[Row], config: dict[str, Any], problems: list[str]
) -> Iterator[Evaluation]:
    if at_the_end:
        yield Evaluation(AT_THE_END, True, None, "", sorted(at_the_end, key=lambda row: row["segments"]), [])
    for path in sorted(folder.glob(f"evaluations/*/{EVALUATION}")):
        if found := _evaluation(path, config, problems):
            yield found


def _evaluation(path: Path, config: dict[str, Any], problems: list[str]) -> Evaluation | None:
    if not (rows := _rows(path, problems, _LENGTHS)):
        return None
    settings = _settings(path.with_suffix(".json"), problems)
    other = [part for part in ("task", "noise") if settings.get(part) not in (None, config.get(part))]
    checkpoint = str(settings.get("checkpoint", path.parent.name))
    kinds = (kind(settings[part]) for part in other)
    label = ", ".join([checkpoint, *kinds, f"{max(row['samples'] for row in rows):.0f} samples"])
    stage = re.match(r"stage-(\d+)", checkpoint)
    return Evaluation(
        label=label,
        own=checkpoint == LAST and not other,
        stage=int(stage[1]) if stage else None,
        device=str(settings.get("device", "")),
        rows=sorted(rows, key=lambda row: row["segments"]),
        followed=_rows(path.with_name("retention.csv"), problems, ("age", "right", "streams")),
        probes=[
            (public_text(cells.get("probe", "–")), numbers)
            for cells, numbers in _good_rows(path.with_name(PROBES), problems, _PROBED)
        ],
        settings={name: settings[name] for name in ("checkpoint", "task", "noise") if name in settings},
    )


def differences(configs: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """The settings that are not the same in all configs, by dotted key, with their value in each."""
    flat = [dict(_flat(config)) for config in configs]
    groups = list(dict.fromkeys(key for config in configs for key in config))
    keys = sorted({key: None for config in flat for key in config}, key=lambda key: groups.index(key.split(".")[0]))
    rows = {key: [config.get(key, "–") for config in flat] for key in keys}
    return {key: values for key, values in rows.items() if len(set(values)) > 1}


def _flat(config: dict[str, Any], above: str = "") -> Iterable[tuple[str, str]]:
    for key, value in config.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value if isinstance(value, str) else json.dumps(value, default=str)


def memory(row: Row) -> float | None:
    """Megabytes that a test took: of the GPU, or without one of the process."""
    return row.get("device_memory_mb") or row.get("host_memory_mb")


def kind(part: Any) -> str:
    """A component of a config in a word: its class, and the name or the path that tells it from its like."""
    if not isinstance(part, dict):
        return "–"
    name = str(part.get("_target_", "–")).rsplit(".", 1)[-1]
    source = part.get("name") or part.get("path") or part.get("test_path") or ""
    source = str(source[0] if isinstance(source, list) else source)
    if "layers" in part and "width" in part:
        return f"{name} {part['layers']} × {part['width']}"
    return f"{name} {'/'.join(Path(source).parts[-2:])}".strip()


def _settings(path: Path, problems: list[str]) -> dict[str, Any]:
    settings = public((_json(path, dict[str, Any], problems) or {}).get("settings"))
    return {name: _renamed(part) for name, part in settings.items()} if isinstance(settings, dict) else {}


def _pictures(folder: Path, problems: list[str]) -> Iterator[tuple[str, bytes]]:
    for path in sorted(folder.rglob("*.png")):
        name = str(path.relative_to(folder).with_suffix(""))
        try:
            content = path.read_bytes()
        except OSError as error:
            problems.append(f"{path}: {_reason(error)}")
            continue
        if content.startswith(b"\x89PNG\r\n"):
            yield public_text(name), content
        else:
            problems.append(f"{path}: is no picture")


def _json(path: Path, kind: type[Content], problems: list[str]) -> Content | None:
    """What a json file holds; None without it, or if it is of another kind."""
    try:
        content: Content = _adapter(cast(Any, kind)).validate_json(path.read_bytes())
        return content
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        problems.append(f"{path}: {_reason(error)}")
        return None


# Making one takes longer than reading a file.
@lru_cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return f"{Path(error.filename).name} is missing"
    if isinstance(error, NotADirectoryError):
        return "is not a folder"
    if isinstance(error, OSError):
        return (error.strerror or type(error).__name__).lower()
    return str(error) if isinstance(error, UserError) else "is damaged"
