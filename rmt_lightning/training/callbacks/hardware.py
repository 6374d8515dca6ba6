"""What a run runs on, and how much memory it has taken."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import subprocess
import sys
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from rmt_lightning.core.files import write_atomically
from rmt_lightning.core.run_folder import HARDWARE
from rmt_lightning.models.machine import installed_memory

_CHECKOUT = Path(__file__).parents[3]


class Hardware(Callback):
    """Leaves hardware.json in the run folder, an entry for each start, and logs the largest memory so far, in MB.

    Memory is that of the first process and its GPU; memory of loader workers is not counted.

    Args:
        folder: the run folder.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            entries = [*_earlier(self.folder / HARDWARE), describe(trainer)]
            write_atomically(self.folder / HARDWARE, json.dumps(entries, indent=2).encode())

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        pl_module.log("train/host_memory_mb", host_memory())
        if pl_module.device.type == "cuda":
            pl_module.log("train/device_memory_mb", torch.cuda.max_memory_allocated(pl_module.device) / 1e6)


def describe(trainer: L.Trainer) -> dict[str, Any]:
    """Machine and versions, without anything that tells whose machine it is."""
    on_gpu = trainer.strategy.root_device.type == "cuda"
    return {
        "began": datetime.now(UTC).isoformat(timespec="seconds"),
        "step": trainer.global_step,
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "host_memory_mb": installed_memory() / 1e6,
        "gpus": [torch.cuda.get_device_name(device) for device in trainer.device_ids] if on_gpu else [],
        "processes": trainer.world_size,
        "precision": str(trainer.precision),
        "python": platform.python_version(),
        **{library: version(library) for library in ("torch", "lightning", "transformers")},
        "commit": _commit(),
    }


def host_memory() -> float:
    """Largest resident memory of this process so far, in MB (Linux counts in KiB, macOS in bytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def make_fast() -> None:
    """Set up memory and products of this process, to be called before it computes."""
    keep_heap()
    multiply_fast()


def multiply_fast() -> None:
    """Leave products in single precision on a CPU to oneDNN, where these are as exact as those of torch's default.

    On AMD's processors with AVX-512 it takes half the time. It has to be allowed bf16 for that, which some processors
    then use, at a thousandth of accuracy: there all stays as it was. What is chosen depends on the processor alone, so
    a run that is resumed goes on in the same way.
    """
    # The setting is GPUs' as well.
    if torch.cuda.is_available() or torch.get_float32_matmul_precision() != "highest":
        return
    torch.set_float32_matmul_precision("medium")
    if _error_of_products() > 1e-5:
        torch.set_float32_matmul_precision("highest")


def _error_of_products() -> float:
    """Of products of 512 × 512 in single precision, relative to the largest number in them."""
    left, right = torch.randn(2, 512, 512, generator=torch.Generator().manual_seed(0))
    exact = left.double() @ right.double()
    return float((left @ right - exact).abs().max() / exact.abs().max())


def keep_heap() -> None:
    """Keep memory that is freed for what comes next, and do not give it back to the system meanwhile.

    What a segment takes, the next one takes again. glibc gives most of it back in between, and pages that come anew are
    zeroed: much of the time of a small model. At most 64 MB stay at the end of the heap, and blocks above 32 MB, which
    is glibc's limit, come and go. Other C libraries have no such settings and are left as they are.
    """
    with suppress(AttributeError, OSError, TypeError):
        libc = ctypes.CDLL(None)
        # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD
        libc.mallopt(-3, 2**25)
        libc.mallopt(-1, 2**26)


def _earlier(path: Path) -> list[Any]:
    """Entries of earlier starts. A file that was damaged by hand is no reason not to train."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return entries if isinstance(entries, list) else []


def _cpu() -> str:
    try:
        names = [
            line
            for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
            if line.startswith("model name")
        ]
    except OSError:
        names = []
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of this project, -dirty after it if files were changed; None if it was installed from a wheel."""
    if not (_CHECKOUT / ".git").exists():
        return None
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        result = subprocess.run(command, cwd=_CHECKOUT, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None
