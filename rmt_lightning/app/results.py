"""What a run prints and leaves behind when it ends: tables and pictures."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from rich.table import Table
from rich.text import Text

from rmt_lightning.analysis.attention import AttentionMap, choose_sample, watch
from rmt_lightning.analysis.extrapolation import LengthResult
from rmt_lightning.app.console import show
from rmt_lightning.core.files import write_atomically
from rmt_lightning.core.quoting import shown
from rmt_lightning.core.statistics import kept
from rmt_lightning.models.backbone import SPARSE
from rmt_lightning.models.memory import MemoryTokens
from rmt_lightning.models.segment_model import SegmentModel
from rmt_lightning.reporting import figures, style
from rmt_lightning.tasks.facts import Split
from rmt_lightning.tasks.placement import Key, Placement, Sample
from rmt_lightning.tasks.published import Part
from rmt_lightning.training.answering import FactModule
from rmt_lightning.training.phases.phase import Phase

log = logging.getLogger(__name__)

# Of longer tables some rows are shown, evenly spread; the csv file has all of them.
_SHOWN = 8
# Segments of the longest inputs of RMT-2023, figure 1, by which a rate of loss is told.
_LONG = 4096
# What a length is called that no file of a set names, and the tasks of which BABILong publishes the mean.
_ANY = "any"
_FIRST = ["qa1", "qa2", "qa3", "qa4", "qa5"]


def watch_clearest(
    placement: Placement,
    module: FactModule,
    model: MemoryTokens[Any],
    num_segments: int,
    device: torch.device,
    layer: int | Literal["mean"] = "mean",
    head: int | Literal["mean"] = "mean",
) -> tuple[Sample, str, list[AttentionMap]]:
    """Let a trained model read the test sample that shows best what memory does.

    Args:
        placement: where the sample comes from.
        module: what answers, on `device` and in evaluation mode.
        model: that of `module`.
        num_segments: how long the sample is.
        device: where segments are wanted.
        layer: counted from 1, or the mean over all of them.
        head: likewise.

    Returns:
        The sample; the question, what is answered and whether that is right; the attention in each segment.

    Raises:
        UserError: if there is no such layer or head, or attention is sparse.
    """
    sample = placement.sample("test", Key(num_segments, choose_sample(placement, num_segments)))
    scores, maps = watch(module, model, placement.tokenizer, sample, device, layer, head)
    assert sample.example is not None, "only mere noise has none"
    # One that writes may have written something else.
    answer = dict(enumerate(module.answers)).get(int(scores.argmax()), "none of the answers")
    right = sample.example.answer
    title = f"{sample.example.question} → {answer} " + ("(right)" if answer == right else f"(wrong: {right})")
    return sample, title, maps


def draw_attention(placement: Placement, module: FactModule, device: torch.device, folder: Path) -> None:
    """Draw what memory attends to into a run folder, if the model has memory tokens and whole maps."""
    model = module.model
    if not isinstance(model, MemoryTokens) or model.memory_size == 0:
        return
    if model.architecture is not None and model.architecture.model_type in SPARSE:
        return
    if not placement.fits("test", Key(4, 0)):
        return
    module.to(device).eval()
    _, title, maps = watch_clearest(placement, module, model, 4, device)
    write_atomically(folder / "attention" / "last.png", style.rendered(figures.attention(maps, title)))


def phase_table(phase: Phase) -> Table | None:
    """What a phase has found, for the screen; None if that is nothing."""
    rows = phase.rows()
    if not rows:
        return None
    places = sorted({round((len(rows) - 1) * part / (_SHOWN - 1)) for part in range(_SHOWN)})
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    # Screens are narrow, and a csv file may count the same by two names.
    before = [[*columns.values()][:place] for place in range(len(columns))]
    names = [n for n, others in zip(columns, before, strict=True) if len({*columns[n]}) < 2 or columns[n] not in others]
    # Nor room for what is seldom known.
    names = [name for name in names if 2 * columns[name].count(None) < len(rows)]
    table = Table(*(name.replace("_", " ") for name in names), title=phase.title, title_justify="left")
    for row in rows if len(rows) <= _SHOWN else [rows[place] for place in places]:
        table.add_row(*(_cell(row[name]) for name in names))
    return table


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, float):
        return str(value)
    return f"{value:#,.4g}" if abs(value) >= 0.1 or value == 0 else f"{value:.2g}"


def length_table(found: Mapping[Key, LengthResult], asked: Sequence[Key], model: SegmentModel[Any]) -> Table:
    """Accuracy at each length that was asked for, for the screen."""
    lengths = [*found.values()]
    fewest, most = (choose(result.samples for result in lengths) for choose in (min, max))
    samples = f"{most} samples each" if fewest == most else f"{fewest} to {most} samples"
    title = f"Test on unseen text, {samples}"
    # Nearly always all questions fit, and screens are narrow.
    limit = model.max_segments
    sizes = {like: like.num_segments or (like.tokens or 0) / model.text_length for like in asked}
    short = [like for like in asked if like not in found and (limit is None or sizes[like] <= limit)]
    partial = any(result.fits is not None and result.fits < 1 for result in lengths) or bool(short)
    written: tuple[str, ...] = ("exact", "F1") if any(result.exact is not None for result in lengths) else ()
    written += ("pairs held",) if any(result.capacity is not None for result in lengths) else ()
    headings = ("segments", "tokens", "accuracy", "95% interval", *written, "questions", *["fits"] * partial)
    table = Table(*headings, title=title, title_justify="left")
    for like in asked:
        size = (str(like.num_segments), f"{like.num_segments * model.text_length:,}")
        if like.tokens is not None:
            size = (str(found[like].segments) if like in found else "–", f"{like.tokens:,}")
        if result := found.get(like):
            low, high = result.interval
            questions = "–" if result.questions is None else f"{result.questions:,}"
            fits = "–" if result.fits is None else f"{result.fits:.1%}"
            more = {"exact": result.exact, "F1": result.f1, "pairs held": result.capacity}
            shown_more = ("–" if more[name] is None else f"{more[name]:.3f}" for name in written)
            told = (f"{result.accuracy:.4f}", f"{low:.3f} – {high:.3f}", *shown_more, questions, fits)
        elif like in short:
            told = ("too short", "no question fits", *["–"] * len(written), "0", "0.0%")
        else:
            told = ("too long for positions", f"{limit} segments fit", *["–"] * len(written), "–", "–")
        table.add_row(*(*size, *told)[: len(headings)])
    return table


def rate_in_words(row: dict[str, Any] | None) -> str:
    """How many memories are lost, and how many that leaves, in a sentence; row as of `Findings.retention`."""
    if row is None:
        return "No memories were followed: no question has all its facts told before it is asked"
    return (
        f"Memory lost per segment: {row['rate']:.2g}, 95% interval {row['rate_low']:.2g} – {row['rate_high']:.2g} "
        f"({row['lost']} memories lost in {row['exposure']:,} segments; {row['streams']} were followed"
        + (f", {row['questions']} different questions)" if row["questions"] is not None else ")")
        + f". At the upper end {kept(row['rate_high'], _LONG):.1%} of them are left after {_LONG:,} segments"
    )


def probe_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """How probes were answered, for the screen; rows as in probes.csv."""
    fewest, most = (choose(row["samples"] for row in rows) for choose in (min, max))
    samples = f"{most} samples each" if fewest == most else f"{fewest} to {most} samples"
    # Screens are narrow.
    headings = {"accuracy": "right", "decoy": "decoy", "last_place": "last place", "commonest_place": "commonest"}
    table = Table("probe", "segments", *headings.values(), title=f"What has been learnt, {samples}")
    table.title_justify = table.caption_justify = "left"
    table.caption = (
        "decoy: another place of the facts is answered. last place, commonest: who is right without a model, saying "
        "the place that the input names last, or most often"
    )
    for row in rows:
        shares = (row[name] if name == "accuracy" else row[name] / row["samples"] for name in headings)
        table.add_row(row["probe"], str(row["segments"]), *(f"{share:.1%}" for share in shares))
    return table


def leaderboard(model: str, parts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Accuracy in percent as BABILong publishes it (booydar/babilong, collect_results.py): a column for each length.

    Args:
        model: its name.
        parts: rows as in set.csv.

    Returns:
        A row for each task, and one for their mean, where none is missing.
    """
    found = {(part["task"], part["length"] or _ANY): 100 * part["accuracy"] for part in parts}
    tasks = sorted({task for task, _ in found}, key=lambda task: Part(task, "").order)
    lengths = dict.fromkeys(length for _, length in found)
    means = {"avg": tasks} | ({"avg qa1-5": _FIRST} if len(tasks) > len(_FIRST) and {*_FIRST} <= {*tasks} else {})
    rows = [{"task": task} | {length: found.get((task, length)) for length in lengths} for task in tasks]
    for name, some in means.items() if tasks else ():
        columns = {length: [found.get((task, length)) for task in some] for length in lengths}
        rows.append({"task": name} | {length: _mean(values) for length, values in columns.items()})
    return [{"model_name": model} | row for row in rows]


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def leaderboard_table(parts: Sequence[Mapping[str, Any]]) -> Table:
    """The same for the screen, a row for each length."""
    rows = leaderboard("", parts)
    tasks = (row["task"] for row in rows)
    table = Table("length", *tasks, title="Accuracy (%)", title_justify="left")
    for length in list(rows[0])[2:]:
        table.add_row(length, *("–" if row[length] is None else f"{row[length]:.1f}" for row in rows))
    return table


def tell_limit(placement: Placement, key: str, split: Split, samples: int | None, lengths: Sequence[Key]) -> None:
    """Say so if fewer samples are asked than the setting `key` wants, because there is an end of questions."""
    there = max(placement.asked(split, samples, like) for like in lengths)
    if samples is not None and there < samples:
        log.info("%s=%d: there are %d questions for %s, and each is asked once", key, samples, there, split)


def tell_folder(folder: Path, files: str | None = None) -> None:
    """Say where everything is: some files of a folder, or all that it holds."""
    names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir() if not path.name.startswith("."))
    # No markup, which the folder's name may look like.
    told = Text.assemble((shown(folder), "bold"), f" holds {files or ', '.join(names)}")
    show(told)
