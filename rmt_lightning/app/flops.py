"""What `flops` tells: a table, its csv file and a figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.table import Table

from rmt_lightning.analysis.flops import OPT, compare, read_shape
from rmt_lightning.app.console import show
from rmt_lightning.app.results import tell_folder
from rmt_lightning.app.schema import instantiate
from rmt_lightning.core.errors import UserError
from rmt_lightning.core.files import write_csv
from rmt_lightning.reporting import figures, style


def flops(config: DictConfig) -> None:
    """Compare full attention with RMT, for the family of the paper or the backbone that is named.

    Raises:
        UserError: if the backbone's FLOPs are not known, or the folder cannot be written to.
    """
    shapes = [read_shape(instantiate(config.backbone).config())] if "backbone" in config else OPT
    rows = compare(shapes, config.tokens, config.segment_length, config.text_length)
    _write(Path(config.folder), rows)
    show(_table(rows, config.segment_length))
    tell_folder(Path(config.folder), "flops.csv, flops.pdf, flops.png")


def _write(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    figure = figures.flops(rows)
    try:
        write_csv(folder / "flops.csv", rows)
        style.save(figure, folder / "flops")
    except OSError as error:
        raise UserError(f"folder={folder}: cannot be written to ({error.strerror}); choose another folder") from None


def _table(rows: Sequence[dict[str, Any]], segment_length: int) -> Table:
    """The longest input last, where it is still on the screen."""
    title = f"FLOPs of a forward pass, RMT with segments of {segment_length} tokens"
    table = Table("tokens", "model", "segments", "full attention", "RMT", "ratio", title=title, title_justify="left")
    for length in sorted({row["tokens"] for row in rows}):
        some = [row for row in rows if row["tokens"] == length]
        for row in some:
            full, rmt = f"{row['full_attention']:.3e}", f"{row['rmt']:.3e}"
            table.add_row(f"{length:,}", row["model"], f"{row['segments']:,}", full, rmt, figures.times(row["ratio"]))
        if len(some) > 1:
            table.add_section()
    return table
