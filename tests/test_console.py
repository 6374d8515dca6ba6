"""What the front doors write to the screen and into the log file."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

LOG = """
import logging, sys, warnings
from pathlib import Path
from rmt_lightning.app.console import start_logging

start_logging(Path("run.log"), first_process=sys.argv[1] == "0")
assert not Path("run.log").exists(), "a folder that is refused is left as it was"
logging.getLogger("rmt_lightning.train").info("go on with resume=%s", "a/[long]/path" * 20)
logging.getLogger("lightning.pytorch.utilities").info("Lightning's daily news")
logging.getLogger("lightning.pytorch.utilities").warning("trouble")
warnings.warn("The number of training batches is small")
"""


def test_a_line_stays_a_line(environment: dict[str, str], tmp_path: Path) -> None:
    """Through a pipe, however narrow the screen; with dates in the file; news of the first process only."""
    environment |= {"COLUMNS": "40"}
    for rank in "01":
        command = [sys.executable, "-c", LOG, rank]
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
        news = f"go on with resume={'a/[long]/path' * 20}\n" if rank == "0" else ""
        assert (result.stdout, result.stderr) == (f"{news}trouble\n", "")
        lines = (tmp_path / "run.log").read_text().splitlines()
        assert len(lines) == 2 and re.match(r"\d{4}-.* INFO rmt_lightning.train: go on with resume=", lines[0])
        (tmp_path / "run.log").unlink()
