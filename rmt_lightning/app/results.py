"""What a run prints and leaves behind when it ends: tables, their csv files and a figure."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from rich import get_console
from rich.progress import track
from rich.table import Table

from rmt_lightning.analysis.attention import AttentionMap, choose_sample, watch
from rmt_lightning.analysis.extrapolation import LengthResult, LengthTest, evaluate_length
from rmt_lightning.analysis.perplexity import DocumentTest, evaluate_documents, total
from rmt_lightning.analysis.retention import LossRate
from rmt_lightning.app.build import Parts, TextParts
from rmt_lightning.core.files import write_csv
from rmt_lightning.core.run_folder import EVALUATION, HOLD, STAGES
from rmt_lightning.models.backbone import SPARSE
from rmt_lightning.models.memory import MemoryTokens
from rmt_lightning.models.segment_model import SegmentModel
from rmt_lightning.reporting import figures
from rmt_lightning.tasks.placement import Key, Sample
from rmt_lightning.training.phases.curriculum import Curriculum, FixedSteps, SegmentCurriculum, StageResult
from rmt_lightning.training.phases.state_passing import Losses, StatePassing


def report(
    test: LengthTest | DocumentTest,
    folder: Path,
    trainer: L.Trainer,
    parts: Parts | TextParts,
    curriculum: Curriculum,
    hold: StatePassing | None,
) -> None:
    """Test what a run has trained, show what came of it, and write that into its folder.

    Args:
        test: what to test it on.
    """
    match parts, test, curriculum:
        case Parts(), LengthTest(), SegmentCurriculum():
            _report_facts(test, folder, trainer, parts, curriculum, hold)
        case TextParts(), DocumentTest(), FixedSteps():
            _report_text(test, folder, trainer, parts, curriculum)
    holds = f"[bold]{os.path.relpath(folder)}[/] holds {', '.join(sorted(_contents(folder)))}"
    get_console().print(holds, highlight=False, soft_wrap=True)


def _report_facts(
    test: LengthTest,
    folder: Path,
    trainer: L.Trainer,
    parts: Parts,
    curriculum: SegmentCurriculum,
    hold: StatePassing | None,
) -> None:
    """The stages, what became of old memories, and accuracy on longer and longer inputs."""
    console = get_console()
    if curriculum.results:
        console.print(_stage_table(curriculum.results, curriculum.lengths))
        write_csv(folder / STAGES, [asdict(stage) for stage in curriculum.results])
    if hold and hold.history:
        console.print(_hold_table(hold))
        write_csv(folder / HOLD, [asdict(losses) | _rate(losses).row() for losses in hold.history])
    lengths = _test_lengths(test, trainer, parts)
    console.print(length_table(lengths, test.segments, parts.classifier.model))
    write_csv(folder / EVALUATION, [{"segments": result.segments, **result.row()} for result in lengths])
    task = parts.data.placement.task
    trained_to = curriculum.results[-1].stage if curriculum.results else parts.data.num_segments
    figure = figures.curriculum(curriculum.history, lengths, trained_to, 1 / len(task.answers), f"task={task.name}")
    figure.savefig(folder / "curriculum.png", dpi=150)


def _report_text(
    test: DocumentTest, folder: Path, trainer: L.Trainer, parts: TextParts, curriculum: FixedSteps
) -> None:
    """Perplexity and bits per byte on documents that have not been seen, one by one and together."""
    device = trainer.strategy.root_device
    modeler = parts.module.to(device).eval()
    with trainer.precision_plugin.forward_context():
        scores = evaluate_documents(modeler.nats, parts.data, "test", test.documents, device)
    together = total(scores)
    write_csv(folder / "documents.csv", [{"document": number, **score.row()} for number, score in scores.items()])
    write_csv(folder / EVALUATION, [{"documents": len(scores), **together.row()}])
    table = Table("documents", "tokens", "perplexity", "bits per byte", title="Test", title_justify="left")
    shown = (f"{together.tokens:,}", f"{together.perplexity:.2f}", f"{together.bits_per_byte:.4f}")
    table.add_row(str(len(scores)), *shown)
    get_console().print(table)
    figure = figures.perplexity(curriculum.history, together.perplexity, type(modeler.model).__name__)
    figure.savefig(folder / "perplexity.png", dpi=150)


def _test_lengths(test: LengthTest, trainer: L.Trainer, parts: Parts) -> list[LengthResult]:
    device = trainer.strategy.root_device
    classifier = parts.classifier.to(device).eval()
    batch_size = 2 * parts.data.batch_size
    fitting = classifier.model.fitting("test.segments", test.segments)
    hidden = not get_console().is_terminal
    with trainer.precision_plugin.forward_context():
        return [
            evaluate_length(classifier, parts.data, num_segments, test.samples, batch_size, device, classifier.answers)
            for num_segments in track(fitting, "testing", transient=True, console=get_console(), disable=hidden)
        ]


def watch_clearest(
    parts: Parts,
    model: MemoryTokens[Any],
    num_segments: int,
    device: torch.device,
    layer: int | Literal["mean"] = "mean",
    head: int | Literal["mean"] = "mean",
) -> tuple[Sample, str, list[AttentionMap]]:
    """Let a trained model read the test sample that shows best what memory does.

    Args:
        parts: of the run, the model on `device` and in evaluation mode.
        model: that of `parts`.
        num_segments: how long the sample is.
        device: where segments are wanted.
        layer: counted from 1, or the mean over all of them.
        head: likewise.

    Returns:
        The sample; the question, what is answered and whether that is right; the attention in each segment.

    Raises:
        UserError: if there is no such layer or head, or attention is sparse.
    """
    classifier, placement = parts.classifier, parts.data.placement
    sample = placement.sample("test", Key(num_segments, choose_sample(placement, num_segments)))
    scores, maps = watch(classifier, model, parts.tokenizer, sample, device, layer, head)
    # One that writes may have written something else.
    answer = dict(enumerate(classifier.answers)).get(int(scores.argmax()), "none of the answers")
    right = placement.task.answers[sample.answer]
    assert sample.example is not None, "only mere noise has none"
    title = f"{sample.example.question} → {answer} " + ("(right)" if answer == right else f"(wrong: {right})")
    return sample, title, maps


def draw_attention(folder: Path, trainer: L.Trainer, parts: Parts | TextParts) -> None:
    """Draw what memory attends to into a run folder, if the model has memory tokens and whole maps."""
    model = parts.module.model
    if not isinstance(parts, Parts) or not isinstance(model, MemoryTokens) or model.memory_size == 0:
        return
    if model.architecture is not None and model.architecture.model_type in SPARSE:
        return
    device = trainer.strategy.root_device
    parts.classifier.to(device).eval()
    _, title, maps = watch_clearest(parts, model, 4, device)
    (folder / "attention").mkdir(exist_ok=True)
    figures.attention(maps, title).savefig(folder / "attention" / "last.png", dpi=150)


def _stage_table(stages: Sequence[StageResult], lengths: str) -> Table:
    table = Table("stage", "segments", "steps", "seconds", "accuracy", title="Curriculum", title_justify="left")
    for result in stages:
        segments = str(result.stage) if lengths == "exact" or result.stage == 1 else f"1–{result.stage}"
        accuracy = f"{result.accuracy:.4f}" + ("" if result.converged else " (not converged)")
        table.add_row(str(result.stage), segments, str(result.steps), f"{result.seconds:.1f}", accuracy)
    return table


def _rate(losses: Losses) -> LossRate:
    return LossRate(losses.lost, losses.segments)


def _hold_table(hold: StatePassing) -> Table:
    """Some of the validations of the phase, evenly spread."""
    table = Table("step", "mean age", "lost", "of segments", "rate", "95% interval", title="Memories carried over")
    table.title_justify = "left"
    shown = len(hold.history)
    for number in sorted({round((shown - 1) * part / 5) for part in range(6)}):
        losses = hold.history[number]
        low, high = _rate(losses).interval
        table.add_row(
            str(losses.step), f"{losses.age:.0f}", str(losses.lost), f"{losses.segments:,}",
            f"{_rate(losses).rate:.5f}", f"{low:.5f} – {high:.5f}",
        )  # fmt: skip
    return table


def length_table(lengths: Sequence[LengthResult], asked: Sequence[int], model: SegmentModel[Any]) -> Table:
    """Accuracy at each length that was asked for, for the screen."""
    title = f"Test on unseen text, {lengths[0].samples} samples each"
    table = Table("segments", "tokens of text", "accuracy", "95% interval", title=title, title_justify="left")
    results = {result.segments: result for result in lengths}
    for num_segments in asked:
        found = ("too long for positions", f"{model.max_segments} segments fit")
        if result := results.get(num_segments):
            low, high = result.interval
            found = (f"{result.accuracy:.4f}", f"{low:.3f} – {high:.3f}")
        table.add_row(str(num_segments), f"{num_segments * model.text_length:,}", *found)
    return table


def _contents(folder: Path) -> list[str]:
    return [path.name + "/" * path.is_dir() for path in folder.iterdir() if not path.name.startswith(".")]
