"""Front door: `python -m rmt_lightning.evaluate checkpoint=<run folder or checkpoint> segments=[1,64,4096]`.

Results go to <run folder>/evaluations/<checkpoint>-<task>-<key>/, where the key stands for all settings and the content
of the checkpoint: evaluation.csv has a row for each length, distances.csv one for each length and distance from fact to
question, retention.csv one for each time that memories were asked on their way, probes.csv one for each probe and
length, evaluation.json all of them and the settings; predictions.jsonl has each question with its answer. They are
written after each length. With stages=true, each stage's checkpoint is tested so, and stages-<task>-<key>/ holds them
side by side. With set=…, the questions of a published set are asked: set.csv has a row for each task and length,
leaderboard.csv accuracies in the layout of BABILong.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Le
from omegaconf import DictConfig

from rmt_lightning.app.hydra_errors import front_door
from rmt_lightning.app.resume import trained_config
from rmt_lightning.app.schema import check, is_typed
from rmt_lightning.app.trust import Trust
from rmt_lightning.core.errors import UserError
from rmt_lightning.core.run_folder import locate_checkpoint

# What makes other samples, or asks other things, than the questions of a published set.
_NOT_OF_SETS = ("stages", "segments", "follow", "every", "probes", "task", "noise")


@dataclass(frozen=True)
class Root:
    """The settings of conf/evaluate.yaml that belong to no group."""

    checkpoint: str
    stages: bool
    segments: list[Annotated[int, Ge(1)]] | None
    tokens: list[Annotated[int, Ge(0)] | str]
    samples: Annotated[int, Ge(1), Le(10**6)] | None
    follow: Annotated[int, Ge(0)]
    every: Annotated[int, Ge(1)]
    probes: list[Annotated[int, Ge(1)]] | None
    batch_size: Annotated[int, Ge(1), Le(2**16)] | Literal["auto"]
    device: Literal["auto", "cpu", "cuda"]
    output: str | None
    set: str | None
    tasks: list[str] | None
    cache_dir: str
    trust: Trust


def main(config: DictConfig) -> None:
    check(config, Root)
    if config.segments is not None and not config.segments and not config.tokens:
        raise UserError("segments=[]: names no length; give some, such as [1,64,4096], or tokens=[0,1k]")
    if 0 < config.follow < config.every:
        raise UserError(
            f"every={config.every}: asks nothing in follow={config.follow} segments; give less, or follow=0"
        )
    if name := next((name for name in _NOT_OF_SETS if is_typed(name)), None) if config.set else None:
        raise UserError(f"{name}: is nothing for set={config.set}, whose texts are as they are; leave one of them out")
    if config.tasks is not None and not config.set:
        raise UserError(f"tasks={config.tasks}: are those of a published set; give set=…, or leave it out")
    run, checkpoint = locate_checkpoint(config.checkpoint)
    if config.stages:
        if os.path.isfile(config.checkpoint):
            raise UserError(f"checkpoint={config.checkpoint}: with stages=true all are tested; give the run folder")
        if name := next((name for name in ("follow", "every") if is_typed(name) and config.follow), None):
            raise UserError(f"{name}={config[name]}: with stages=true memories are not followed; leave one of them out")
    # Takes seconds to import; --help and spelling mistakes should not have to wait for it.
    from rmt_lightning.app.evaluation import evaluate, evaluate_set, evaluate_stages

    trained = trained_config(run, config)
    if config.set:
        evaluate_set(config, trained, run, checkpoint)
    elif config.stages:
        evaluate_stages(config, trained, run)
    else:
        evaluate(config, trained, run, checkpoint)


run = front_door(main, "evaluate")

if __name__ == "__main__":
    run()
