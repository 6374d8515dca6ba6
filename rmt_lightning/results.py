"""What a run prints and leaves behind when it ends: two tables, their csv files and a figure."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
from matplotlib.figure import Figure
from rich import get_console
from rich.progress import track
from rich.table import Table

from rmt_lightning.analysis import figures
from rmt_lightning.analysis.extrapolation import LengthResult, LengthTest, evaluate_length
from rmt_lightning.build import Parts
from rmt_lightning.run_folder import write_atomically
from rmt_lightning.training.curriculum import SegmentCurriculum, StageResult


def report(test: LengthTest, folder: Path, trainer: L.Trainer, parts: Parts, curriculum: SegmentCurriculum) -> None:
    """Show the stages of a run, test it on longer and longer inputs, and write both into its folder.

    Args:
        test: which lengths, and how many samples of each.
    """
    console = get_console()
    if curriculum.results:
        console.print(_stage_table(curriculum.results, curriculum.lengths))
        write_csv(folder / "stages.csv", [asdict(stage) for stage in curriculum.results])
    lengths = _test(test, trainer, parts)
    console.print(length_table(lengths, parts.classifier.model.text_length))
    write_csv(folder / "evaluation.csv", [{"segments": result.segments, **result.row()} for result in lengths])
    task = parts.data.placement.task
    trained_to = curriculum.results[-1].stage if curriculum.results else parts.data.num_segments
    figure = figures.curriculum(curriculum.history, lengths, trained_to, 1 / len(task.answers), f"task={task.name}")
    figure.savefig(folder / "curriculum.png", dpi=150)
    holds = f"[bold]{os.path.relpath(folder)}[/] holds {', '.join(sorted(_contents(folder)))}"
    console.print(holds, highlight=False, soft_wrap=True)


def _test(test: LengthTest, trainer: L.Trainer, parts: Parts) -> list[LengthResult]:
    device = trainer.strategy.root_device
    classifier = parts.classifier.to(device).eval()
    batch_size = 2 * parts.data.batch_size
    hidden = not get_console().is_terminal
    with trainer.precision_plugin.forward_context():
        return [
            evaluate_length(classifier, parts.data, num_segments, test.samples, batch_size, device, classifier.answers)
            for num_segments in track(test.segments, "testing", transient=True, console=get_console(), disable=hidden)
        ]


def _stage_table(stages: Sequence[StageResult], lengths: str) -> Table:
    table = Table("stage", "segments", "steps", "seconds", "accuracy", title="Curriculum", title_justify="left")
    for result in stages:
        segments = str(result.stage) if lengths == "exact" or result.stage == 1 else f"1–{result.stage}"
        accuracy = f"{result.accuracy:.4f}" + ("" if result.converged else " (not converged)")
        table.add_row(str(result.stage), segments, str(result.steps), f"{result.seconds:.1f}", accuracy)
    return table


def length_table(lengths: Sequence[LengthResult], text_length: int) -> Table:
    """Accuracy at each length, for the screen."""
    title = f"Test on unseen text, {lengths[0].samples} samples each"
    table = Table("segments", "tokens of text", "accuracy", "95% interval", title=title, title_justify="left")
    for result in lengths:
        low, high = result.interval
        tokens = f"{result.segments * text_length:,}"
        table.add_row(str(result.segments), tokens, f"{result.accuracy:.4f}", f"{low:.3f} – {high:.3f}")
    return table


def _contents(folder: Path) -> list[str]:
    return [path.name + "/" * path.is_dir() for path in folder.iterdir() if not path.name.startswith(".")]


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows of equal keys, whole or not at all."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue().encode())


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a csv file."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_figure(stem: Path, figure: Figure) -> None:
    """Write a figure as <stem>.png and <stem>.pdf, each whole or not at all."""
    for kind in ("png", "pdf"):
        picture = io.BytesIO()
        figure.savefig(picture, format=kind, dpi=150)
        write_atomically(stem.with_name(f"{stem.name}.{kind}"), picture.getbuffer())
