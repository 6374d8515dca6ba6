"""Train every variant on every text with every seed; then write results.csv and the table of the README.

    python experiments/language_modeling/run.py --stories squality --wikitext wikitext-2/train.txt --seeds 1 2 --jobs 2

`squality` holds train.jsonl and dev.jsonl. What is complete is not trained again, what was interrupted goes on.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean
from typing import Any

from rmt_lightning.core.files import write_atomically, write_csv

HERE = Path(__file__).parent
TEXT_LENGTH, MEMORY = 32, 5
SETTINGS = [
    "task=language_modeling", "model.width=96", "model.layers=3", "model.heads=4", "model.dropout=0.1",
    "backbone.vocabulary_size=1500", "data.batch_size=8", "data.num_segments=10", "data.steps_per_epoch=200",
    "optim.lr=2e-3", "optim.warmup=0.1",
]  # fmt: skip


def cached(length: int) -> list[str]:
    return ["model=transformer_xl", f"model.cache_length={length}", f"data.segment_length={TEXT_LENGTH}"]


def with_memory(cache_length: int, depth: int) -> list[str]:
    return [
        "model=rmt_transformer_xl", f"model.cache_length={cache_length}", f"model.memory_size={MEMORY}",
        f"model.bptt_depth={depth}", f"data.segment_length={TEXT_LENGTH + 2 * MEMORY}",
    ]  # fmt: skip


VARIANTS = {
    "no recurrence": cached(0),
    "Transformer-XL, cache 32": cached(32),
    **{f"RMT, BPTT {depth}": with_memory(0, depth) for depth in range(5)},
    "both, cache 32, BPTT 4": with_memory(32, 4),
}


def texts(stories: Path | None, wikitext: Path | None) -> dict[str, list[str]]:
    """Each text that is given, and the steps to train on it."""
    found = {}
    if stories:
        by_document = [f"noise.path={stories}/train.jsonl", f"noise.validation_path={stories}/dev.jsonl"]
        found["stories"] = ["noise=files", "noise.field=document", *by_document, "curriculum.steps=800"]
    if wikitext:
        found["wikitext"] = ["noise=files", f"noise.path={wikitext}", "curriculum.steps=400"]
    return found


def train(folder: Path, settings: list[str]) -> None:
    """Train one run in a process of its own, on one core, unless it is complete; note how long it took."""
    if (folder / "seconds").exists():
        return
    began = time.perf_counter()
    asked = [f"resume={folder}"] if (folder / "config.yaml").exists() else [*settings, f"hydra.run.dir={folder}"]
    command = [sys.executable, "-m", "rmt_lightning.train", *asked]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    (folder / "seconds").write_text(f"{time.perf_counter() - began:.0f}")
    print(folder.name, flush=True)


def collect(folder: Path) -> dict[str, str]:
    """What a run has left."""
    with (folder / "evaluation.csv").open() as file:
        (row,) = csv.DictReader(file)
    return row | {"seconds": (folder / "seconds").read_text()}


def table(rows: list[dict[str, Any]]) -> str:
    """Mean perplexity of the seeds, and each seed's, as markdown."""
    found: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        found.setdefault((row["text"], row["variant"]), []).append(float(row["perplexity"]))
    names = list(dict.fromkeys(text for text, _ in found))
    lines = ["| variant | " + " | ".join(names) + " |", "| --- " * (1 + len(names)) + "|"]
    for variant in VARIANTS:
        seeds = [found.get((text, variant), []) for text in names]
        cells = (f"{mean(v):.2f} ({', '.join(f'{value:.2f}' for value in v)})" if v else "–" for v in seeds)
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stories", type=Path, help="left out without it")
    parser.add_argument("--wikitext", type=Path, help="left out without it")
    parser.add_argument("--outputs", type=Path, default=Path("outputs/language_modeling"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=VARIANTS, metavar="VARIANT")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    given = parser.parse_args()
    chosen = texts(given.stories, given.wikitext)
    runs = {
        (text, variant, seed): given.outputs / re.sub(r"\W+", "-", f"{text}-{variant}-{seed}")
        for seed in given.seeds
        for text in chosen
        for variant in VARIANTS
    }
    with ThreadPoolExecutor(given.jobs) as pool:
        waiting = [
            pool.submit(train, folder, [*SETTINGS, *VARIANTS[variant], *chosen[text], f"seed={seed}"])
            for (text, variant, seed), folder in runs.items()
            if variant in given.only
        ]
        for run in waiting:
            run.result()
    rows = [
        {"text": text, "variant": variant, "seed": seed, **collect(folder)}
        for (text, variant, seed), folder in runs.items()
        if (folder / "seconds").exists()
    ]
    write_csv(HERE / "results.csv", rows)
    readme = HERE / "README.md"
    filled = re.sub(r"(?s)(<!-- table -->\n).*(<!-- end -->)", rf"\1\n{table(rows)}\n\n\2", readme.read_text())
    write_atomically(readme, filled.encode())


if __name__ == "__main__":
    main()
