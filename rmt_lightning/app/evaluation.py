"""What `evaluate` finds out about a run: accuracy at each length, the rate of loss of memory, and what is learnt."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from omegaconf import DictConfig
from rich import get_console

from rmt_lightning.analysis.extrapolation import (
    LengthResult,
    TooLong,
    answers_to,
    in_words,
    lengths,
    name_of,
    noted,
    overlap,
    replies,
    score_length,
)
from rmt_lightning.analysis.probing import ProbeResult, score_probe
from rmt_lightning.app.build import find_device, load, open_answering, testable, text_names
from rmt_lightning.app.console import show, start_logging, take_over_lightning
from rmt_lightning.app.findings import Findings
from rmt_lightning.app.results import (
    leaderboard_table,
    length_table,
    probe_table,
    rate_in_words,
    tell_folder,
    tell_limit,
)
from rmt_lightning.app.resume import other_text, provenance
from rmt_lightning.app.schema import instantiate, is_typed
from rmt_lightning.core.errors import UserError
from rmt_lightning.core.files import write_csv
from rmt_lightning.core.progress import bar, in_time
from rmt_lightning.core.quoting import shown
from rmt_lightning.core.run_folder import CHECKPOINTS, alone_in, findings, stages
from rmt_lightning.core.statistics import Proportion
from rmt_lightning.reporting import figures, style
from rmt_lightning.tasks.facts import Finite, Task
from rmt_lightning.tasks.placement import Key, Placement
from rmt_lightning.tasks.probes import probes
from rmt_lightning.tasks.published import Part, PublishedSet, Row, is_right
from rmt_lightning.training.answering import FactClassifier, FactModule
from rmt_lightning.training.callbacks.hardware import host_memory, make_fast
from rmt_lightning.training.retention import early, follow

log = logging.getLogger(__name__)

Result = TypeVar("Result")

# Samples side by side, unless a number is given: on GPUs as many as fit, on CPUs as many as caches hold.
_STREAMS = {"cuda": 256, "cpu": 32}
# Lengths in segments, unless some are given.
_SEGMENTS = [2**power for power in range(13)]
# The lengths of probes, in segments, unless they are given: a hundredth of what the default lengths take.
_PROBED = (1, 8)
# Seconds from which on people want to know how long they will wait.
_WORTH_TELLING = 30


def evaluate_stages(config: DictConfig, run_config: DictConfig, run: Path) -> None:
    """Test the checkpoint of each stage, and draw how far it generalizes (RMT-2023, figure 5).

    Raises:
        UserError: if no stage has been passed, or as of `evaluate`.
    """
    checkpoints = stages(run / CHECKPOINTS)
    if not checkpoints:
        raise UserError(f"checkpoint={config.checkpoint}: the run has passed no stage yet; train it further")
    config.follow, config.probes = 0, [] if config.probes is None else config.probes
    found = {}
    for stage, checkpoint in checkpoints.items():
        get_console().print(f"stage {stage}", highlight=False)
        found[stage] = evaluate(config, run_config, run, checkpoint)
    # The last folder's name tells the task and the settings.
    last = found[stage].path.parent
    folder = last.with_name(last.name.replace(checkpoint.stem, "stages", 1))
    task: Task = instantiate(run_config.task, _convert_="all")
    with alone_in(folder):
        # Read again, for others may have found more in the meantime.
        results = [(stage, result) for stage, one in found.items() for result in one.read().results().values()]
        rows = [{"stage": stage, **result.length, **result.row()} for stage, result in results]
        write_csv(folder / "results.csv", rows)
        style.save(figures.generalization(rows, chance=1 / len(task.answers)), folder / "figure")
    tell_folder(folder, "them all")


def begin() -> None:
    """Make this process ready to ask a model."""
    start_logging(None, first_process=True)
    take_over_lightning()
    make_fast()


def evaluate(config: DictConfig, run_config: DictConfig, run: Path, checkpoint: Path) -> Findings:
    """Test each length, and ask each probe, for which that has not been done; print and return what has been found.

    Raises:
        UserError: if a checkpoint cannot be opened, a length not be read, or the device is missing or too small.
    """
    begin()
    if is_typed("every") and not config.follow:
        log.info("every=%d: changes nothing, for with follow=0 no memories are followed", config.every)
    device, hardware = find_device(config.device)
    placement, module, sha256 = load(run_config, run, checkpoint)
    module.to(device).eval()
    asked = lengths("tokens", asked_segments(config), config.tokens)
    fitting = testable("", asked, module.model, placement)
    probed = _probes(module, placement, config)
    for remark in placement.remarks():
        log.info(remark)
    tell_limit(placement, "samples", "test", config.samples, fitting)
    samples = config.samples if placement.finite else placement.asked("test", config.samples, Key(1, 0))
    text = other_text(run, text_names(placement.corpora, None if "task" in config else placement.task), config)
    settings = provenance(run_config, checkpoint, sha256) | text | {"samples": samples, "device": hardware}
    if isinstance(placement.task, Finite):
        questions = repr(placement.task.questions("test"))
        settings["questions"] = hashlib.sha256(questions.encode()).hexdigest()
    folder = findings(config.output or run, "evaluations", f"{checkpoint.stem}-{placement.task.name}", settings)
    found = Findings(folder, settings)
    log.info("testing %s of %s; results go to %s", shown(checkpoint.name), shown(run), shown(folder))
    streams = 64 if config.batch_size == "auto" else config.batch_size
    followed = f"{config.follow} every {config.every} of {streams}"
    # Only a head can be asked on the way, and a model that keeps the whole text has nothing to lose.
    classifier = module if isinstance(module, FactClassifier) else None
    follows = config.follow > 0 and classifier is not None and classifier.model.max_segments is None
    if config.follow > 0 and not follows and is_typed("follow"):
        raise UserError(
            f"follow={config.follow}: only memories that a head can ask are followed, not those of answer=generate or "
            "of a model that keeps the whole text; leave it out"
        )
    if follows and classifier and followed not in found.retention:
        row = _follow(classifier, placement, config, streams, device)
        if row:
            found.add("retention", followed, row)
    work = {like: placement.asked("test", config.samples, like) * placement.longest("test", like) for like in fitting}
    for like in fitting:
        # Another evaluation may have come to it first.
        if _filed(like) not in found.read().lengths:
            row, predictions = _test(module, placement, like, config, device)
            found.predict(name_of(like), predictions)
            found.add("lengths", _filed(like), row)
            later = sum(work[other] for other in fitting if _filed(other) not in found.lengths)
            _tell(like, found.results()[like], row["seconds"], row["seconds"] * later / work[like])
    probe_rows = _ask(module, probed, found, config, device)
    console = get_console()
    if follows:
        console.print(rate_in_words(found.retention.get(followed)), highlight=False)
    show(length_table(found.results(), asked, module.model))
    if probe_rows:
        show(probe_table(probe_rows))
    tell_folder(folder, found.files)
    return found


def evaluate_set(config: DictConfig, run_config: DictConfig, run: Path, checkpoint: Path) -> Findings:
    """Ask the questions of a published set, part by part, that have not been asked; print and return what was found.

    Raises:
        UserError: if the set or the checkpoint cannot be read, or its texts are too long for the model.
    """
    begin()
    published = PublishedSet(config.set, config.tasks, config.tokens)
    device, hardware = find_device(config.device)
    module, sha256 = open_answering(run_config, run, checkpoint)
    module.to(device).eval()
    place = Path(config.set).expanduser()
    # From another folder, the same name is that of another set.
    named = str(place.resolve()) if place.exists() else config.set
    settings = {"checkpoint": checkpoint.name, "sha256": sha256, "set": named, "samples": config.samples}
    name = Path(named).name
    folder = findings(config.output or run, "evaluations", f"{checkpoint.stem}-{name}", settings | {"device": hardware})
    found = Findings(folder, settings | {"device": hardware, "model_name": run.name})
    log.info("testing %s of %s; results go to %s", shown(checkpoint.name), shown(run), shown(folder))
    for part in published.parts:
        digests = hashlib.sha256(b"".join(published.files(part).digests())).hexdigest()
        # Another evaluation may have come to it first, of files that have not changed since.
        if found.read().parts.get(str(part), {}).get("files") != digests:
            try:
                row, predictions = _ask_part(module, published, part, config, device)
            except TooLong as error:
                log.warning("%s: left out, for some of its texts are %s", part, error)
                continue
            found.predict(str(part), predictions)
            found.add("parts", str(part), row | {"files": digests})
    rows = [found.parts[str(part)] for part in published.parts if str(part) in found.parts]
    if not rows:
        raise UserError(f"{published.setting}: all of its texts are too long for this model; give tokens=… of fewer")
    show(leaderboard_table(rows))
    tell_folder(folder, found.files)
    return found


def _ask_part(
    module: FactModule, published: PublishedSet, part: Part, config: DictConfig, device: torch.device
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Ask the questions of a part, and put what was found into a row, and the answers into others."""
    targets = [row.target for row in published.rows(part)]
    if not targets:
        raise UserError(f"{published.setting}: {part} holds no question; leave it out with tasks=…")
    labels = published.labels(part, set(targets))
    targets = targets[: config.samples]
    if not module.WRITES and (strange := sum(target not in module.answers for target in targets)):
        log.info(
            "%s: %d of %d targets are none of the model's answers, and count as wrong", part, strange, len(targets)
        )
    length, began = module.model.text_length, time.perf_counter()

    def ask(batch_size: int) -> list[tuple[Row, int, str | None]]:
        rows = islice(published.rows(part), len(targets))
        replies: list[tuple[Row, int, str | None]] = []
        with bar(str(part), len(targets), unit="questions") as advance:
            for row, tokens, said in answers_to(module, module.model, rows, batch_size, device):
                # Texts may be long, and two that are alike are one question.
                replies.append((row._replace(input=hashlib.sha256(row.input.encode()).hexdigest()), tokens, said))
                advance()
        return replies

    replies, batch_size = _side_by_side(ask, len(targets), config, device)
    predictions: list[dict[str, Any]] = [
        {
            "length": str(part), "question": row.question, "target": row.target, "answer": said,
            "right": is_right(row.target, said or "", row.question, labels), "distance": None,
            "segments": -(-tokens // length), "tokens": tokens,
        }
        for row, tokens, said in replies
    ]  # fmt: skip
    right, questions = [row["right"] for row in predictions], len({row for row, _, _ in replies})
    exact, f1 = overlap([(said or "", row.target) for row, _, said in replies])
    found: dict[str, Any] = {"task": part.task, "length": part.length}
    found |= Proportion(sum(right), len(right), questions=questions, finite=True).row()
    found |= {"exact_match": exact, "f1": f1, "segments": max(row["segments"] for row in predictions)}
    found |= {"text_tokens": round(sum(row["tokens"] for row in predictions) / len(right)), "batch_size": batch_size}
    return found | {"seconds": time.perf_counter() - began}, predictions


def asked_segments(config: DictConfig) -> list[int]:
    """The lengths in segments that are asked for: without any, those of powers of two, unless some in tokens are."""
    if config.segments is not None:
        return list(config.segments)
    return [] if config.tokens else _SEGMENTS


def _filed(like: Key) -> str:
    """The key of a length in evaluation.json."""
    return name_of(like).removesuffix(" segments")


def _test(
    module: FactModule, placement: Placement, like: Key, config: DictConfig, device: torch.device
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Test one length, and put what was found and measured into a row, and the answers into others."""
    on_gpu = device.type == "cuda"
    samples, num_segments = placement.asked("test", config.samples, like), placement.longest("test", like)

    def read(batch_size: int) -> tuple[LengthResult, list[dict[str, Any]], float]:
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        began = time.perf_counter()
        total = -(-samples // batch_size) * num_segments
        predictions: list[dict[str, Any]] = []
        with bar(in_words([like]), total, batch_size) as advance:
            found = noted(replies(module, placement, like, samples, batch_size, device, advance), predictions)
            result = score_length(found, placement, like, module.WRITES)
        return result, predictions, time.perf_counter() - began

    (result, predictions, seconds), batch_size = _side_by_side(read, samples, config, device)
    row = {
        **result.length,
        **result.row(),
        "batch_size": batch_size,
        "seconds": seconds,
        "tokens_per_second": samples * (result.text_tokens or 0) / seconds,
        "host_memory_mb": host_memory(),
        "device_memory_mb": torch.cuda.max_memory_allocated(device) / 1e6 if on_gpu else 0.0,
        "finite": result.finite,
        "distances": {distance: part.row() for distance, part in result.distances.items()},
    }
    return row, predictions


def _tell(like: Key, result: LengthResult, seconds: float, later: float) -> None:
    """Tell what came of a length at once, for later ones may take long: about how many seconds."""
    low, high = result.interval
    log.info(
        "%s: %d of %d right (%.3f – %.3f) in %s%s", in_words([like]), result.right, result.samples, low, high,
        in_time(seconds), f"; {in_time(later)} for the other lengths" if later > _WORTH_TELLING else "",
    )  # fmt: skip


def _side_by_side(
    read: Callable[[int], Result], samples: int, config: DictConfig, device: torch.device
) -> tuple[Result, int]:
    """What comes of reading so many samples, and how many of them side by side: fewer if they do not fit.

    Raises:
        UserError: if a number is given, and so many do not.
    """
    batch_size = _batch_size(samples, config, device)
    while True:
        try:
            with _autocast(device):
                return read(batch_size), batch_size
        except torch.cuda.OutOfMemoryError:
            if config.batch_size != "auto" or batch_size == 1:
                raise UserError(f"batch_size={batch_size}: does not fit into the GPU's memory; give less") from None
            batch_size //= 2


def _batch_size(samples: int, config: DictConfig, device: torch.device) -> int:
    return min(samples, _STREAMS[device.type] if config.batch_size == "auto" else config.batch_size)


def _probes(module: FactModule, placement: Placement, config: DictConfig) -> dict[int, list[Placement]]:
    """Where the samples of each probe come from, by the length at which it is asked.

    Raises:
        UserError: if lengths are given and the model can read none of them, or the task has no probes.
    """
    tasks = probes(placement.task, placement.tokenizer)
    if config.probes and not tasks:
        raise UserError(
            f"probes={config.probes}: there are none for task={placement.task.name}, whose answers are no places; "
            "leave it out"
        )
    lengths = _PROBED if config.probes is None else config.probes
    rest = (placement.corpora, placement.tokenizer, placement.text_length, placement.seed)
    there = [Placement(task, *rest) for task in tasks]
    fitting = module.model.fitting("probes", lengths)
    probed = {n: [probe for probe in there if _has_room(probe, n)] for n in fitting}
    if short := [n for n in lengths if len(probed.get(n, ())) < len(there)]:
        log.info("probes: not all of them can be asked in inputs of %s segments", ", ".join(map(str, short)))
    return probed


def _has_room(probe: Placement, num_segments: int) -> bool:
    try:
        probe.example("test", Key(num_segments, 0))
    except UserError:
        return False
    return True


def _ask(
    module: FactModule, probed: dict[int, list[Placement]], found: Findings, config: DictConfig, device: torch.device
) -> list[dict[str, Any]]:
    """Ask each probe that has not been asked yet; return what has been found about all of them."""
    for num_segments, there in probed.items():
        left = [probe for probe in there if f"{num_segments} {probe.task.name}" not in found.read().probes]
        if not left:
            continue
        # A task whose questions have an end has no others beside it.
        samples = left[0].asked("test", config.samples, Key(num_segments, 0))
        streams = _batch_size(samples, config, device)
        total = len(left) * num_segments * -(-samples // streams)
        with bar(f"probes in {num_segments} segments", total, streams) as advance:
            for probe in left:
                row = {"probe": probe.task.name, "segments": num_segments}
                row |= _score(module, probe, num_segments, samples, config, device, advance).row()
                found.add("probes", f"{num_segments} {probe.task.name}", row)
    return [found.probes[f"{n} {probe.task.name}"] for n, there in probed.items() for probe in there]


def _score(
    module: FactModule,
    probe: Placement,
    num_segments: int,
    samples: int,
    config: DictConfig,
    device: torch.device,
    advance: Callable[[], None],
) -> ProbeResult:
    def read(batch_size: int) -> ProbeResult:
        like = Key(num_segments, 0)
        return score_probe(replies(module, probe, like, samples, batch_size, device, advance), probe)

    return _side_by_side(read, samples, config, device)[0]


def _follow(
    classifier: FactClassifier, placement: Placement, config: DictConfig, streams: int, device: torch.device
) -> dict[str, Any] | None:
    """Measure the rate at which memory is lost, and put what was found into a row."""
    numbers = early(placement, "test", streams)
    if not numbers:
        return None
    with bar(f"following {len(numbers)} memories", config.follow, len(numbers)) as advance, _autocast(device):
        for found in follow(  # noqa: B007
            classifier.model, lambda end, answer: classifier.judge(end, answer).right, placement, "test", numbers,
            config.follow, config.every, device,
        ):  # fmt: skip
            advance()
    counts = {"streams": found.streams, "questions": found.questions, "written": found.written}
    return {**counts, **found.row(), "right": found.right}


def _autocast(device: torch.device) -> AbstractContextManager[Any]:
    return torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda")
