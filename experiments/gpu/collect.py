"""Puts what a part of run.sh has left into few files: its csv, and a line in summary.csv.

python collect.py <part> <folder of its run and output> <folder of results> <exit code> <seconds>
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections import Counter
from pathlib import Path

from rmt_lightning.core.files import append_csv, read_csv, write_csv


def tests(work: Path, results: Path) -> str:
    # Read off the output, which is there when the limit has stopped pytest, too.
    told = re.findall(r"::(\w+(?:\[.*?\])?) (PASSED|FAILED|ERROR|SKIPPED)", (work / "tests.txt").read_text())
    write_csv(results / "tests.csv", [{"test": test, "outcome": outcome.lower()} for test, outcome in told])
    counts = Counter(outcome.lower() for _, outcome in told)
    return ", ".join(f"{number} {outcome}" for outcome, number in counts.items())


def speeds(work: Path, results: Path) -> str:
    machine = (work / "speeds.txt").read_text().splitlines()[0]
    shares = [row for row in read_csv(results / "speeds.csv") if row["share_of_limit"]]
    best = max(shares, key=lambda row: float(row["share_of_limit"]))
    return f"{machine}; {best['case']}, {best['variant']}: {best['share_of_limit']} of it"


def trained(work: Path, results: Path) -> str:
    run = work / "run"
    for name in ("stages.csv", "hold.csv"):
        if (run / name).exists():
            shutil.copy(run / name, results)
    phases = json.loads((run / "phases.json").read_text())
    told = [f"{phase['name']} {phase['steps']} steps{' to its end' * phase['finished']}" for phase in phases]
    if (run / "stages.csv").exists():
        told += [f"stage {row['stage']} {float(row['accuracy']):.4f}" for row in read_csv(run / "stages.csv")]
    hardware = json.loads((run / "hardware.json").read_text())[-1]
    told += [*hardware["gpus"], f"torch {hardware['torch']}", f"commit {hardware['commit']}"]
    return ", ".join(told)


def evaluated(work: Path, results: Path) -> str:
    (found,) = (work / "run" / "evaluations").rglob("evaluation.json")
    for name in ("evaluation.csv", "probes.csv"):
        if found.with_name(name).exists():
            shutil.copy(found.with_name(name), results)
    known = json.loads(found.read_text())
    told = [f"{row['right']}/{row['samples']} at {length}" for length, row in known["lengths"].items()]
    for row in known["retention"].values():
        rate = f"{row['rate_low']:.2g} to {row['rate_high']:.2g}"
        told.append(f"{row['lost']} memories lost in {row['exposure']} segments, a rate of {rate}")
    return ", ".join(told)


FIGURES = {
    "tests": tests,
    "speeds": speeds,
    "train": trained,
    "hold": trained,
    "evaluate": evaluated,
    "longest": evaluated,
}

part, work, results, code, seconds = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), *sys.argv[4:]
try:
    figures = FIGURES[part](work, results)
except (OSError, ValueError, KeyError, IndexError) as error:
    # What has failed may have left nothing, or half of it.
    figures = f"no figures: {type(error).__name__}: {error}"
# On one line, and without what would have to be quoted.
told = " ".join(figures.replace(",", ";").split())
row = {"part": part, "exit_code": code, "seconds": seconds, "figures": told}
append_csv(results / "summary.csv", [row], list(row))
