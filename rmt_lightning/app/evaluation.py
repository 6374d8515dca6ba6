"""What `evaluate` finds out about a run: accuracy at each length, the rate of loss of memory, and what is learnt."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from omegaconf import DictConfig
from rich import get_console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

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
from rmt_lightning.app.console import start_logging, take_over_lightning
from rmt_lightning.app.results import leaderboard, leaderboard_table, length_table, probe_table, tell_folder, tell_limit
from rmt_lightning.app.resume import other_text, provenance
from rmt_lightning.app.schema import instantiate, is_typed
from rmt_lightning.core.errors import UserError
from rmt_lightning.core.files import write_atomically, write_csv, write_jsonl
from rmt_lightning.core.quoting import shown
from rmt_lightning.core.run_folder import CHECKPOINTS, EVALUATION, PREDICTIONS, PROBES, alone_in, findings
from rmt_lightning.core.statistics import Proportion, kept
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
_SET, _LEADERBOARD = "set.csv", "leaderboard.csv"
_FILES = (
    EVALUATION, "distances.csv", "retention.csv", PROBES, _SET, _LEADERBOARD, PREDICTIONS, "evaluation.json",
)  # fmt: skip
# Lengths in segments, unless some are given.
_SEGMENTS = [2**power for power in range(13)]
# The lengths of probes, in segments, unless they are given: a hundredth of what the default lengths take.
_PROBED = (1, 8)
# What earlier versions did not tell of a length.
_UNKNOWN = ("questions", "fits", "tokens")
# Segments of the longest inputs of RMT-2023, figure 1, by which a rate of loss is told.
_LONG = 4096


def evaluate_stages(config: DictConfig, run_config: DictConfig, run: Path) -> None:
    """Test the checkpoint of each stage, and draw how far it generalizes (RMT-2023, figure 5).

    Raises:
        UserError: if no stage has been passed, or as of `evaluate`.
    """
    checkpoints = {int(path.stem.removeprefix("stage-")): path for path in (run / CHECKPOINTS).glob("stage-*.ckpt")}
    if not checkpoints:
        raise UserError(f"checkpoint={config.checkpoint}: the run has passed no stage yet; train it further")
    config.follow, config.probes = 0, [] if config.probes is None else config.probes
    found = {}
    for stage in sorted(checkpoints):
        get_console().print(f"stage {stage}", highlight=False)
        found[stage] = evaluate(config, run_config, run, checkpoints[stage])
    # The last folder's name tells the task and the settings.
    last = found[stage].path.parent
    folder = last.with_name(last.name.replace(checkpoints[stage].stem, "stages", 1))
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


def evaluate(config: DictConfig, run_config: DictConfig, run: Path, checkpoint: Path) -> _Found:
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
    found = _Found(folder, settings)
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
    for like in fitting:
        # Another evaluation may have come to it first.
        if _filed(like) not in found.read().lengths:
            row, predictions = _test(module, placement, like, config, device)
            found.predict(name_of(like), predictions)
            found.add("lengths", _filed(like), row)
    probe_rows = _ask(module, probed, found, config, device)
    console = get_console()
    if follows:
        console.print(_rate_in_words(found.retention.get(followed)), highlight=False)
    console.print(length_table(found.results(), asked, module.model))
    if probe_rows:
        console.print(probe_table(probe_rows))
    files = ", ".join(name for name in _FILES if (folder / name).exists())
    tell_folder(folder, files)
    return found


def evaluate_set(config: DictConfig, run_config: DictConfig, run: Path, checkpoint: Path) -> _Found:
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
    found = _Found(folder, settings | {"device": hardware, "model_name": run.name})
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
    get_console().print(leaderboard_table(rows))
    tell_folder(folder, ", ".join(name for name in _FILES if (folder / name).exists()))
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
        with _bar(str(part), len(targets), 1) as advance:
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


class _Found:
    """What has been found with the same settings, by this evaluation and by those before it and beside it.

    evaluation.json holds all of it, and each table is made of that.

    Args:
        folder: where it is written.
        settings: all that it depends on and that is in no key.

    Attributes:
        lengths: a row for each number of segments, in their order, then for each "<number> tokens".
        retention: a row for each way in which memories were followed: "<segments> every <segments> of <memories>".
        probes: a row for each "<segments> <probe>", in the order of lengths.
        parts: a row for each "<task> <length>" of a published set.

    Raises:
        UserError: if the folder cannot be written to, or what stands there is damaged.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.path = folder / "evaluation.json"
        self.settings = settings
        self.lengths: dict[str, dict[str, Any]] = {}
        self.retention: dict[str, dict[str, Any]] = {}
        self.probes: dict[str, dict[str, Any]] = {}
        self.parts: dict[str, dict[str, Any]] = {}
        # An evaluation that was killed may have left the file without its tables.
        with alone_in(folder):
            if self.read().lengths or self.retention or self.probes or self.parts:
                self._write()

    def add(self, kind: Literal["lengths", "retention", "probes", "parts"], key: str, row: dict[str, Any]) -> None:
        """Add a row to what others may have found in the meantime."""
        with self._alone():
            getattr(self.read(), kind)[key] = row
            self._write()

    def predict(self, length: str, rows: list[dict[str, Any]]) -> None:
        """Add the answers that were given at a length to those at others."""
        path = self.path.with_name(PREDICTIONS)
        with self._alone():
            try:
                lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
                others = [row for row in map(json.loads, lines) if row["length"] != length]
            except (ValueError, TypeError, KeyError):
                raise UserError(f"{shown(path)}: is damaged; remove it, and go on without its answers") from None
            write_jsonl(path, [*others, *rows])

    def _alone(self) -> AbstractContextManager[None]:
        if not (folder := self.path.parent).is_dir():
            raise UserError(f"{shown(folder)}: was removed or renamed in the meantime; start it again")
        return alone_in(folder)

    def read(self) -> _Found:
        try:
            found = json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else {}
            # Earlier versions left the memories out of the key, and did not count different questions.
            unknown = {"questions": None}
            self.retention = {
                key if " of " in key else f"{key} of {row['streams']}": unknown | row
                for key, row in found.get("retention", {}).items()
            }
            rows = found.get("lengths", {}).items()
            self.lengths = {key: row | {k: None for k in _UNKNOWN if k not in row} for key, row in rows}
            self.probes = {key: dict(row) for key, row in found.get("probes", {}).items()}
            self.parts = {key: dict(row) for key, row in found.get("parts", {}).items()}
            # Whether all can be made of it that is.
            self._sort()
            _ = self._tables(), [one.row() for one in self.results().values()]
            _ = self.probes and probe_table([*self.probes.values()])
            _ = self.parts and leaderboard_table([*self.parts.values()])
            _ = [_rate_in_words(row) for row in self.retention.values()]
        except (ValueError, AttributeError, TypeError, KeyError, RecursionError, IsADirectoryError):
            raise UserError(f"{shown(self.path)}: is damaged; remove it, and it is found out again") from None
        return self

    def results(self) -> dict[Key, LengthResult]:
        """Those at all lengths."""
        counts = ("right", "samples", "segments", "questions", "fits", "tokens", "text_tokens")
        return {
            Key(row["segments"] if row["tokens"] is None else 0, 0, tokens=row["tokens"]): LengthResult(
                **{key: row[key] for key in counts},
                finite=row.get("finite", False), exact=row.get("exact_match"), f1=row.get("f1"),
                pairs=row.get("pairs"), capacity=row.get("capacity"),
            )
            for row in self.lengths.values()
        }  # fmt: skip

    def _sort(self) -> None:
        order = {key: ("tokens" in key, int(key.split()[0])) for key in self.lengths}
        self.lengths = {key: self.lengths[key] for key in sorted(self.lengths, key=order.__getitem__)}
        self.probes = dict(sorted(self.probes.items(), key=lambda item: int(item[0].split()[0])))
        parts = {Part(row["task"], row["length"]): key for key, row in self.parts.items()}
        self.parts = {parts[part]: self.parts[parts[part]] for part in sorted(parts, key=lambda part: part.order)}

    def _write(self) -> None:
        self._sort()
        found = {"lengths": self.lengths, "retention": self.retention, "probes": self.probes, "parts": self.parts}
        content = {"settings": self.settings, **found}
        write_atomically(self.path, json.dumps(content, indent=2).encode())
        for name, rows in self._tables().items():
            # Another version may have measured less.
            columns = dict.fromkeys(column for row in rows for column in row)
            write_csv(self.path.with_name(name), [columns | row for row in rows])

    def _tables(self) -> dict[str, list[dict[str, Any]]]:
        lengths = [(int(key.split()[0]), row) for key, row in self.lengths.items()]
        columns = [{k: v for k, v in row.items() if k not in ("distances", "finite")} for _, row in lengths]
        return {
            "retention.csv": [
                dict(zip(("follow", "every"), key.split()[::2], strict=False))
                | {"streams": row["streams"], "questions": row["questions"], "age": age, "right": right}
                for key, row in self.retention.items()
                for age, right in row["right"].items()
            ],
            EVALUATION: columns,
            "distances.csv": [
                {"segments": row["segments"], "tokens": row["tokens"]}
                | {"from": 2 ** int(key) // 2, "to": 2 ** int(key) - 1, **part}
                for _, row in lengths
                for key, part in row["distances"].items()
            ],
            PROBES: [*self.probes.values()],
            _SET: [{k: v for k, v in row.items() if k != "files"} for row in self.parts.values()],
            _LEADERBOARD: leaderboard(self.settings.get("model_name", ""), [*self.parts.values()]),
        }


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
        with _bar(in_words([like]), total, batch_size) as advance:
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
    module: FactModule, probed: dict[int, list[Placement]], found: _Found, config: DictConfig, device: torch.device
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
        with _bar(f"probes in {num_segments} segments", total, streams) as advance:
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
    with _bar(f"following {len(numbers)} memories", config.follow, len(numbers)) as advance, _autocast(device):
        for found in follow(  # noqa: B007
            classifier.model, lambda end, answer: classifier.judge(end, answer).right, placement, "test", numbers,
            config.follow, config.every, device,
        ):  # fmt: skip
            advance()
    counts = {"streams": found.streams, "questions": found.questions, "written": found.written}
    return {**counts, **found.row(), "right": found.right}


def _rate_in_words(row: dict[str, Any] | None) -> str:
    if row is None:
        return "No memories were followed: no question has all its facts told before it is asked"
    return (
        f"Memory lost per segment: {row['rate']:.2g}, 95% interval {row['rate_low']:.2g} – {row['rate_high']:.2g} "
        f"({row['lost']} memories lost in {row['exposure']:,} segments; {row['streams']} were followed"
        + (f", {row['questions']} different questions)" if row["questions"] is not None else ")")
        + f". At the upper end {kept(row['rate_high'], _LONG):.1%} of them are left after {_LONG:,} segments"
    )


def _autocast(device: torch.device) -> AbstractContextManager[Any]:
    return torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda")


@contextmanager
def _bar(description: str, total: int, streams: int) -> Iterator[Callable[[], None]]:
    """A live bar with segments a second and the time that is left; yields what is to be called after each segment.

    Where nobody would see it, a line says what is being done.
    """
    if not get_console().is_terminal:
        log.info("%s …", description)
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(),
        TextColumn("{task.fields[speed]:,.0f} segments/s ·"), TimeRemainingColumn(),
        console=get_console(), transient=True, disable=not get_console().is_terminal,
    )  # fmt: skip
    task = bar.add_task(description, total=total, speed=0.0)
    with bar:
        yield lambda: bar.update(task, advance=1, speed=(bar.tasks[0].speed or 0.0) * streams)
