"""What a run is, when it is told: plain values, and words for them. reading.py reads them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rmt_lightning.core.run_folder import STAGES

Status = Literal[
    "finished", "stopped at max_steps", "stopped at max_time", "did not converge", "interrupted or running"
]
Row = dict[str, float]
AT_THE_END = "at the end of training"
LOSS = "train/loss"
ACCURACY = "val/accuracy"
SPEED = "train/tokens_per_second"
HOST_MEMORY = "train/host_memory_mb"
DEVICE_MEMORY = "train/device_memory_mb"


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
        rates: at which memories were lost, with `lost`, `exposure` and the ends of the interval.
        sha256: of the checkpoint; nothing if it has not been written down.
    """

    label: str
    own: bool
    stage: int | None
    device: str
    rows: list[Row]
    followed: list[Row]
    probes: list[tuple[str, Row]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    rates: list[dict[str, Any]] = field(default_factory=list)
    sha256: str = ""


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
        stopped = 0 <= limit(self.config, "trainer", "max_steps") <= self.steps
        return "stopped at max_steps" if stopped else "interrupted or running"

    def logged(self, metric: str) -> list[float]:
        """All values of a metric; there may be none."""
        return [point.value for point in self.curves.get(metric, [])]

    @property
    def longest_test(self) -> Row | None:
        """The longest inputs of its own task and noise that its last weights were tested on."""
        rows = [row for evaluation in self.evaluations if evaluation.own for row in evaluation.rows]
        return max(rows, key=lambda row: (row["segments"], row["samples"]), default=None)


def limit(config: dict[str, Any], part: str, name: str) -> float:
    """A whole number of a config that ends something; infinite if there is none."""
    settings = config.get(part)
    limit = settings.get(name) if isinstance(settings, dict) else None
    return limit if isinstance(limit, int) else float("inf")


class Tested(NamedTuple):
    """What some weights can do.

    Attributes:
        run: whose they are.
        config: its settings, and whatever else was tested: its task, its noise or its checkpoint.
        tests: on what the run has learnt, if its folder was named; or the one whose folder was named.
        alone: whether it was the folder of an evaluation, which tells of no more than that.
    """

    run: Run
    config: dict[str, Any]
    tests: list[Evaluation]
    alone: bool = False


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
