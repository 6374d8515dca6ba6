"""Run folders in, runs out, read without opening a checkpoint. What cannot be read is named, never fatal."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from rmt_lightning.core.errors import UserError
from rmt_lightning.core.names import public_name
from rmt_lightning.core.progress import bar
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
from rmt_lightning.reporting.run_files import (
    read_good_rows,
    read_json,
    read_numbers,
    read_pictures,
    read_rows,
    read_table,
    reason,
)
from rmt_lightning.reporting.runs import (
    ACCURACY,
    AT_THE_END,
    DEVICE_MEMORY,
    HOST_MEMORY,
    LOSS,
    SPEED,
    Evaluation,
    Phase,
    Point,
    Row,
    Run,
    Stage,
    Tested,
    kind,
    limit,
)


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
    with bar("reading runs", len(folders), unit="runs") as advance:
        for folder in folders:
            try:
                _refuse_links_out(folder)
                runs.append((folder, _read_run(folder)))
            except (OSError, UserError) as error:
                skipped.append(f"{folder}: {reason(error)}")
            advance()
    names = _names([folder.resolve() for folder, _ in runs])
    named = [replace(run, name=name) for (_, run), name in zip(runs, names, strict=True)]
    return named, [public_text(line) for line in skipped]


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
            skipped.append(public_text(f"{path.parent}: {reason(error)}"))
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
    return Tested(run, run.config | test.settings, [test], alone=True)


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
            reasons += [f"{error.filename}: {reason(error)}" for error in errors]
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
    phases = read_json(folder / PHASES, list[Phase], problems) or []
    passed = read_rows(folder / STAGES, problems, ("stage", "steps", "seconds", "accuracy", "converged"))
    titles, validations = _titles(logged, phases), _validations(logged)
    staged = titles == ""
    stages = _stages(passed, validations[staged[validations.index]], logged["step"][staged].min(), config)
    phases = phases or _phases_of_earlier_versions(config, stages, logged)
    tests = read_rows(folder / EVALUATION, problems, _LENGTHS, ("documents", "tokens", "perplexity", "bits_per_byte"))
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
            row
            for row in read_rows(folder / HOLD, problems, ("step",))
            if {"rate", "rate_low", "rate_high"} <= row.keys()
        ],
        text_score=tests[0] if of_text else None,
        hardware=public(read_json(folder / HARDWARE, list[dict[str, Any]], problems) or []),
        attention=dict(read_pictures(folder / "attention", problems)),
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


def _with_rows(phase: Phase, folder: Path, problems: list[str]) -> Phase:
    """A phase with the rows of its csv file, whatever its columns are, and nothing that a page must not tell."""
    # The name of the file stands in another, which may come from anybody.
    columns, rows = read_table(folder / Path(phase.table).name, problems) if phase.table else ([], [])
    names = {column: public_text(column) for column in columns}
    shown = [{names[column]: public(cell, column) for column, cell in row.items()} for row in rows]
    return replace(phase, title=public_text(phase.title), rows=shown)


def _metrics(folder: Path, problems: list[str]) -> pd.DataFrame:
    """All that was logged. Each start of a run writes a new file; what it repeats of an earlier one replaces it."""
    versions = sorted(folder.glob("version_*/metrics.csv"), key=lambda path: (len(path.parent.name), path.parent.name))
    logged: list[Row] = []
    for path in versions:
        if rows := read_numbers(path, problems, ("step",)):
            logged = [row for row in logged if row["step"] < rows[0]["step"]] + rows
    return pd.DataFrame(logged or {"step": []}, dtype=float)


def _phases_of_earlier_versions(config: dict[str, Any], stages: list[Stage], logged: pd.DataFrame) -> list[Phase]:
    """What phases.json would say of a run that was begun before runs wrote it."""
    taken = sum(stage.steps for stage in stages)
    steps = int(logged["step"].max()) + 1 if len(logged) else taken
    if "max_segments" not in config["curriculum"]:
        return [Phase("Training", 0, steps, steps >= limit(config, "curriculum", "steps"), False, None)]
    last = stages[-1] if stages else None
    stuck = bool(last and last.converged is False and not _goes_on_when_stuck(config))
    ended = bool(last and last.converged is not None and last.number >= limit(config, "curriculum", "max_segments"))
    over = ended and not stuck
    phases = [Phase("Curriculum", 0, taken, over, stuck, STAGES)]
    if config.get("hold"):
        held = max(0, steps - taken) if over else 0
        finished = over and held >= limit(config, "hold", "steps")
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
    if not (rows := read_rows(path, problems, _LENGTHS)):
        return None
    told = read_json(path.with_suffix(".json"), dict[str, Any], problems) or {}
    settings = _settings(told)
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
        followed=read_rows(path.with_name("retention.csv"), problems, ("age", "right", "streams")),
        probes=[
            (public_text(cells.get("probe", "–")), numbers)
            for cells, numbers in read_good_rows(path.with_name(PROBES), problems, _PROBED)
        ],
        settings={name: settings[name] for name in ("checkpoint", "task", "noise") if name in settings},
        rates=list(_rates(told)),
        sha256=_sha256(told),
    )


def _rates(told: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The rates at which memories were lost that an evaluation tells of, if nothing is missing."""
    found = told.get("retention")
    for row in found.values() if isinstance(found, dict) else ():
        numbers = {name: row.get(name) for name in _RATE} if isinstance(row, dict) else {}
        if all(isinstance(number, int | float) and isfinite(number) for number in numbers.values()) and numbers:
            yield {**numbers, "questions": row.get("questions")}


_RATE = ("lost", "exposure", "streams", "rate", "rate_low", "rate_high")


def _sha256(told: dict[str, Any]) -> str:
    """Of the checkpoint, which would be hidden for looking like a secret."""
    settings = told.get("settings")
    return str(settings.get("sha256", "")) if isinstance(settings, dict) else ""


def _settings(told: dict[str, Any]) -> dict[str, Any]:
    settings = public(told.get("settings"))
    return {name: _renamed(part) for name, part in settings.items()} if isinstance(settings, dict) else {}
