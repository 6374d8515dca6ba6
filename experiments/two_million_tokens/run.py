"""Test finished runs on inputs of up to two million tokens and put them into one table, as in figure 1 of the paper.

    python experiments/two_million_tokens/run.py detect=outputs/detect memorize=outputs/memorize

What an earlier call has tested is not tested again.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

from rmt_lightning.core.files import read_csv, write_csv

HERE = Path(__file__).parent
# How many samples of which numbers of segments; 40,077 segments of 51 tokens are 2,043,927.
LENGTHS = {
    256: (1, 2, 4, 8, 16, 32, 64, 128),
    32: (4096,),
    8: (40077,),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="NAME=FOLDER", help="a name for the legend, and a run folder")
    parser.add_argument("--results", type=Path, default=HERE, help="where the table goes")
    given = parser.parse_args()
    rows = [row for run in given.runs for row in evaluate(*run.split("=", 1))]
    write_csv(given.results / "results.csv", rows)


def evaluate(name: str, folder: str) -> list[dict[str, str]]:
    """The rows of evaluation.csv of all lengths, with the names of the run and of its task."""
    rows = []
    for samples, segments in LENGTHS.items():
        lengths = f"segments=[{','.join(map(str, segments))}]"
        settings = [f"checkpoint={folder}", lengths, f"samples={samples}", "batch_size=64", "follow=0"]
        command = [sys.executable, "-m", "rmt_lightning.evaluate", *settings]
        said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        print(said, flush=True)
        found = Path(re.findall(r"^(.*) holds evaluation.csv", said, flags=re.MULTILINE)[-1])
        task = found.name.split("-")[1]
        tested = (row for row in read_csv(found / "evaluation.csv") if int(row["segments"]) in segments)
        rows += [{"run": name, "task": task} | row for row in tested]
    return rows


if __name__ == "__main__":
    main()
