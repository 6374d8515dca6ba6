"""Test finished runs on inputs of up to two million tokens and put them into one table, as in figure 1 of the paper.

    python experiments/two_million_tokens/run.py detect=outputs/detect memorize=outputs/memorize

What an earlier call has tested is not tested again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from rmt_lightning.app.resume import provenance
from rmt_lightning.core.files import read_csv, write_csv
from rmt_lightning.core.run_folder import CHECKPOINTS, CONFIG, LAST
from rmt_lightning.reporting import figures

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
    parser.add_argument("--results", type=Path, default=HERE, help="where table and figure go")
    given = parser.parse_args()
    rows = [row for run in given.runs for row in evaluate(*run.split("=", 1))]
    write_csv(given.results / "results.csv", rows)
    figures.save(figures.extrapolation(rows), given.results / "figure")


def evaluate(name: str, folder: str) -> list[dict[str, str]]:
    """The rows of evaluation.csv of all lengths, with the names of the run and of its task."""
    for samples, segments in LENGTHS.items():
        lengths = f"segments=[{','.join(map(str, segments))}]"
        settings = [f"checkpoint={folder}", lengths, f"samples={samples}", "batch_size=64", "follow=0"]
        subprocess.run([sys.executable, "-m", "rmt_lightning.evaluate", *settings], check=True)
    config = OmegaConf.load(Path(folder) / CONFIG)
    assert isinstance(config, DictConfig)
    task = config.task._target_.rsplit(".", 1)[-1].lower()
    # Other evaluations tell what an earlier state of the run could do, or what it makes of another text.
    made_of = provenance(config, Path(folder) / CHECKPOINTS / LAST).items()
    tested = [
        row
        for path in Path(folder).glob(f"evaluations/last-{task}-*/evaluation.csv")
        if made_of <= json.loads(path.with_suffix(".json").read_text())["settings"].items()
        for row in read_csv(path)
    ]
    return [
        {"run": name, "task": task} | row
        for samples, segments in LENGTHS.items()
        for row in tested
        if int(row["samples"]) == samples and int(row["segments"]) in segments
    ]


if __name__ == "__main__":
    main()
