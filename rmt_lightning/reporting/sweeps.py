"""A sweep's folder in, one table over its jobs out: means over seeds, with their intervals."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import pandas as pd
from rich.table import Table
from rich.text import Text

from rmt_lightning.core.files import write_atomically
from rmt_lightning.core.quoting import shown
from rmt_lightning.core.run_folder import JOB
from rmt_lightning.core.statistics import Mean, mean
from rmt_lightning.core.tokens import in_short
from rmt_lightning.reporting.reading import matching, read_runs
from rmt_lightning.reporting.redaction import public, public_text
from rmt_lightning.reporting.runs import AT_THE_END, Row, Run

SEED = "seed"
# A job that ended so has a result; the others are tried again when the sweep goes on.
SETTLED = ("finished", "stopped at max_steps", "stopped at max_time", "did not converge")


@dataclass(frozen=True)
class Job:
    """One job of a sweep.

    Attributes:
        name: of its folder.
        number: its place in the sweep, from 0.
        values: of what is swept.
        status: one of SETTLED, "failed", or "interrupted or running".
        reason: why it failed, if it did.
        run: what its folder tells, if it has begun to train.
        scores: what came of it: accuracy by length of the test, or perplexity.
    """

    name: str
    number: int
    values: dict[str, Any]
    status: str
    reason: str
    run: Run | None
    scores: dict[str, float]

    @property
    def objective(self) -> float:
        """What is to be small: the share of wrong answers at the longest test, or perplexity; without any, infinite."""
        if self.status not in SETTLED:
            return float("inf")
        name, score = list(self.scores.items())[-1]
        return score if name == PERPLEXITY else 1 - score

    def interval(self, name: str) -> tuple[float, float]:
        """The 95% interval of a score, as its test has it; not numbers if it has none."""
        rows = {f"{ACCURACY_AT}{_length(row)}": row for row in _tested(self.run)} if self.run else {}
        if name == CAPACITY and rows:
            return held(list(rows.values())[-1], self.run.config["task"] if self.run else {})
        return (rows[name]["low"], rows[name]["high"]) if name in rows else (math.nan, math.nan)

    def told(self) -> str:
        """How it ended, in a few words."""
        if self.status not in SETTLED:
            return f"failed: {self.reason}" if self.reason else "interrupted"
        name, score = list(self.scores.items())[-1]
        return f"{self.status}, {written(name, score)} {in_words(name)}"

    def row(self) -> dict[str, Any]:
        """Its row of sweep.csv."""
        run = self.run
        told = {"stages": run.reached, "steps": run.steps, "seconds": run.seconds} if run else {}
        return {"job": self.name, **self.values, "status": self.status, "reason": self.reason, **told, **self.scores}


@dataclass(frozen=True)
class Group:
    """The jobs that differ in nothing but their seed.

    Attributes:
        values: of the axes.
        jobs: all of them.
        scores: the mean of each score over those that have one.
    """

    values: dict[str, Any]
    jobs: list[Job]
    scores: dict[str, Mean]

    def interval(self, name: str) -> tuple[float, float]:
        """The 95% interval of a score: of the mean over seeds, or of the test of the only one."""
        if self.scores[name].half is not None:
            return self.scores[name].interval
        return next(job.interval(name) for job in self.jobs if name in job.scores)

    def row(self) -> dict[str, Any]:
        """Its row of summary.csv."""
        done = [job for job in self.jobs if job.scores]
        scores = {
            name: value
            for score, found in self.scores.items()
            for name, value in ((score, found.value), (f"{score}_interval", found.half))
        }
        return {**self.values, "jobs": len(self.jobs), "with_result": len(done), **scores, **self.cost()}

    def cost(self) -> dict[str, float | None]:
        """Steps and seconds of training, on average."""
        runs = [job.run for job in self.jobs if job.run and job.scores]
        seconds = [run.seconds for run in runs if run.seconds is not None]
        return {
            "steps": fmean(run.steps for run in runs) if runs else None,
            "seconds": fmean(seconds) if seconds else None,
        }

    def statuses(self) -> str:
        """How its jobs ended."""
        counts = Counter(job.status for job in self.jobs)
        return counts.most_common()[0][0] if len(counts) == 1 else ", ".join(f"{n} {s}" for s, n in counts.items())


@dataclass(frozen=True)
class Sweep:
    """All jobs of a sweep, in order.

    Attributes:
        name: of its folder.
        jobs: as they were numbered.
        chances: accuracies of guessing, if somebody has found them out: no run folder holds them.
    """

    name: str
    jobs: list[Job]
    chances: Sequence[float] = ()

    @property
    def axes(self) -> list[str]:
        """What is swept besides the seed."""
        return [key for key in self.values if key != SEED]

    @property
    def measures(self) -> list[str]:
        """The names of the scores; the last is the one that counts."""
        return sorted({name for job in self.jobs for name in job.scores}, key=_order)

    @property
    def groups(self) -> list[Group]:
        """Jobs that differ in their seeds alone, together."""
        axes = self.axes
        found: dict[str, list[Job]] = {}
        for job in self.jobs:
            found.setdefault(json.dumps([job.values.get(axis) for axis in axes]), []).append(job)
        return [
            Group(
                values={axis: jobs[0].values.get(axis) for axis in axes},
                jobs=jobs,
                scores={name: mean(known) for name in self.measures if (known := _known(jobs, name))},
            )
            for jobs in found.values()
        ]

    @property
    def drawn(self) -> list[str]:
        """The measures that share an axis of a figure: accuracy at each length, or perplexity alone."""
        return [name for name in self.measures if name.startswith(ACCURACY_AT)] or self.measures[-1:]

    @property
    def drawable(self) -> bool:
        """Whether something is swept, and has a result."""
        return bool(self.values and self.measures)

    @property
    def form(self) -> Literal["curves", "map", "slices", "capacity"]:
        """How it is drawn: curves along one axis, a heat map over two, or points along each of any number.

        Where one of two axes is of pairs, how many are held, a curve for each value of the other.
        """
        if len(self.axes) == 2 and PAIRS in self.axes and CAPACITY in self.measures:
            return "capacity"
        sizes = [len(self.tried(axis)) for axis in self.axes]
        if len(sizes) == 1 and sizes[0] <= 12:
            return "curves"
        return "map" if len(sizes) == 2 and math.prod(sizes) <= 2 * len(self.groups) else "slices"

    @property
    def values(self) -> list[str]:
        """All that is swept."""
        return list(dict.fromkeys(key for job in self.jobs for key in job.values))

    @property
    def of_accuracy(self) -> bool:
        """Whether questions were asked, rather than text predicted."""
        return self.drawn[-1:] != [PERPLEXITY]

    def scale(self, axis: str) -> Literal["linear", "log"] | None:
        """How an axis of many values is drawn; None if they are no numbers."""
        values = self.tried(axis)
        if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
            return None
        return "log" if min(values) > 0 and max(values) >= 30 * min(values) else "linear"

    def tried(self, axis: str) -> list[Any]:
        """The values of an axis, as they were typed."""
        return list(dict.fromkeys(job.values[axis] for job in self.jobs if axis in job.values))

    def table(self) -> Table:
        """For the terminal: a row for each group."""
        table = Table(title=f"Sweep {self.name}", title_justify="left")
        for heading in [*self.axes, "jobs", *map(in_words, self.measures), "steps", "seconds", "status"]:
            table.add_column(heading, overflow="fold")
        for group in self.groups:
            means = [with_interval(name, group.scores.get(name)) for name in self.measures]
            cost = ["–" if value is None else f"{value:,.0f}" for value in group.cost().values()]
            values = [str(value) for value in group.values.values()]
            table.add_row(*values, str(len(group.jobs)), *means, *cost, group.statuses())
        return table


ACCURACY_AT = "accuracy_"
_TOKENS = "_tokens"
PERPLEXITY = "perplexity"
# At the longest test.
CAPACITY = "capacity"
PAIRS = "task.pairs"
PAIRS_TOLD = "pairs"


def _order(name: str) -> tuple[bool, int, str]:
    """Accuracies by length, those in tokens last; and perplexity, which counts, after bits per byte."""
    length = name.removeprefix(ACCURACY_AT).removesuffix(_TOKENS)
    return name.endswith(_TOKENS), int(length) if name.startswith(ACCURACY_AT) else 0, name


def _known(jobs: Iterable[Job], name: str) -> list[float]:
    return [job.scores[name] for job in jobs if name in job.scores]


def in_words(name: str) -> str:
    """A measure in words."""
    length = name.removeprefix(ACCURACY_AT)
    if name == CAPACITY:
        return "pairs held"
    if length.endswith(_TOKENS):
        return f"at {in_short(int(length.removesuffix(_TOKENS)))} tokens"
    return name.replace("_", " ") if length == name else f"at {length} segment{'s' * (length != '1')}"


def written(name: str, value: float) -> str:
    """A score in its unit."""
    return f"{value:.1%}" if name.startswith(ACCURACY_AT) else f"{value:.4g}"


def with_interval(name: str, found: Mean | None) -> str:
    """A mean with its interval."""
    if found is None:
        return "–"
    return written(name, found.value) + (f" ± {written(name, found.half)}" if found.half is not None else "")


def read_sweep(folder: Path) -> Sweep:
    """Read a sweep's folder, whatever state its jobs are in."""
    jobs = [read_job(path.parent) for path in folder.glob(f"*/{JOB}")]
    return Sweep(public_text(folder.resolve().name), sorted(jobs, key=lambda job: (job.number, job.name)))


