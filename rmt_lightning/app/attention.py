"""What `attend` shows of a run: whom its memory attends to, and how much of it each segment rewrites."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from rich.markup import escape
from rich.table import Table

from rmt_lightning.analysis.attention import AttentionMap, curve_from_rows, maps_to_rows, rewriting_curve
from rmt_lightning.app.build import find_device, load, text_names
from rmt_lightning.app.console import show, start_logging, take_over_lightning
from rmt_lightning.app.results import tell_folder, watch_clearest
from rmt_lightning.app.resume import other_text, provenance
from rmt_lightning.core.errors import UserError
from rmt_lightning.core.files import read_csv, write_atomically, write_csv
from rmt_lightning.core.progress import bar
from rmt_lightning.core.quoting import shown
from rmt_lightning.core.run_folder import alone_in, findings
from rmt_lightning.models.memory import MemoryTokens
from rmt_lightning.reporting import figures, style
from rmt_lightning.tasks.placement import Placement, Sample
from rmt_lightning.training.callbacks.hardware import make_fast

log = logging.getLogger(__name__)


def attend(config: DictConfig, run_config: DictConfig, run: Path, checkpoint: Path) -> None:
    """Draw the heatmaps and then, unless an earlier call has, the curve."""
    start_logging(None, first_process=True)
    take_over_lightning()
    make_fast()
    device, hardware = find_device(config.device)
    placement, module, sha256 = load(run_config, run, checkpoint)
    model = module.model
    if not isinstance(model, MemoryTokens) or model.memory_size == 0:
        raise UserError(
            f"checkpoint={config.checkpoint}: has no memory tokens whose attention can be shown; give a run with "
            "model=rmt_encoder, rmt_decoder, rmt_transformer_xl or rmt_retrieval and model.memory_size>0"
        )
    module.to(device).eval()
    asked = {key: config[key] for key in ("segments", "streams", "stream_segments")}
    text = other_text(run, text_names(placement.corpora, None if "task" in config else placement.task), config)
    settings = provenance(run_config, checkpoint, sha256) | text | asked | {"device": hardware}
    folder = findings(config.output or run, "attention", f"{checkpoint.stem}-{placement.task.name}", settings)
    log.info("watching %s of %s; results go to %s", shown(checkpoint.name), shown(run), shown(folder))
    # Whether there are such a layer and head comes out before anything is written.
    watched = watch_clearest(placement, module, model, config.segments, device, config.layer, config.head)
    with alone_in(folder):
        _draw_maps(watched, config, folder)
        write_atomically(folder / "settings.json", json.dumps(settings, indent=2).encode())
        _draw_curve(placement, model, config, device, folder)
    tell_folder(folder)


def _draw_maps(watched: tuple[Sample, str, list[AttentionMap]], config: DictConfig, folder: Path) -> None:
    """Show what the model answers to one test sample, and what its memory attends to."""
    sample, title, maps = watched
    assert sample.example is not None, "only mere noise has none"
    table = Table("segment", "facts", "event", "attention", title=escape(title), title_justify="left")
    for segment, one in enumerate(maps):
        facts = " ".join(fact for fact, home in zip(sample.example.facts, sample.homes, strict=True) if home == segment)
        reader, sources = one.operation
        table.add_row(str(segment + 1), escape(facts), one.event, f"{reader} → {', '.join(sources)} {one.share:.0%}")
    show(table)
    stem = "attention" + "".join(f"-{name}-{config[name]}" for name in ("layer", "head") if config[name] != "mean")
    write_csv(folder / f"{stem}.csv", maps_to_rows(maps))
    style.save(figures.attention(maps, f"{title}   layer={config.layer}, head={config.head}"), folder / stem)


def _draw_curve(
    placement: Placement, model: MemoryTokens[Any], config: DictConfig, device: torch.device, folder: Path
) -> None:
    """Read long texts side by side, unless an earlier call has; show how much of the memory noise and facts rewrite."""
    path, length = folder / "rewrite.csv", config.stream_segments
    if not path.exists():
        read = rewriting_curve(model, placement, length, config.streams, device)
        rows: list[dict[str, Any]] = []
        with bar(f"reading {length} segments", length, config.streams) as advance:
            for points in read:
                rows += map(asdict, points)
                advance()
        write_csv(path, rows)
    curve = curve_from_rows(read_csv(path))
    title = f"How much of the memory a segment rewrites ({config.streams} texts)"
    table = Table("holding", "‖m′ − m‖ / ‖m′‖", "cosine of m and m′", title=title, title_justify="left")
    for part in ("noise", "fact", "question"):
        if points := [point for point in curve if point.part == part]:
            means = np.average([(p.rewritten, p.cosine) for p in points], axis=0, weights=[p.texts for p in points])
            table.add_row(part, *(f"{mean:.3f}" for mean in means))
    show(table)
    style.save(figures.rewriting(curve, title), folder / "rewrite")
