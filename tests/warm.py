"""What takes long in every command, done once where tests run and in the process from which they fork commands."""

from __future__ import annotations

import gc
import os
import runpy
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
import peft  # noqa: F401
from hydra._internal.hydra import Hydra

import rmt_lightning.app.training  # noqa: F401
from rmt_lightning.app.schema import CONF

_get_mode = Hydra.get_mode


def get_mode(self: Hydra, config_name: str | None, overrides: Sequence[str]) -> Any:
    """Save half of the time that Hydra takes: it composes a config first to see whether it is that of a sweep."""
    own = any("sweep" in word or "hydra.mode" in word for word in overrides)
    own |= any(word.startswith(("-cd", "--config-dir")) for word in sys.argv)
    return _get_mode(self, config_name, list(overrides)) if own else None


def command(program: str, words: list[str], folder: str, environment: dict[str, str], output: list[str]) -> None:
    """What a process does that stands in for `python -m <module>` or `python <driver.py>`, and has begun warm."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, name in enumerate(output, start=1):
        os.dup2(os.open(name, os.O_WRONLY), descriptor)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = [program, *words]
    if program.endswith(".py"):
        sys.path.insert(0, str(Path(program).parent))
        runpy.run_path(program, run_name="__main__")
    else:
        sys.path.insert(0, folder)
        runpy.run_module(program, run_name="__main__", alter_sys=True)


Hydra.get_mode = get_mode  # type: ignore[method-assign]
# Hydra looks for its plugins, and its parsers learn their grammars.
with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
    hydra.compose("train", ["seed=1", "data.batch_size=4", "test.segments=[1,2]"])
# Nothing of all that is garbage: the collector need not look at it again and again, nor a fork copy it.
gc.collect()
gc.freeze()