def find_sweeps(places: Iterable[str]) -> list[Path]:
    """The folders of sweeps that are in some places or, at any depth, below them, each once.

    Args:
        places: folders, or patterns of some.
    """
    jobs = (path for place in places for match in matching(place) for path in sorted(match.rglob(JOB)))
    # A place may be called by its end: "." or "..".
    return list(dict.fromkeys(Path(os.path.abspath(path)).parents[1].resolve() for path in jobs))


def read_job(folder: Path) -> Job:
    """Read a job's folder."""
    try:
        record = json.loads((folder / JOB).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        record = {}
    runs, _ = read_runs([str(folder)])
    run = runs[0] if runs else None
    scores = _scores(run) if run and run.status in SETTLED else {}
    failed = record.get("failed")
    return Job(
        name=public_text(folder.name),
        number=record.get("number", 0),
        values=public(record.get("settings", {})),
        status="failed" if failed else run.status if run and scores else "interrupted or running",
        reason=public_text(failed or ""),
        run=run,
        scores={} if failed else scores,
    )


def _scores(run: Run) -> dict[str, float]:
    if run.text_score:
        return {"bits_per_byte": run.text_score["bits_per_byte"], PERPLEXITY: run.text_score["perplexity"]}
    rows = _tested(run)
    capacity = {CAPACITY: rows[-1][CAPACITY]} if rows and CAPACITY in rows[-1] else {}
    return capacity | {f"{ACCURACY_AT}{_length(row)}": row["accuracy"] for row in rows}


def _tested(run: Run) -> list[Row]:
    """What the test at the end of a run has found, by length."""
    return [row for test in run.evaluations if test.label == AT_THE_END for row in test.rows]


def held(row: Row, task: Mapping[str, Any]) -> tuple[float, float]:
    """The 95% interval of how many pairs are held, from that of the accuracy of a task with so many values."""
    values = task.get("values")
    if not isinstance(values, int) or values < 2:
        return math.nan, math.nan
    low, high = (row[PAIRS_TOLD] * (values * row[end] - 1) / (values - 1) for end in ("low", "high"))
    return low, high


def _length(row: dict[str, float]) -> str:
    """The length of the inputs that a row of evaluation.csv tells of, as it was asked for."""
    tokens = row.get("tokens", math.nan)
    return f"{row['segments']:.0f}" if math.isnan(tokens) else f"{tokens:.0f}{_TOKENS}"


def sum_up(sweep: Sweep, folder: Path) -> None:
    """Print one table over the jobs of a sweep, and write it and its figure into the sweep's folder."""
    show(sweep)
    write(sweep, folder)


def show(sweep: Sweep) -> None:
    """Print the table of a sweep, and why jobs failed."""
    from rich import get_console

    console = get_console()
    console.print(sweep.table())
    for job in sweep.jobs:
        if job.reason:
            console.print(f"{job.name}: {job.reason}", markup=False, emoji=False, highlight=False, soft_wrap=True)


def write(sweep: Sweep, folder: Path) -> None:
    """Write the tables of a sweep, over jobs and over means, and its figure if there is something to draw; say where.

    Raises:
        OSError: if the folder cannot be written.
    """
    from rich import get_console

    from rmt_lightning.reporting import figures, style

    for name, rows in (("sweep.csv", sweep.jobs), ("summary.csv", sweep.groups)):
        # What a row lacks is left empty; integers stay integers all the same.
        table = pd.DataFrame([row.row() for row in rows], dtype=object)
        write_atomically(folder / name, table.to_csv(index=False).encode())
    if sweep.drawable:
        style.save(figures.sweep(sweep), folder / "sweep")
    get_console().print(Text.assemble((shown(folder), "bold"), " holds all of it"), soft_wrap=True)
