"""Front door: `python -m rmt_lightning.flops`, or with `backbone=minilm`, tells what longer inputs cost.

It prints a table, and writes flops.csv (a row for each model and length), flops.png and flops.pdf into a folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge
from omegaconf import DictConfig

from rmt_lightning.app.hydra_errors import front_door
from rmt_lightning.app.schema import check
from rmt_lightning.core.errors import UserError


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
    # Takes seconds to import; --help and spelling mistakes should not have to wait for it.
    from rmt_lightning.app.flops import flops

    flops(config)


run = front_door(main, "flops")

if __name__ == "__main__":
    run()
