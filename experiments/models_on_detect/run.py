"""Train every model on the same samples for the same steps, test each on longer inputs, and put them side by side.

python experiments/models_on_detect/run.py                  # all models; goes on where it was interrupted
python experiments/models_on_detect/run.py --only lstm ntm
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch.utils._pytree import tree_leaves

from rmt_lightning.app.build import Parts, load
from rmt_lightning.core.files import read_csv, write_csv
from rmt_lightning.core.run_folder import CHECKPOINTS, CONFIG, LAST
from rmt_lightning.reporting import figures

HERE = Path(__file__).parent
TRAINED_TO = 7
TEXT = 51  # tokens of text in each segment, whatever a model puts around them: all of them read the same samples
MODELS = {
    "rmt_encoder": "model=rmt_encoder data.segment_length=64",
    "no memory": "model=rmt_encoder model.memory_size=0 data.segment_length=54",
    "rmt_decoder": "model=rmt_decoder backbone=tiny_gpt data.segment_length=71",
    "transformer_xl": "model=transformer_xl backbone=tiny_gpt data.segment_length=51",
    "rmt_transformer_xl": "model=rmt_transformer_xl backbone=tiny_gpt data.segment_length=71",
    "full_attention": "model=full_attention data.segment_length=51",
    "longformer": "model=longformer data.segment_length=51",
    "bigbird": "model=bigbird data.segment_length=51",
    "lstm": "model=lstm data.segment_length=51",
    "memory_network": "model=memory_network data.segment_length=51",
    "ntm": "model=ntm data.segment_length=51",
}
TRAIN = (
    "task=detect",
    f"curriculum.max_segments={TRAINED_TO}",
    # Equal steps: no stage ends before its budget is spent, and none stops the run.
    "curriculum.steps=100",
    "curriculum.validations=1000",
    "curriculum.when_stuck=continue",
    "data.steps_per_epoch=50",
    "data.validation_samples=128",
    f"test.segments=[1,{TRAINED_TO}]",
    "test.samples=32",
)
EVALUATE = ("segments=[1,2,3,4,5,6,7,8,9,10,12,15,20,32]", "samples=128", "batch_size=64")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=MODELS, default=MODELS, metavar="MODEL")
    parser.add_argument("--runs", type=Path, default=Path("outputs/models_on_detect"), help="where the run folders are")
    parser.add_argument("--results", type=Path, default=HERE, help="where tables and figure go")
    parser.add_argument("--train", nargs="*", default=[], help="further settings of all runs, curriculum.steps=25")
    given = parser.parse_args()
    for name in given.only:
        run = folder(given.runs, name)
        if not (run / "evaluation.csv").exists():
            go_on = [f"resume={run}"] if (run / CONFIG).exists() else [*TRAIN, *MODELS[name].split(), *given.train]
            peak = call("train", *go_on, f"hydra.run.dir={run}")
            (run / "peak_megabytes").write_text(str(peak))
        call("evaluate", f"checkpoint={run}", *EVALUATE)
    runs = {name: folder(given.runs, name) for name in MODELS}
    report({name: run for name, run in runs.items() if (run / "evaluations").exists()}, given.results)


def folder(runs: Path, name: str) -> Path:
    return runs / name.replace(" ", "_")


def call(door: str, *settings: str) -> float:
    """Run a front door in a process of its own. Returns its peak memory in MB."""
    process = subprocess.Popen([sys.executable, "-m", f"rmt_lightning.{door}", *settings])
    _, status, usage = os.wait4(process.pid, 0)
    if code := os.waitstatus_to_exitcode(status):
        sys.exit(code)
    return usage.ru_maxrss / 1e3


def report(runs: dict[str, Path], results: Path) -> None:
    """Write models.csv (a row for each model), results.csv (a row for each of its lengths) and the figure."""
    lengths = {name: read_csv(next(run.glob("evaluations/*/evaluation.csv"))) for name, run in runs.items()}
    write_csv(results / "models.csv", [summary(name, run, lengths[name]) for name, run in runs.items()])
    rows = [{"model": name, "trained_to": TRAINED_TO} | row for name in runs for row in lengths[name]]
    write_csv(results / "results.csv", rows)
    figures.save(figures.models(rows), results / "figure")


def summary(name: str, run: Path, lengths: list[dict[str, str]]) -> dict[str, Any]:
    """Size, cost and accuracy of a model."""
    config = OmegaConf.load(run / CONFIG)
    assert isinstance(config, DictConfig)
    parts = load(config, run, run / CHECKPOINTS / LAST)
    model = parts.classifier.model
    assert model.text_length == TEXT, f"{name} reads {model.text_length} tokens of text a segment, the others {TEXT}"
    _, state = model(torch.ones(1, TRAINED_TO, TEXT, dtype=torch.long))
    accuracy = {row["segments"]: row["accuracy"] for row in lengths}
    return {
        "model": name,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "state_bytes_at_7": sum(leaf.nbytes for leaf in tree_leaves(state) if leaf is not None),
        "steps": sum(int(stage["steps"]) for stage in read_csv(run / "stages.csv")),
        "seconds": round(sum(float(stage["seconds"]) for stage in read_csv(run / "stages.csv"))),
        "tokens_per_second": round(training_speed(parts)),
        "peak_megabytes": round(float((run / "peak_megabytes").read_text())),
    } | {f"accuracy_at_{length}": accuracy.get(str(length), "too long") for length in (1, 7, 10, 15, 20, 32)}


def training_speed(parts: Parts, steps: int = 5) -> float:
    """Text tokens a second of training on 7 segments, weights included: the median step, after one to warm up."""
    classifier = parts.classifier
    optimizer = torch.optim.AdamW(classifier.parameters())
    stream, labels, _ = parts.data.stream("train", TRAINED_TO, range(parts.data.batch_size))
    segments = torch.stack(list(stream), dim=1)
    times = []
    for _ in range(steps + 1):
        began = time.perf_counter()
        *_, last = classifier.model.read(segments)
        loss, _ = classifier.answer(last, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - began)
    return segments.numel() / statistics.median(times[1:])


if __name__ == "__main__":
    main()
