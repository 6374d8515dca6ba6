"""What the front doors write to the screen and into the log file."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Run

LOG = """
import logging, sys, warnings
from pathlib import Path
from rmt_lightning.app.console import start_logging, take_over_lightning

start_logging(Path("run.log"), first_process=sys.argv[1] == "0")
take_over_lightning()
assert not Path("run.log").exists(), "a folder that is refused is left as it was"
logging.getLogger("rmt_lightning.train").info("go on with resume=%s", "a/[long]/path" * 20)
logging.getLogger("lightning.pytorch.utilities").info("Lightning's daily news")
logging.getLogger("lightning.pytorch.utilities").warning("trouble")
warnings.warn("The number of training batches is small")
"""


def test_a_line_stays_a_line(environment: dict[str, str], command: Run, tmp_path: Path) -> None:
    """Through a pipe, however narrow the screen; with dates in the file; news of the first process only."""
    environment["COLUMNS"] = "40"
    (tmp_path / "log.py").write_text(LOG)
    for rank in "01":
        result = command(str(tmp_path / "log.py"), rank)
        assert result.returncode == 0, result.stderr
        news = f"go on with resume={'a/[long]/path' * 20}\n" if rank == "0" else ""
        assert (result.stdout, result.stderr) == (f"{news}trouble\n", "")
        lines = (tmp_path / "run.log").read_text().splitlines()
        assert len(lines) == 2 and re.match(r"\d{4}-.* INFO rmt_lightning.train: go on with resume=", lines[0])
        (tmp_path / "run.log").unlink()


STEADY = r"""
import os, sys
from rmt_lightning.app.console import steady_screen

with steady_screen(lambda: sys.argv[1] == "needed"):
    print("a word of \u03c4 \u2013 and a name \udcff" * 2000)
    print("trouble with \u043a\u043d\u0438\u0433\u0430", file=sys.stderr)
    with open("made", "w") as file:
        assert file.fileno() > 2, "it has the place of a standard stream, and others write to it"
    sys.stdout.flush()
    if "MPLBACKEND" in os.environ or os.environ.get("COLUMNS") == "0":
        sys.exit("a notebook's backend, or a screen without width, is passed on")
open("done", "w").close()
"""


@pytest.mark.fault("the screen is full, closed, gone, or ASCII alone", "work goes on; what only told something fails")
@pytest.mark.parametrize(
    ("shell", "needed", "code"),
    [
        ("{} > /dev/full", False, 0),
        ("{} > /dev/full", True, 1),
        ("{} > /dev/full 2>&1", False, 0),
        ("{} >&- 2>&-", True, 0),
        ("{} <&- >&- 2>&-", True, 0),
        ("{} | head -c 1; exit ${{PIPESTATUS[0]}}", True, 0),
        ("{} 2>&1 | true; exit ${{PIPESTATUS[0]}}", True, 0),
        ("PYTHONIOENCODING=ascii {}", True, 0),
        ("PYTHONIOENCODING=latin-1 {}", True, 0),
        ("LC_ALL=C PYTHONCOERCECLOCALE=0 PYTHONUTF8=0 {}", True, 0),
        ("COLUMNS=0 MPLBACKEND=module://absent {}", True, 0),
    ],
)
def test_screens(shell: str, needed: bool, code: int, environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "steady.py").write_text(STEADY)
    command = f"{sys.executable} steady.py {'needed' if needed else 'incidental'}"
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path)}
    words = ["bash", "-c", shell.format(command)]
    result = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, errors="replace")
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr and "Error" not in result.stderr
    assert (tmp_path / "made").exists() and (tmp_path / "done").exists() == (code == 0)


DOORS = {
    "train --help": 1,
    "report --help": 1,
    "train --cfg job": 1,
    "report run": 1,
    "flops": 1,
    "export checkpoint=run folder=exported": 1,
    "evaluate checkpoint=run segments=[1] samples=4 follow=0": 1,
    "attend checkpoint=run segments=1 stream_segments=2": 1,
    "train resume=run": 0,
}


@pytest.mark.soak
@pytest.mark.fault("a door's screen is full or closed, or ASCII alone", "training goes on; the others end in a line")
@pytest.mark.parametrize("words", DOORS)
def test_screens_of_the_doors(words: str, finished_run: Path, environment: dict[str, str], tmp_path: Path) -> None:
    shutil.copytree(finished_run, tmp_path / "run")
    ascii_alone = "LC_ALL=C PYTHONCOERCECLOCALE=0 PYTHONUTF8=0"
    for before, after, code in (("", "> /dev/full", DOORS[words]), ("", ">&- 2>&-", 0), (ascii_alone, "", 0)):
        shutil.rmtree(tmp_path / "exported", ignore_errors=True)
        command = f"{before} {sys.executable} -m rmt_lightning.{words} {after}"
        result = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert result.returncode == code, result.stderr
        assert result.stderr.count("\n") == code and "no space left" not in result.stderr.lower()
