"""What the plot door draws."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import isnan
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf
from rich import get_console
from rich.markup import escape
from rich.table import Table

from rmt_lightning.app.console import show, start_logging
from rmt_lightning.app.schema import check_parts, instantiate
from rmt_lightning.app.trust import check_saved
from rmt_lightning.core.errors import UserError
from rmt_lightning.core.files import write_atomically
from rmt_lightning.core.quoting import one_line, shown
from rmt_lightning.reporting import curves, figures, style
from rmt_lightning.reporting.curves import Group, PlacesOf
from rmt_lightning.reporting.reading import read_tests
from rmt_lightning.reporting.runs import Tested
from rmt_lightning.reporting.style import Curve
from rmt_lightning.reporting.sweeps import PAIRS, Sweep, find_sweeps, read_sweep

log = logging.getLogger(__name__)

# What a kind needs that no run has.
_MISSING = {
    "length": "no run has been tested yet; evaluate one, or let it come to its end",
    "curriculum": "no run has ended a stage; give run folders, or train one further",
    "retention": "of no run memories have been followed; evaluate one, without follow=0",
    "capacity": "no run tells pairs; give some of task=key_value, remember, rewrite or mqar",
}


def plot(config: DictConfig, output: Path) -> None:
    """Draw the figure, write it, and say what stands behind each curve.

    Raises:
        UserError: if there is nothing to draw, or it cannot be written.
    """
    start_logging(None, first_process=True)
    places = [config.runs] if isinstance(config.runs, str) else [*config.runs]
    places = [os.path.expanduser(place) for place in places]
    with style.styled(config.style, config.width):
        figure = _of_sweep(places) if config.kind == "sweep" else _of_runs(places, config.kind)
        content = style.rendered(figure, output.suffix[1:])  # type: ignore[arg-type]
    try:
        write_atomically(output, content)
    except OSError as error:
        raise UserError(f"output={output}: cannot be written ({error.strerror}); choose another place") from None
    get_console().print(f"{shown(output)} shows kind={config.kind}", soft_wrap=True, markup=False, highlight=False)


def _of_sweep(places: Sequence[str]) -> Figure:
    folders = find_sweeps(places)
    if len(folders) != 1:
        told = ", ".join(map(shown, folders)) or "no sweep"
        raise UserError(f"runs={','.join(places)}: holds {told}; kind=sweep draws one, so give its folder")
    sweep = with_chances(read_sweep(folders[0]))
    if not sweep.drawable:
        raise UserError(f"runs={','.join(places)}: no job of the sweep has a result yet; let it go on")
    show(sweep.table())
    return figures.sweep(sweep)


def _of_runs(places: Sequence[str], kind: str) -> Figure:
    found, skipped = read_tests(places)
    for line in (*skipped, *(f"{tested.run.name}/{problem}" for tested in found for problem in tested.run.problems)):
        log.warning("skipped %s", one_line(line))
    if not found:
        raise UserError(f"runs={','.join(places)}: no run could be read; give run folders, or some that hold them")
    axis = "text_tokens" if curves.in_tokens(found) else "segments"
    places_of: PlacesOf = {
        "length": curves.accuracy(axis), "curriculum": curves.mastered, "retention": curves.kept,
        "capacity": curves.pairs,
    }[kind]  # fmt: skip
    shows = [tested for tested in found if places_of(tested)]
    for tested in found:
        if tested not in shows:
            log.warning("left out %s, which has nothing to show for kind=%s", one_line(tested.run.name), kind)
    if not shows:
        raise UserError(f"runs={','.join(places)}: {_MISSING[kind]}")
    groups = curves.groups(shows, [PAIRS] if kind == "capacity" else [])
    drawn = [group.curve(places_of) for group in groups]
    _tell(groups, drawn, places_of)
    chances = _chances(tested.config.get("task") for tested in shows) if kind != "capacity" else []
    if kind == "capacity":
        return figures.capacity(drawn)
    if kind == "retention":
        return figures.retention(drawn, chances)
    if kind == "length":
        return _lengths(groups, drawn, axis, chances)
    history = curves.history(shows[0])
    if len(shows) == 1 and history and shows[0].tests:
        return _curriculum(shows[0], history, chances)
    return figures.stages([group.curve(curves.steps) for group in groups], drawn, chances)


def _lengths(groups: Sequence[Group], drawn: Sequence[Curve], axis: str, chances: Sequence[float]) -> Figure:
    memory = [curve for group in groups if (curve := group.curve(curves.megabytes(axis))).places]
    members = [member for group in groups for member in group.members]
    trained = {curves.trained_to(member) for member in members}
    in_segments = axis == "segments" and len(trained) == 1
    names = {"segments": "segments of the input", "text_tokens": "tokens of text"}
    return figures.lengths(drawn, memory, chances, trained.pop() if in_segments else None, names[axis])


def _curriculum(tested: Tested, history: Sequence[tuple[int, int, float]], chances: Sequence[float]) -> Figure:
    """The picture that a run draws of itself."""
    tests = sorted(curves.accuracy("segments")(tested).values())
    grown, samples = (curves.at(tested.config, key) for key in ("curriculum.grow", "data.validation_samples"))
    return figures.curriculum(
        history, tests, tested.run.reached, chances[0] if chances else None, tested.run.name,
        "stages" if grown == "pairs" else "segments", samples,
    )  # fmt: skip


def with_chances(sweep: Sweep) -> Sweep:
    """A sweep with the accuracies of guessing, if it is about accuracy."""
    tasks = [job.run.config.get("task") for job in sweep.jobs if job.run and job.scores]
    return replace(sweep, chances=_chances(tasks)) if sweep.of_accuracy else sweep


def _chances(tasks: Iterable[Any]) -> list[float]:
    """Accuracies of guessing, of those tasks that can be made here and have an end of answers."""
    different = {repr(task): task for task in tasks}
    return [chance for task in different.values() if (chance := _chance(task))]


def _chance(task: Any) -> float | None:
    config = OmegaConf.create({"task": task})
    try:
        # It comes from a run folder, which may come from anybody.
        check_saved(OmegaConf.to_container(config), Path("task"), None)
        check_parts(config, ["task"])
        answers = getattr(instantiate(config.task, _convert_="all"), "answers", ())
    except Exception as error:  # whatever is wrong with it, or with the files it names
        log.warning("no line for chance: the task cannot be made here (%.150s)", one_line(str(error)))
        return None
    return 1 / len(answers) if answers else None


def _tell(groups: Sequence[Group], drawn: Sequence[Curve], places_of: PlacesOf) -> None:
    """Which runs stand behind each curve, and where it ends."""
    table = Table("curve", "runs", "seeds", "ends at", "value", "95% interval")
    for group, curve in zip(groups, drawn, strict=True):
        known = [set(places_of(member)) for member in group.members]
        if set.union(*known) != set.intersection(*known):
            log.warning(
                "%s: where not all of its runs were tested, it is of those that were", curve.label or "the curve"
            )
        runs = ", ".join(member.run.name for member in group.members)
        seeds = ", ".join(str(member.config.get("seed", "–")) for member in group.members)
        x, y, *ends = curve.places[-1]
        between = "–" if isnan(ends[0]) else " – ".join(f"{end:.3g}" for end in ends)
        table.add_row(escape(curve.label or "–"), escape(runs), seeds, f"{x:,.0f}", f"{y:.3g}", between)
    show(table)
