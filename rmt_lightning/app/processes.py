"""Which process of a run this is, by what a launcher tells in the environment, not by what others have left there.

And how it gets on with other processes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from rmt_lightning.core.errors import UserError

# What tells a process that it is one rank of several.
RANK = re.compile(r"(LOCAL_|NODE_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|(SLURM|TORCHELASTIC)_.*")
_NUMBERS = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "MASTER_PORT")
_OF_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
_OF_SLURM = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS")


def forget_leftovers(command: Sequence[str]) -> None:
    """Remove from the environment what tells of processes that are not of this run.

    A shell within an allocation of SLURM, or one that a rank of another program has started, passes it on to all that
    is started there. Lightning would take this process for one of theirs, and wait for the others or write nothing.

    Args:
        command: the command line.

    Raises:
        UserError: if what a launcher tells cannot be true.
    """
    told = os.environ
    if any(word.startswith("hydra.job.name=train_ddp_process_") for word in command):
        # Lightning has started it, as a rank of a run of ours.
        return
    # Who started another program is not our parent.
    told.pop("RMT_LIGHTNING_PARENT", None)
    by_torchrun = "TORCHELASTIC_RUN_ID" in told
    by_srun = not by_torchrun and told.get("SLURM_STEP_NUM_TASKS", "1") != "1"
    by_hand = {"MASTER_ADDR", "MASTER_PORT"} <= told.keys() and not told.keys().isdisjoint(("LOCAL_RANK", "NODE_RANK"))
    if by_srun:
        # By this name Lightning would take it for a shell.
        told.pop("SLURM_JOB_NAME", None)
    for name in list(filter(RANK.fullmatch, told)):
        true = by_srun if name.startswith("SLURM_") else by_torchrun or (by_hand and not by_srun)
        # An address tells nothing about this process, and may be meant.
        if not true and not name.startswith("MASTER_"):
            del told[name]
    _check_numbers(*(name for name in _NUMBERS if name in told))
    _check_numbers(*(_OF_TORCHRUN if by_torchrun else _OF_SLURM if by_srun else ()))


def share_cores() -> None:
    """Let threads that wait for each other sleep soon, unless the environment says how they are to wait.

    To be called before torch is imported. GNU's OpenMP takes the cores for its own: threads spin for milliseconds at
    each of thousands of barriers a step, and where another program wants a core, for a time slice of it, which took
    twenty times as long. A thousand turns is what it takes itself where it knows of more threads than cores.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def _check_numbers(*names: str) -> None:
    for name in names:
        if not os.environ.get(name, "").isdecimal():
            launcher = next(
                (told for told in ("TORCHELASTIC_RUN_ID", "SLURM_STEP_NUM_TASKS") if told in os.environ), name
            )
            raise UserError(
                f"{name}={os.environ.get(name, '')}: tells which process of a run this is, and must be a number; unset "
                f"{launcher} if no launcher has set it for this run"
            )


def is_first_process() -> bool:
    # One of these is more than 0 in every other process that Lightning, torchrun or SLURM has started.
    return all(int(os.environ.get(name, 0)) == 0 for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"))
