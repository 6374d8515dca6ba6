"""What a run folder tells, read without opening a checkpoint. What cannot be read is named, never fatal."""

from __future__ import annotations

import csv
import glob
import json
import os
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from rmt_lightning.core.errors import UserError
from rmt_lightning.core.names import public_name
from rmt_lightning.core.run_folder import CHECKPOINTS, CONFIG, EVALUATION, HARDWARE, HOLD, LAST, METRICS, STAGES
from rmt_lightning.reporting.redaction import public, public_text

Status = Literal["finished", "stopped at max_steps", "did not converge", "interrupted or running"]
_UNFINISHED: Status = "interrupted or running"
Row = dict[str, float]
AT_THE_END = "at the end of training"
Content = TypeVar("Content", dict[str, Any], list[Any])


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


@dataclass(frozen=True)
class Point:
    """A logged value: at which optimizer step (the first is 1) of which stage."""

    step: int
    stage: int
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
    """

    label: str
    own: bool
    stage: int | None
    device: str
    rows: list[Row]
    followed: list[Row]


@dataclass(frozen=True)
class Run:
    """A run folder.

    Attributes:
        name: the end of its path, as long as it takes to tell it from the others.
        config: the resolved settings, without secrets and home folders.
        stages: in order.
        curves: what was logged, by metric.
        evaluations: the one at the end of the run first.
        losses: memories lost in training, in the phase after the curriculum: step, rate, rate_low, rate_high.
        text_score: perplexity of the documents that a language model was tested on at the end.
        hardware: what each start of the run ran on.
        attention: pictures (png) of attention maps, by their path without the ending.
        problems: files that could not be read, or not to their end.
    """

    name: str
    config: dict[str, Any]
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
        return max([curve[-1].step for curve in self.curves.values()], default=sum(s.steps for s in self.stages))

    @property
    def seconds(self) -> float | None:
        known = [stage.seconds for stage in self.stages if stage.seconds is not None]
        return sum(known) if known else None

    @property
    def reached(self) -> int:
        """Segments of the last stage that has begun, 0 before the first validation."""
        return self.stages[-1].number if self.stages else 0

    @property
    def status(self) -> Status:
        if self.stages and self.stages[-1].converged is False and not _goes_on_when_stuck(self.config):
            return "did not converge"
        if self._finished:
            return "finished"
        return "stopped at max_steps" if 0 <= self._limit("trainer", "max_steps") <= self.steps else _UNFINISHED

    @property
    def _finished(self) -> bool:
        if _models_text(self.config):
            return self.steps >= self._limit("curriculum", "steps")
        return self._curriculum_over and (not self.config.get("hold") or self.held >= self._limit("hold", "steps"))

    @property
    def _curriculum_over(self) -> bool:
        last = self.stages[-1] if self.stages else None
        return bool(last and last.converged is not None and last.number >= self._limit("curriculum", "max_segments"))

    def _limit(self, part: str, name: str) -> float:
        settings = self.config.get(part)
        limit = settings.get(name) if isinstance(settings, dict) else None
        return limit if isinstance(limit, int) else float("inf")

    @property
    def held(self) -> int:
        """Steps of the phase after the curriculum, in which memories are carried over from step to step."""
        behind = self.steps - sum(stage.steps for stage in self.stages)
        return max(0, behind) if self.config.get("hold") and self._curriculum_over else 0

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
            runs.append((folder, _read_run(folder)))
        except (OSError, UserError) as error:
            skipped.append(f"{folder}: {_reason(error)}")
    names = _names([folder.resolve() for folder, _ in runs])
    named = [replace(run, name=name) for (_, run), name in zip(runs, names, strict=True)]
    return named, [public_text(line) for line in skipped]


def _find(places: Iterable[str]) -> tuple[list[Path], list[str]]:
    """Run folders in the order of `places`, each once, and what is wrong with places that lead to none."""
    found: dict[Path, Path] = {}
    reasons: list[str] = []
    for place in places:
        matches = [place] if os.path.lexists(place) else sorted(glob.glob(place, recursive=True))
        if not matches:
            reasons.append(f"{place}: does not exist")
        for match in matches:
            errors: list[OSError] = []
            inside = list(_run_folders(Path(match), errors))
            reasons += [f"{error.filename}: {_reason(error)}" for error in errors]
            if not inside and not errors:
                reasons.append(f"{match}: holds no run")
            for folder in inside:
                found.setdefault(folder.resolve(), folder)
    return list(found.values()), reasons


def _run_folders(place: Path, errors: list[OSError]) -> Iterator[Path]:
    for folder, inner, files in os.walk(place, onerror=errors.append):
        if {CONFIG, STAGES} & set(files) or {CHECKPOINTS, METRICS} & set(inner):
            inner.clear()
            yield Path(folder)
        inner[:] = sorted(name for name in inner if not name.startswith("."))


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
    finished = _rows(folder / STAGES, ("stage", "steps", "seconds", "accuracy", "converged"), problems)
    logged = list(_metrics(folder / METRICS, problems))
    stages = _stages(finished, logged, _goes_on_when_stuck(config))
    return Run(
        name=folder.name,
        config=config,
        stages=stages,
        curves=_curves(logged, stages),
        evaluations=list(_evaluations(folder, config, problems)),
        losses=_rows(folder / HOLD, ("step", "rate", "rate_low", "rate_high"), problems),
        text_score=_text_score(folder / EVALUATION, problems) if _models_text(config) else None,
        hardware=_hardware(folder / HARDWARE, problems),
        attention=dict(_pictures(folder / "attention", problems)),
        problems=[public_text(problem.removeprefix(f"{folder}/")) for problem in problems],
    )


def _config(path: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(path.read_text())
    except (ValueError, yaml.YAMLError, RecursionError):
        raise UserError(f"{CONFIG} is damaged") from None
    if not config:
        raise UserError(f"{CONFIG} is empty")
    if not isinstance(config, dict) or not all(isinstance(config.get(part), dict) for part in _PARTS):
        raise UserError(f"{CONFIG} is not that of a run")
    cleaned = public(config)
    assert isinstance(cleaned, dict)
    return {name: _renamed(part) for name, part in cleaned.items()}


def _renamed(part: Any) -> Any:
    """A component with the public name of its class, which earlier versions called by its place."""
    if not isinstance(part, dict) or "_target_" not in part:
        return part
    return part | {"_target_": public_name(str(part["_target_"]))}


_PARTS = ("task", "noise", "backbone", "model", "curriculum", "trainer")


def _goes_on_when_stuck(config: dict[str, Any]) -> bool:
    return config["curriculum"].get("when_stuck") == "continue"


def _models_text(config: dict[str, Any]) -> bool:
    """Whether a language model is trained, for a number of steps, rather than facts asked for at growing lengths."""
    return "max_segments" not in config["curriculum"]


def _rows(path: Path, needed: Sequence[str], problems: list[str]) -> list[Row]:
    """The rows of a csv file that hold a number in all `needed` columns; empty cells and words are left out."""
    try:
        text = path.read_text()
        # Its last line is half written, or still being written, if it does not end.
        lines = text.splitlines()[: None if text.endswith("\n") else -1]
        reader = csv.DictReader(lines)
        missing = [name for name in needed if name not in (reader.fieldnames or [])]
        if missing:
            raise UserError(f"has no column {missing[0]}")
        table = list(reader)
    except FileNotFoundError:
        return []
    except (OSError, ValueError, csv.Error) as error:
        problems.append(f"{path}: {_reason(error)}")
        return []
    rows = [{name: number for name, cell in row.items() if (number := _number(cell)) is not None} for row in table]
    good = [row for row in rows if all(name in row for name in needed) and row.get("segments", 1) >= 1]
    if not text.endswith("\n") or len(good) < len(rows):
        problems.append(f"{path}: is incomplete; {len(good)} rows could be read")
    return good


def _number(cell: Any) -> float | None:
    if cell in ("True", "False"):
        return float(cell == "True")
    try:
        number = float(cell)
    except (TypeError, ValueError):
        return None
    # A loss that is no number has no place in a plot.
    return number if abs(number) < float("inf") else None


def _metrics(folder: Path, problems: list[str]) -> Iterator[Row]:
    """All that was logged. Each start of a run writes a new file; what it repeats of an earlier one replaces it."""
    versions = sorted(folder.glob("version_*/metrics.csv"), key=lambda path: (len(path.parent.name), path.parent.name))
    logs = [rows for path in versions if (rows := _rows(path, ("step",), problems))]
    for number, rows in enumerate(logs):
        end = min((later[0]["step"] for later in logs[number + 1 :]), default=float("inf"))
        yield from (row for row in rows if row["step"] < end)


def _validations(logged: list[Row]) -> list[tuple[int, int, float]]:
    """(step, stage, accuracy) of each; the stage is the number of segments of the longest inputs."""
    return [
        (int(row["step"]) + 1, max(stages), row["val/accuracy"])
        for row in logged
        if "val/accuracy" in row and (stages := [int(found[1]) for name in row if (found := _SEGMENTS.fullmatch(name))])
    ]


_SEGMENTS = re.compile(r"val/accuracy_segments_(\d+)")


def _stages(finished: list[Row], logged: list[Row], goes_on_when_stuck: bool) -> list[Stage]:
    """Stages that are over, as stages.csv has them, and the one that goes on, as the validations tell it."""
    stages = {
        int(row["stage"]): Stage(
            int(row["stage"]), int(row["steps"]), row["seconds"], row["accuracy"], bool(row["converged"])
        )
        for row in finished
    }
    validations = _validations(logged)
    began = 0 if validations and validations[0][1] == 1 else int(min((row["step"] for row in logged), default=0))
    for number in sorted({stage for _, stage, _ in validations}):
        step, _, accuracy = [validation for validation in validations if validation[1] == number][-1]
        known = stages.get(number)
        # A stage that was stuck may go on in a resumed run; what follows the last one that was passed is another phase.
        passed = known and (known.converged or goes_on_when_stuck)
        if not known or (not passed and step - began > known.steps):
            over = number < validations[-1][1]
            stages[number] = Stage(number, step - began, None, accuracy, True if over else None)
        began = step
    return [stages[number] for number in sorted(stages)]


def _curves(logged: list[Row], stages: list[Stage]) -> dict[str, list[Point]]:
    validations = _validations(logged)
    ends = [step for step, _, _ in validations]
    over = {stage.number for stage in stages if stage.converged}
    last = validations[-1][1] if validations else 0
    after = last + (not validations or last in over)
    curves: dict[str, list[Point]] = {}
    for row in logged:
        step = int(row["step"]) + 1
        place = bisect_left(ends, step)
        stage = validations[place][1] if place < len(ends) else after
        names = row.keys() & {LOSS, ACCURACY, PERPLEXITY, SPEED, HOST_MEMORY, DEVICE_MEMORY}
        if row.get("lesson"):
            # Accuracy on the easier samples of a lesson is not that of the task.
            names -= {ACCURACY}
        for name in names:
            curves.setdefault(name, []).append(Point(step, stage, row[name]))
    return curves


LOSS = "train/loss"
ACCURACY = "val/accuracy"
PERPLEXITY = "val/perplexity"
SPEED = "train/tokens_per_second"
HOST_MEMORY = "train/host_memory_mb"
DEVICE_MEMORY = "train/device_memory_mb"


def _evaluations(folder: Path, config: dict[str, Any], problems: list[str]) -> Iterator[Evaluation]:
    if _models_text(config):
        return
    needed = ("segments", "right", "samples", "accuracy", "low", "high")
    if rows := _rows(folder / EVALUATION, needed, problems):
        yield Evaluation(AT_THE_END, True, None, "", sorted(rows, key=lambda row: row["segments"]), [])
    for path in sorted(folder.glob(f"evaluations/*/{EVALUATION}")):
        if not (rows := _rows(path, needed, problems)):
            continue
        settings = _settings(path.with_suffix(".json"), problems)
        other = [part for part in ("task", "noise") if settings.get(part) not in (None, config[part])]
        checkpoint = str(settings.get("checkpoint", path.parent.name))
        label = ", ".join([checkpoint, *(kind(settings[part]) for part in other), f"{rows[0]['samples']:.0f} samples"])
        stage = re.match(r"stage-(\d+)", checkpoint)
        yield Evaluation(
            label=label,
            own=checkpoint == LAST and not other,
            stage=int(stage[1]) if stage else None,
            device=str(settings.get("device", "")),
            rows=sorted(rows, key=lambda row: row["segments"]),
            followed=_rows(path.with_name("retention.csv"), ("age", "right", "streams"), problems),
        )


def _text_score(path: Path, problems: list[str]) -> Row | None:
    return next(iter(_rows(path, ("documents", "tokens", "perplexity", "bits_per_byte"), problems)), None)


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


def kind(part: Any) -> str:
    """A component of a config in a word: its class, and the name or the path that tells it from its like."""
    if not isinstance(part, dict):
        return "–"
    name = str(part.get("_target_", "–")).rsplit(".", 1)[-1]
    source = str(part.get("name") or part.get("path") or "")
    if "layers" in part and "width" in part:
        return f"{name} {part['layers']} × {part['width']}"
    return f"{name} {'/'.join(Path(source).parts[-2:])}".strip()


def _settings(path: Path, problems: list[str]) -> dict[str, Any]:
    settings = public(_json(path, dict, problems).get("settings"))
    return {name: _renamed(part) for name, part in settings.items()} if isinstance(settings, dict) else {}


def _hardware(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    return [start for start in public(_json(path, list, problems)) if isinstance(start, dict)]


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


def _json(path: Path, kind: type[Content], problems: list[str]) -> Content:
    try:
        content = json.loads(path.read_text())
        if isinstance(content, kind):
            return content
        raise UserError("is not what a run writes")
    except FileNotFoundError:
        pass
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{path}: {_reason(error)}")
    return kind()


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return f"{Path(error.filename).name} is missing"
    if isinstance(error, NotADirectoryError):
        return "is not a folder"
    if isinstance(error, OSError):
        return (error.strerror or type(error).__name__).lower()
    return str(error) if isinstance(error, UserError) else "is damaged"
