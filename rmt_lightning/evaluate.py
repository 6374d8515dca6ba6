"""Front door: `python -m rmt_lightning.evaluate checkpoint=<run folder or checkpoint> segments=[1,64,4096]`.

Results go to <run folder>/evaluations/<checkpoint>-<task>-<key>/, where the key stands for all settings and the content
of the checkpoint: evaluation.csv has a row for each length, distances.csv one for each length and distance from fact to
question, evaluation.json both and the settings. They are written after each length.
"""

from __future__ import annotations

import json
import os
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge
from omegaconf import DictConfig

from rmt_lightning.config import check, front_door, provenance, trained_config
from rmt_lightning.errors import UserError
from rmt_lightning.run_folder import findings, locate_checkpoint, write_atomically

# What follows takes seconds to import; --help and spelling mistakes should not have to wait for it.
if TYPE_CHECKING:
    import torch

    from rmt_lightning.analysis.extrapolation import LengthResult
    from rmt_lightning.build import Parts


@dataclass(frozen=True)
class Root:
    """The settings of conf/evaluate.yaml that belong to no group."""

    checkpoint: str
    segments: list[Annotated[int, Ge(1)]]
    samples: Annotated[int, Ge(1)]
    batch_size: Annotated[int, Ge(1)] | Literal["auto"]
    device: Literal["auto", "cpu", "cuda"]
    cache_dir: str


def main(config: DictConfig) -> None:
    check(config, Root)
    if not config.segments:
        raise UserError("segments=[]: names no length; give some, such as [1,64,4096]")
    run, checkpoint = locate_checkpoint(config.checkpoint)
    evaluate(config, trained_config(run, config), run, checkpoint)


def evaluate(config: DictConfig, run_config: DictConfig, run: Path, checkpoint: Path) -> None:
    """Test each length that has not been tested yet; print and write what has been found."""
    from rich import get_console

    from rmt_lightning.build import find_device, load
    from rmt_lightning.console import start_logging
    from rmt_lightning.results import length_table

    start_logging(None, first_process=True)
    device, hardware = find_device(config.device)
    parts = load(run_config, run, checkpoint)
    settings = provenance(run_config, checkpoint) | {"samples": config.samples, "device": hardware}
    folder = findings(run, "evaluations", f"{checkpoint.stem}-{parts.data.placement.task.name}", settings)
    done = _read(folder)
    for num_segments in config.segments:
        if str(num_segments) not in done:
            done[str(num_segments)] = _test(parts, num_segments, config, device)
            _write(folder, settings, done)
    console = get_console()
    asked = [_result(done[str(num_segments)]) for num_segments in config.segments]
    console.print(length_table(asked, parts.classifier.model.text_length))
    console.print(f"[bold]{os.path.relpath(folder)}[/] holds {', '.join(_FILES)}", highlight=False, soft_wrap=True)


_FILES = ("evaluation.csv", "distances.csv", "evaluation.json")


def _test(parts: Parts, num_segments: int, config: DictConfig, device: torch.device) -> dict[str, Any]:
    """Test one length, with smaller batches if they do not fit, and put what was found and measured into a row."""
    import torch

    on_gpu = device.type == "cuda"
    batch_size = min(config.samples, 256 if config.batch_size == "auto" else config.batch_size)
    while True:
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        began = time.perf_counter()
        try:
            result = _test_in_batches(parts, num_segments, config.samples, batch_size, device)
            break
        except torch.cuda.OutOfMemoryError:
            if config.batch_size != "auto" or batch_size == 1:
                raise UserError(f"batch_size={batch_size}: does not fit into the GPU's memory; give less") from None
            batch_size //= 2
    seconds = time.perf_counter() - began
    text_tokens = num_segments * parts.classifier.model.text_length
    return {
        "segments": num_segments,
        "text_tokens": text_tokens,
        **result.row(),
        "batch_size": batch_size,
        "seconds": seconds,
        "tokens_per_second": config.samples * text_tokens / seconds,
        "host_memory_mb": _host_memory(),
        "device_memory_mb": torch.cuda.max_memory_allocated(device) / 1e6 if on_gpu else 0.0,
        "distances": {distance: part.row() for distance, part in result.distances.items()},
    }


def _test_in_batches(
    parts: Parts, num_segments: int, samples: int, batch_size: int, device: torch.device
) -> LengthResult:
    """Test one length behind a live bar with segments a second and the time that is left."""
    import torch
    from rich import get_console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    from rmt_lightning.analysis.extrapolation import evaluate_length

    classifier = parts.classifier.to(device).eval()
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(),
        TextColumn("{task.fields[speed]:,.0f} segments/s ·"), TimeRemainingColumn(),
        console=get_console(), transient=True, disable=not get_console().is_terminal,
    )  # fmt: skip
    task = bar.add_task(f"{num_segments} segments", total=-(-samples // batch_size) * num_segments, speed=0.0)

    def advance() -> None:
        bar.update(task, advance=1, speed=(bar.tasks[0].speed or 0.0) * batch_size)

    with bar, torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
        return evaluate_length(
            classifier, parts.data, num_segments, samples, batch_size, device, classifier.answers, advance
        )


def _host_memory() -> float:
    """Largest resident memory of this process so far, in MB (Linux counts in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def _result(row: dict[str, Any]) -> LengthResult:
    from rmt_lightning.analysis.extrapolation import LengthResult

    return LengthResult(row["right"], row["samples"], row["segments"])


def _read(folder: Path) -> dict[str, dict[str, Any]]:
    """What an earlier, interrupted evaluation with the same settings has found."""
    path = folder / "evaluation.json"
    return dict(json.loads(path.read_text())["lengths"]) if path.exists() else {}


def _write(folder: Path, settings: dict[str, Any], done: dict[str, dict[str, Any]]) -> None:
    from rmt_lightning.results import write_csv

    content = {"settings": settings, "lengths": done}
    write_atomically(folder / "evaluation.json", json.dumps(content, indent=2).encode())
    write_csv(folder / "evaluation.csv", [{k: v for k, v in row.items() if k != "distances"} for row in done.values()])
    distances = [
        {"segments": row["segments"], "from": 2 ** int(key) // 2, "to": 2 ** int(key) - 1, **part}
        for row in done.values()
        for key, part in row["distances"].items()
    ]
    write_csv(folder / "distances.csv", distances)


run = front_door(main, "evaluate")

if __name__ == "__main__":
    run()
