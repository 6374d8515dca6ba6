"""Front door: `python -m rmt_lightning.plot runs=outputs/2026-01-31 kind=length style=paper width=column format=pdf`.

It draws one figure from what runs, evaluations or a sweep have left in their folders, and writes it into one file. Runs
that differ in nothing but their seed become one curve, their mean with its 95% interval; a single run has that of its
test. A table says which runs stand behind each curve.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from omegaconf import DictConfig

from rmt_lightning.app.hydra_errors import front_door
from rmt_lightning.app.schema import check
from rmt_lightning.core.errors import UserError


@dataclass(frozen=True)
class Root:
    """The settings of conf/plot.yaml."""

    runs: str | list[str]
    kind: Literal["length", "curriculum", "retention", "sweep", "capacity"]
    style: Literal["paper", "talk"]
    width: Literal["column", "page"]
    format: Literal["pdf", "svg", "png"] | None
    output: str | None


def main(config: DictConfig) -> None:
    check(config, Root)
    if not config.runs:
        raise UserError("runs=[]: names no folder; give some, such as runs=outputs/2026-01-31")
    output = Path(config.output or f"{config.kind}.{config.format or 'pdf'}")
    endings = [config.format] if config.format else ["pdf", "svg", "png"]
    if output.suffix[1:] not in endings:
        raise UserError(f"output={output}: must end in .{' or .'.join(endings)}; give another name, or another format=")
    if os.path.lexists(output):
        raise UserError(f"output={output}: is there already; choose another, or remove it")
    # Takes seconds to import; --help and spelling mistakes should not have to wait for it.
    from rmt_lightning.app.plotting import plot

    plot(config, output)


run = front_door(main, "plot")

if __name__ == "__main__":
    run()
