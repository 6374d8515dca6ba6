"""How much this machine can hold; what it cannot is refused before it is made."""

from __future__ import annotations

import os

import torch

from rmt_lightning.core.errors import UserError


def check_weights(key: str, count: int, size: int = 4) -> None:
    """Raise UserError, naming a setting, if so many weights of so many bytes are more than this machine can hold."""
    check_room(f"{key}: its {count:,} weights take", count * size, "make it smaller")


def check_room(what: str, needed: int, hint: str) -> None:
    """Raise UserError, which begins with what takes so many bytes, if they are more than this machine can hold."""
    if needed > (there := machine_memory()):
        raise UserError(f"{what} {needed / 1e9:,.0f} GB, and this machine has {there / 1e9:,.0f}; {hint}")


def machine_memory() -> int:
    """The memory of this machine or of its GPU, whichever is larger, in bytes."""
    gpu = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0
    return max(installed_memory(), gpu)


def installed_memory() -> int:
    """The memory of this machine beside that of GPUs, in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
