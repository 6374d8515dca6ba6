"""Front door: `python -m rmt_lightning.report outputs/2026-01-31/12-00-00-detect outputs/2026-01-31/13-00-00-memorize`.

Writes one HTML page that compares runs: summary, phases, curves, accuracy against length, attention maps, settings,
hardware, speed and memory. It holds all it needs, so that it can be mailed and opened without a network. Of a sweep it
also prints one table over all jobs, and writes sweep.csv (jobs), summary.csv (means over seeds) and a figure.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from rmt_lightning.app.console import Parser, command
from rmt_lightning.core.errors import UserError
from rmt_lightning.core.quoting import one_line, shown


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(
        prog="python -m rmt_lightning.report",
        description="Write one HTML page that compares runs and needs no network to be read.",
        epilog="Folders that are missing, broken or no runs are named and skipped.",
    )
    parser.add_argument(
        "places",
        nargs="+",
        metavar="folder",
        help="a run folder, a folder that holds runs at any depth (outputs, or a sweep), or a quoted pattern of either",
    )
    parser.add_argument("--output", type=Path, default=Path("report.html"), help="the page (default: %(default)s)")
    given = parser.parse_args(arguments)
    report(given.places, given.output)


def report(places: list[str], output: Path) -> None:
    """Read all runs in `places`, and write the page about them.

    Raises:
        UserError: if there is no run, or the page cannot be written; nothing has been written then.
    """
    # These take a second to import; --help should not have to wait for it.
    from rmt_lightning.core.files import write_atomically

    try:
        from rmt_lightning.reporting.page import page
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name}: is missing; pip install 'rmt-lightning[report]'") from None
    from rmt_lightning.app.plotting import with_chances
    from rmt_lightning.reporting.reading import read_runs
    from rmt_lightning.reporting.sweeps import find_sweeps, read_sweep, show, write

    if output.suffix != ".html" or os.path.isdir(output):
        raise UserError(f"--output={output}: is not the name of a page; give one that ends in .html")
    runs, skipped = read_runs(places)
    if not runs:
        raise UserError(f"no run could be read: {'; '.join(skipped)}")
    sweeps = {folder: with_chances(read_sweep(folder)) for folder in find_sweeps(places)}
    try:
        write_atomically(output, page(runs, skipped, list(sweeps.values())).encode(errors="replace"))
    except OSError as error:
        raise UserError(f"--output={output}: cannot be written: {error.strerror}; give another place") from None
    for folder, sweep in sweeps.items():
        show(sweep)
        try:
            write(sweep, folder)
        except OSError as error:
            skipped.append(f"{shown(folder)}/sweep.csv: cannot be written: {error.strerror}")
    for line in (*skipped, *(f"{run.name}/{problem}" for run in runs for problem in run.problems)):
        print(f"skipped {one_line(line)}", file=sys.stderr)
    print(f"{shown(output)} shows {len(runs)} run{'s' * (len(runs) > 1)}")


run = command(main)


if __name__ == "__main__":
    run()
