"""Front door: `python -m rmt_lightning.flops`, or with `backbone=minilm`, tells what longer inputs cost.

It prints a table, and writes flops.csv (a row for each model and length), flops.png and flops.pdf into a folder.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich import get_console
from rich.table import Table

from rmt_lightning.analysis.flops import OPT, compare, read_shape
from rmt_lightning.app.hydra_errors import front_door
from rmt_lightning.app.schema import check
from rmt_lightning.core.errors import UserError
from rmt_lightning.core.files import write_csv
from rmt_lightning.reporting import figures


@dataclass(frozen=True)
class Root:
    """The settings of conf/flops.yaml that belong to no group."""

    tokens: list[Annotated[int, Ge(1)]]
    segment_length: Annotated[int, Ge(1)]
    text_length: Annotated[int, Ge(1)]
    folder: str


def main(config: DictConfig) -> None:
    check(config, Root)
    if not config.tokens:
        raise UserError("tokens=[]: names no length; give some, such as [512,4096]")
    if config.text_length > config.segment_length:
        raise UserError(
            f"text_length={config.text_length}: does not fit into segment_length={config.segment_length}; give "
            f"{config.segment_length} or less"
        )
    shapes = [read_shape(instantiate(config.backbone).config())] if "backbone" in config else OPT
    rows = compare(shapes, config.tokens, config.segment_length, config.text_length)
    _write(Path(config.folder), rows)
    console = get_console()
    console.print(_table(rows, config.segment_length))
    holds = f"[bold]{os.path.relpath(config.folder)}[/] holds flops.csv, flops.pdf, flops.png"
    console.print(holds, highlight=False, soft_wrap=True)


def _write(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    figure = figures.flops(rows)
    try:
        write_csv(folder / "flops.csv", rows)
        figures.save(figure, folder / "flops")
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


run = front_door(main, "flops")

if __name__ == "__main__":
    run()
