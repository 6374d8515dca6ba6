"""Front door: `python -m rmt_lightning.evaluate checkpoint=<run folder or checkpoint> segments=[1,64,4096]`.

Results go to <run folder>/evaluations/<checkpoint>-<task>-<key>/, where the key stands for all settings and the content
of the checkpoint: evaluation.csv has a row for each length, distances.csv one for each length and distance from fact to
question, retention.csv one for each time that memories were asked on their way, evaluation.json all of them and the
settings. They are written after each length. With stages=true, each
stage's checkpoint is tested so, and stages-<task>-<key>/ holds them side by side.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge
from omegaconf import DictConfig

from rmt_lightning.app.hydra_errors import front_door
from rmt_lightning.app.resume import provenance, trained_config
from rmt_lightning.app.schema import check
from rmt_lightning.core.errors import UserError
from rmt_lightning.core.files import write_atomically, write_csv
from rmt_lightning.core.run_folder import CHECKPOINTS, findings, locate_checkpoint

# What follows takes seconds to import; --help and spelling mistakes should not have to wait for it.
if TYPE_CHECKING:
    import torch

    from rmt_lightning.analysis.extrapolation import LengthResult
    from rmt_lightning.tasks.placement import Placement
    from rmt_lightning.training.answering import FactClassifier, FactModule


@dataclass(frozen=True)
class Root:
    """The settings of conf/evaluate.yaml that belong to no group."""

    checkpoint: str
    stages: bool
    segments: list[Annotated[int, Ge(1)]]
    samples: Annotated[int, Ge(1)]
    follow: Annotated[int, Ge(0)]
    every: Annotated[int, Ge(1)]
    batch_size: Annotated[int, Ge(1)] | Literal["auto"]
    device: Literal["auto", "cpu", "cuda"]
    cache_dir: str


def main(config: DictConfig) -> None:
    check(config, Root)
    if not config.segments:
        raise UserError("segments=[]: names no length; give some, such as [1,64,4096]")
    if 0 < config.follow < config.every:
        raise UserError(
            f"every={config.every}: asks nothing in follow={config.follow} segments; give less, or follow=0"
        )
    run, checkpoint = locate_checkpoint(config.checkpoint)
    if config.stages:
        evaluate_stages(config, trained_config(run, config), run)
    else:
        evaluate(config, trained_config(run, config), run, checkpoint)


def evaluate_stages(config: DictConfig, run_config: DictConfig, run: Path) -> None:
    """Test the checkpoint of each stage, and draw how far it generalises (RMT-2023, figure 5)."""
    from hydra.utils import instantiate
    from rich import get_console

    from rmt_lightning.reporting import figures

    checkpoints = {int(path.stem.removeprefix("stage-")): path for path in (run / CHECKPOINTS).glob("stage-*.ckpt")}
    if not checkpoints:
        raise UserError(f"checkpoint={config.checkpoint}: the run has passed no stage yet; train it further")
    config.follow = 0
    rows = []
    for stage in sorted(checkpoints):
        get_console().print(f"stage {stage}", highlight=False)
        folder, results = evaluate(config, run_config, run, checkpoints[stage])
        rows += [{"stage": stage, "segments": result.segments, **result.row()} for result in results]
    # The last folder's name tells the task and the settings.
    folder = folder.with_name(folder.name.replace(checkpoints[stage].stem, "stages", 1))
    write_csv(folder / "results.csv", rows)
    chance = 1 / len(instantiate(run_config.task).answers)
    figures.save(figures.generalization(rows, chance), folder / "figure")
    get_console().print(f"[bold]{os.path.relpath(folder)}[/] holds them all", highlight=False, soft_wrap=True)


def evaluate(
    config: DictConfig, run_config: DictConfig, run: Path, checkpoint: Path
) -> tuple[Path, list[LengthResult]]:
    """Test each length that has not been tested yet; print what has been found, and return it and where it stands."""
    from rich import get_console

    from rmt_lightning.app.build import find_device, load
    from rmt_lightning.app.console import start_logging
    from rmt_lightning.app.results import length_table
    from rmt_lightning.training.answering import FactClassifier
    from rmt_lightning.training.callbacks.hardware import keep_heap_flat

    start_logging(None, first_process=True)
    keep_heap_flat()
    device, hardware = find_device(config.device)
    placement, module = load(run_config, run, checkpoint)
    fitting = module.model.fitting("segments", config.segments)
    settings = provenance(run_config, checkpoint) | {"samples": config.samples, "device": hardware}
    folder = findings(run, "evaluations", f"{checkpoint.stem}-{placement.task.name}", settings)
    done = _read(folder)
    lengths = done["lengths"]
    followed = f"{config.follow} every {config.every}"
    # Only a head can be asked on the way, and a model that keeps the whole text has nothing to lose.
    classifier = module if isinstance(module, FactClassifier) else None
    follows = config.follow > 0 and classifier is not None and classifier.model.max_segments is None
    if follows and classifier and followed not in done["retention"]:
        done["retention"][followed] = _follow(classifier, placement, config, device)
        _write(folder, settings, done)
    for num_segments in fitting:
        if str(num_segments) not in lengths:
            lengths[str(num_segments)] = _test(module, placement, num_segments, config, device)
            _write(folder, settings, done)
    console = get_console()
    if follows:
        console.print(_rate_in_words(done["retention"][followed]), highlight=False)
    found = [_result(lengths[str(num_segments)]) for num_segments in fitting]
    console.print(length_table(found, config.segments, module.model))
    console.print(f"[bold]{os.path.relpath(folder)}[/] holds {', '.join(_FILES)}", highlight=False, soft_wrap=True)
    return folder, found


_FILES = ("evaluation.csv", "distances.csv", "retention.csv", "evaluation.json")


def _test(
    module: FactModule, placement: Placement, num_segments: int, config: DictConfig, device: torch.device
) -> dict[str, Any]:
    """Test one length, with smaller batches if they do not fit, and put what was found and measured into a row."""
    import torch

    from rmt_lightning.training.callbacks.hardware import host_memory

    on_gpu = device.type == "cuda"
    batch_size = min(config.samples, 256 if config.batch_size == "auto" else config.batch_size)
    while True:
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        began = time.perf_counter()
        try:
            result = _test_in_batches(module, placement, num_segments, config.samples, batch_size, device)
            break
        except torch.cuda.OutOfMemoryError:
            if config.batch_size != "auto" or batch_size == 1:
                raise UserError(f"batch_size={batch_size}: does not fit into the GPU's memory; give less") from None
            batch_size //= 2
    seconds = time.perf_counter() - began
    text_tokens = num_segments * module.model.text_length
    return {
        "segments": num_segments,
        "text_tokens": text_tokens,
        **result.row(),
        "batch_size": batch_size,
        "seconds": seconds,
        "tokens_per_second": config.samples * text_tokens / seconds,
        "host_memory_mb": host_memory(),
        "device_memory_mb": torch.cuda.max_memory_allocated(device) / 1e6 if on_gpu else 0.0,
        "distances": {distance: part.row() for distance, part in result.distances.items()},
    }


def _test_in_batches(
    module: FactModule, placement: Placement, num_segments: int, samples: int, batch_size: int, device: torch.device
) -> LengthResult:
    """Test one length behind a live bar."""
    from rmt_lightning.analysis.extrapolation import evaluate_length

    module.to(device).eval()
    total = -(-samples // batch_size) * num_segments
    with _bar(f"{num_segments} segments", total, batch_size) as advance, _autocast(device):
        return evaluate_length(module, placement, num_segments, samples, batch_size, device, advance)


def _follow(
    classifier: FactClassifier, placement: Placement, config: DictConfig, device: torch.device
) -> dict[str, Any]:
    """Measure the rate at which memory is lost, and put what was found into a row."""
    from rmt_lightning.analysis.retention import follow

    classifier = classifier.to(device).eval()
    streams = 64 if config.batch_size == "auto" else config.batch_size
    with _bar(f"following {streams} memories", config.follow, streams) as advance, _autocast(device):
        found = follow(
            classifier.model, lambda end, answer: classifier.judge(end, answer).right, placement,
            config.follow, config.every, streams, device, advance,
        )  # fmt: skip
    return {"streams": found.streams, "written": found.written, **found.row(), "right": found.right}


def _rate_in_words(row: dict[str, Any]) -> str:
    return (
        f"Memory lost per segment: {row['rate']:.2g}, 95% interval {row['rate_low']:.2g} – {row['rate_high']:.2g} "
        f"({row['lost']} memories lost in {row['exposure']:,} segments)"
    )


def _autocast(device: torch.device) -> AbstractContextManager[Any]:
    import torch

    return torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda")


@contextmanager
def _bar(description: str, total: int, streams: int) -> Iterator[Callable[[], None]]:
    """A live bar with segments a second and the time that is left; yields what is to be called after each segment."""
    from rich import get_console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(),
        TextColumn("{task.fields[speed]:,.0f} segments/s ·"), TimeRemainingColumn(),
        console=get_console(), transient=True, disable=not get_console().is_terminal,
    )  # fmt: skip
    task = bar.add_task(description, total=total, speed=0.0)
    with bar:
        yield lambda: bar.update(task, advance=1, speed=(bar.tasks[0].speed or 0.0) * streams)


def _result(row: dict[str, Any]) -> LengthResult:
    from rmt_lightning.analysis.extrapolation import LengthResult

    return LengthResult(row["right"], row["samples"], row["segments"])


def _read(folder: Path) -> dict[str, dict[str, Any]]:
    """What an earlier, interrupted evaluation with the same settings has found."""
    path = folder / "evaluation.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    return {part: found.get(part, {}) for part in ("lengths", "retention")}


def _write(folder: Path, settings: dict[str, Any], done: dict[str, dict[str, Any]]) -> None:
    write_atomically(folder / "evaluation.json", json.dumps({"settings": settings, **done}, indent=2).encode())
    asked = [
        {"age": age, "right": right, "streams": row["streams"]}
        for row in done["retention"].values()
        for age, right in row["right"].items()
    ]
    lengths = done["lengths"].values()
    write_csv(folder / "retention.csv", asked)
    write_csv(folder / "evaluation.csv", [{k: v for k, v in row.items() if k != "distances"} for row in lengths])
    distances = [
        {"segments": row["segments"], "from": 2 ** int(key) // 2, "to": 2 ** int(key) - 1, **part}
        for row in lengths
        for key, part in row["distances"].items()
    ]
    write_csv(folder / "distances.csv", distances)


run = front_door(main, "evaluate")

if __name__ == "__main__":
    run()
