"""Command lines that need no Hydra, the screen, and the log file of a run."""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from rich import get_console

from rmt_lightning.core.errors import UserError
from rmt_lightning.core.files import own_file

# What Lightning says at every start, and what does not apply to short epochs of samples that are pure functions.
_NOT_FOR_US = (
    "does not have many workers",
    "The number of training batches",
    "not resumable",
    "treespec",
    # What is logged at the end of a validation has been summed over all ranks by then.
    "sync_dist=True",
)


class Parser(argparse.ArgumentParser):
    """Tells what is wrong with the arguments in one line.

    Raises:
        UserError: by `parse_args`.
    """

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def command(main: Callable[[], None]) -> Callable[[], None]:
    """Make a command of a function that reads its own arguments. What the user did wrong is told in one line."""

    def run() -> None:
        try:
            main()
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            sys.exit(130)

    return run


class ConsoleHandler(logging.Handler):
    """Prints log records above a live progress bar instead of through it.

    (Rich's own handler sets each in a table, which breaks and pads it at the width of the screen; paths are long.)
    """

    def emit(self, record: logging.LogRecord) -> None:
        get_console().print(self.format(record), soft_wrap=True, markup=False, highlight=False)


def start_logging(file: Path | None, first_process: bool) -> None:
    """Send our log to the screen and, with dates, to `file` if there is one. Other ranks only report trouble.

    (Hydra could do so before a job begins; Lightning, imported later, would add a handler and reset levels.)
    """
    logging.captureWarnings(True)
    for pattern in _NOT_FOR_US:
        warnings.filterwarnings("ignore", message=f".*{pattern}.*")
    # Lightning sets up its own log when it is imported; ours has to come after.
    import lightning.pytorch  # noqa: F401

    handlers: list[logging.Handler] = [ConsoleHandler(logging.INFO if first_process else logging.WARNING)]
    if file:
        handlers.append(logging.FileHandler(own_file(file), delay=True))
        handlers[-1].setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    for name in ("rmt_lightning", "lightning", "py.warnings"):
        logging.getLogger(name).handlers = handlers
        logging.getLogger(name).propagate = False
    logging.getLogger("lightning.pytorch").handlers = []
    logging.getLogger("lightning.pytorch").propagate = True
    # The Hub's client tells of each retry; that it has failed is told once, by us. Matplotlib tells of its fonts.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    logging.getLogger("lightning").setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("rmt_lightning").setLevel(logging.INFO)
