"""Command lines that need no Hydra, the screen, and the log file of a run."""

from __future__ import annotations

import argparse
import errno
import io
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn, TextIO

from rich import get_console
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rmt_lightning.core.errors import UserError
from rmt_lightning.core.files import own_file
from rmt_lightning.core.quoting import one_line

# Letters of a line in log files.
_WIDTH = 120
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
    """Tells what is wrong with the arguments in one line, and expands home folders in them.

    Raises:
        UserError: by `parse_args`.
    """

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        words = sys.argv[1:] if args is None else args
        # In --output=~/page.html, a shell does not.
        home = re.compile(r"(?:^|(?<==))~\w*(?=/|$)")
        return super().parse_args([home.sub(lambda found: os.path.expanduser(found[0]), word) for word in words])

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def command(main: Callable[[], None]) -> Callable[[], None]:
    """Make a command of a function that reads its own arguments. What the user did wrong is told in one line."""

    def run() -> None:
        with steady_screen(lambda: True):
            try:
                main()
            except UserError as error:
                print(f"error: {one_line(str(error))}", file=sys.stderr)
                sys.exit(2)
            except OSError as error:
                print(f"error: {one_line(trouble(error))}", file=sys.stderr)
                sys.exit(1)
            except KeyboardInterrupt:
                sys.exit(130)

    return run


def trouble(error: OSError) -> str:
    """What the system says about a file. An error that is about none goes on as it is."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        place = error.filename or "the run folder"
        return f"no space left while writing {place}: free some, and resume the run or repeat the command"
    if error.filename is None or error.strerror is None:
        if isinstance(error, FileNotFoundError):
            # Nothing else is asked of the system without a name.
            return "the folder that this was started in is gone; start it again in one that is there"
        raise error
    return f"{os.fsdecode(error.filename)}: {error.strerror}"


class _Screen(io.RawIOBase):
    """A standard stream that may be full or gone: what cannot be written to it is dropped.

    Attributes:
        lost: why that happened first.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.lost: OSError | None = None

    def fileno(self) -> int:
        return self.descriptor

    def isatty(self) -> bool:
        return os.isatty(self.descriptor)

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        try:
            return os.write(self.descriptor, content)
        except OSError as error:
            self.lost = self.lost or error
            return len(content)


@contextmanager
def steady_screen(needed: Callable[[], bool]) -> Iterator[None]:
    """Let the command within work whatever becomes of its standard streams, and whatever they can encode.

    Args:
        needed: asked at the end, whether it has failed if nobody could see what it printed. Who closes a pipe has
            seen enough.
    """
    # Figures go to files, whatever draws on the screen of a notebook; and a screen without width would show nothing.
    os.environ.pop("MPLBACKEND", None)
    # They tell of their fonts.
    for name in ("matplotlib", "fontTools"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if not os.environ.get("COLUMNS", "").strip("0"):
        os.environ.pop("COLUMNS", None)
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # The next file that is opened would take its place, and be written to.
            os.open(os.devnull, os.O_RDWR)
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        given = getattr(sys, name)
        # Not those that somebody has put in their place, such as a test.
        if given is getattr(sys, f"__{name}__"):
            setattr(sys, name, _steady(given, descriptor))
    left = None
    try:
        yield
    except SystemExit as error:
        if error.code:
            raise
        left = error
    sys.stdout.flush()
    screen = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    if isinstance(screen, _Screen) and screen.lost and screen.lost.errno != errno.EPIPE and needed():
        print("error: the screen, or the file in its place, takes no more; what was printed is lost", file=sys.stderr)
        sys.exit(1)
    if left:
        raise left


def _steady(given: TextIO | None, descriptor: int) -> TextIO:
    return io.TextIOWrapper(
        io.BufferedWriter(_Screen(descriptor)),
        encoding=getattr(given, "encoding", "utf-8"),
        errors="backslashreplace",
        line_buffering=descriptor == 2 or os.isatty(descriptor),
        write_through=getattr(given, "write_through", False),
    )


class ConsoleHandler(logging.Handler):
    """Prints log records above a live progress bar instead of through it.

    (Rich's own handler sets each in a table, which breaks and pads it at the width of the screen; paths are long.)
    """

    def emit(self, record: logging.LogRecord) -> None:
        get_console().print(self.format(record), soft_wrap=True, markup=False, emoji=False, highlight=False)


class LogFile(logging.FileHandler):
    """train.log. A run goes on without it: its folder may have gone, or the disk be full."""

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        pass


def show(what: Table | Text) -> None:
    """Print a table or a line of text, and put it into the log file of a run if there is one."""
    get_console().print(what, soft_wrap=isinstance(what, Text))
    page = io.StringIO()
    Console(file=page, width=_WIDTH).print(what, soft_wrap=isinstance(what, Text))
    keep("\n" * isinstance(what, Table) + page.getvalue().rstrip(), logging.INFO)


def keep(told: str, level: int, error: BaseException | None = None) -> None:
    """Put what the screen has shown, or an error with its traceback, into the log file of a run that has begun."""
    trace = None if error is None else (type(error), error, error.__traceback__)
    for handler in logging.getLogger("rmt_lightning").handlers:
        if isinstance(handler, LogFile) and handler.stream:
            handler.handle(logging.LogRecord(__name__, level, __file__, 0, told, None, trace))


def start_logging(file: Path | None, first_process: bool) -> None:
    """Send our log to the screen and, with dates, to `file` if there is one. Other ranks only report trouble.

    (Hydra could do so before a job begins, but not with this file.)
    """
    logging.captureWarnings(True)
    for pattern in _NOT_FOR_US:
        warnings.filterwarnings("ignore", message=f".*{pattern}.*")
    handlers: list[logging.Handler] = [ConsoleHandler(logging.INFO if first_process else logging.WARNING)]
    if file:
        handlers.append(LogFile(own_file(file), delay=True, encoding="utf-8", errors="backslashreplace"))
        handlers[-1].setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    for name in ("rmt_lightning", "py.warnings"):
        logging.getLogger(name).handlers = handlers
        logging.getLogger(name).propagate = False
    logging.getLogger("rmt_lightning").setLevel(logging.INFO)


def take_over_lightning() -> None:
    """Send what Lightning logs where our log goes, which has been started.

    It sets up a log of its own when it is imported, which spelling mistakes do not wait for; so this comes after.
    """
    import lightning.pytorch

    whole, inner = (logging.getLogger(package.__name__) for package in (lightning, lightning.pytorch))
    whole.handlers, whole.propagate = logging.getLogger("rmt_lightning").handlers, False
    inner.handlers, inner.propagate = [], True
    whole.setLevel(logging.WARNING)
    inner.setLevel(logging.WARNING)
