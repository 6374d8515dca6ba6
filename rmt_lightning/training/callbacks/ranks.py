"""The processes of one run live and die together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import lightning as L

from rmt_lightning.training.callbacks.checkpoints import Interrupted

_PARENT = "RMT_LIGHTNING_PARENT"


@contextmanager
def together(trainer: L.Trainer, again: str) -> Iterator[None]:
    """Let no process of a run outlive another one while they train.

    When one dies, the others wait for it in a collective operation: with gloo until they notice, with NCCL for ten
    minutes. Lightning starts ranks 1, 2 … of a machine as children of the first one, so that one watches its children,
    and they watch their parent. What torchrun or SLURM starts is watched by those.

    Args:
        trainer: about to start the other processes, or one of them.
        again: what has to be typed to go on with the run.
    """
    # Only processes that Lightning has started find their parent's id in their environment.
    watch = _Watch(trainer, again, parent=int(os.environ.pop(_PARENT, 0)))
    os.environ[_PARENT] = str(os.getpid())
    watch.start()
    try:
        yield
    except Interrupted:
        raise
    except Exception:
        # Perhaps it fails because another process has died. Rank 0 is about to find out, and will then end the others.
        watch.join(timeout=watch.PERIOD * (8 if watch.parent else 4 if watch.children else 0))
        for child in watch.children:
            child.kill()
        raise
    finally:
        watch.over.set()
        del os.environ[_PARENT]


def wait_for_others(trainer: L.Trainer) -> None:
    """Let the processes that this one has started end before it.

    One that was stopped, by a debugger or for want of memory, since the last thing they did together would find its
    parent gone, and say that it has died.
    """
    for child in _children(trainer):
        with suppress(subprocess.TimeoutExpired):
            child.wait(timeout=60)


def _children(trainer: L.Trainer) -> list[subprocess.Popen[bytes]]:
    """Those that Lightning has started so far."""
    started = getattr(trainer.strategy.launcher, "procs", [])
    return [process for process in started if isinstance(process, subprocess.Popen)]


class _Watch(threading.Thread):
    """Ends this process and its children when one of them, or the parent, is gone. The main thread may hang."""

    PERIOD = 0.5

    def __init__(self, trainer: L.Trainer, again: str, parent: int) -> None:
        super().__init__(name="watch", daemon=True)
        self.trainer = trainer
        self.again = again
        self.parent = parent
        self.over = threading.Event()

    @property
    def children(self) -> list[subprocess.Popen[bytes]]:
        return _children(self.trainer)

    def run(self) -> None:
        while not self.over.wait(self.PERIOD):
            if death := self.death():
                self.end(death)

    def end(self, why: str) -> None:
        """End this process and its children at once, and say why."""
        try:
            for child in self.children:
                child.kill()
            # It is said once: by rank 0 or, if that is dead, by rank 1. Who listened may have died too.
            if self.trainer.local_rank <= 1:
                print(f"error: {why}; go on with {self.again}", file=sys.stderr, flush=True)
        finally:
            os._exit(1)

    def death(self) -> str | None:
        """Which process has died and how, in a few words."""
        if self.parent and os.getppid() != self.parent:
            return "rank 0 has died, and the others with it"
        for rank, child in enumerate(self.children, start=1 + self.trainer.node_rank * self.trainer.num_devices):
            if code := child.poll():
                how = f"ended with exit code {code}" if code > 0 else f"was killed by {signal.Signals(-code).name}"
                return f"rank {rank} {how}, and the others with it"
        return None
