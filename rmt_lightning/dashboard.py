"""Front door: `python -m rmt_lightning.dashboard` lays out the W&B workspace of the runs that logger=wandb has logged.

With a key and a network it saves the workspace as a new view of the project and prints its address; without, it writes
the same view to a JSON file.
"""

from __future__ import annotations

import os
from pathlib import Path

from rmt_lightning.app.console import Parser, command
from rmt_lightning.reporting.workspace import lay_out


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(
        prog="python -m rmt_lightning.dashboard",
        description="Lay out the W&B workspace of a project: curriculum, extrapolation, sweeps, text, hardware.",
        epilog="Without a key (wandb login, or WANDB_API_KEY) or a network, the view is written to a file.",
    )
    parser.add_argument(
        "--project", default=os.environ.get("WANDB_PROJECT", "rmt_lightning"), help="its project (default: %(default)s)"
    )
    parser.add_argument(
        "--entity", default=os.environ.get("WANDB_ENTITY"), help="user or team (default: that of the key)"
    )
    parser.add_argument("--name", default="Recurrent memory", help="what the view is called (default: %(default)s)")
    parser.add_argument(
        "--output", type=Path, default=Path("dashboard.json"), help="the file (default: %(default)s), if it comes to it"
    )
    given = parser.parse_args(arguments)
    lay_out(given.project, given.entity, given.name, given.output)


run = command(main)


if __name__ == "__main__":
    run()
