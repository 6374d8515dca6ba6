"""Front door: `python -m rmt_lightning.attend checkpoint=<run folder or checkpoint> layer=3 head=1`.

Results go to <run folder>/attention/<checkpoint>-<task>-<key>/, where the key stands for all settings but layer and
head and for the content of the checkpoint. attention.csv holds the heatmaps of attention.png and .pdf, a row for each
token with its attention to each token of its segment (-layer-3-head-1 is added to the names of single layers and
heads); rewrite.csv holds the curve of rewrite.png and .pdf; settings.json the settings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Le
from omegaconf import DictConfig

from rmt_lightning.app.hydra_errors import front_door
from rmt_lightning.app.resume import trained_config
from rmt_lightning.app.schema import check
from rmt_lightning.app.trust import Trust
from rmt_lightning.core.run_folder import locate_checkpoint


@dataclass(frozen=True)
class Root:
    """The settings of conf/attend.yaml that belong to no group."""

    checkpoint: str
    segments: Annotated[int, Ge(1), Le(16)]
    layer: Annotated[int, Ge(1)] | Literal["mean"]
    head: Annotated[int, Ge(1)] | Literal["mean"]
    streams: Annotated[int, Ge(1), Le(2**16)]
    stream_segments: Annotated[int, Ge(1)]
    device: Literal["auto", "cpu", "cuda"]
    output: str | None
    cache_dir: str
    trust: Trust


def main(config: DictConfig) -> None:
    check(config, Root)
    run, checkpoint = locate_checkpoint(config.checkpoint)
    # Takes seconds to import; --help and spelling mistakes should not have to wait for it.
    from rmt_lightning.app.attention import attend

    attend(config, trained_config(run, config), run, checkpoint)


run = front_door(main, "attend")

if __name__ == "__main__":
    run()
