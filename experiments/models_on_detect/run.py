"""Train every model on the same samples for the same steps, test each on longer inputs, and put them side by side.

python experiments/models_on_detect/run.py                  # all models; goes on where it was interrupted
python experiments/models_on_detect/run.py --only lstm ntm
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from rmt_lightning.core.files import read_csv, write_csv

HERE = Path(__file__).parent
TRAINED_TO = 7
# 51 tokens of text in each segment, whatever a model puts around them: all of them read the same samples.
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
    parser.add_argument("--results", type=Path, default=HERE, help="where the table goes")
    parser.add_argument("--train", nargs="*", default=[], help="further settings of all runs, curriculum.steps=25")
    given = parser.parse_args()
    for name in given.only:
        run = folder(given.runs, name)
        if not (run / "evaluation.csv").exists():
            settings = [*TRAIN, *MODELS[name].split(), *given.train]
            asked = [f"resume={run}"] if (run / "config.yaml").exists() else settings
            call("train", *asked, f"hydra.run.dir={run}")
        call("evaluate", f"checkpoint={run}", *EVALUATE)
    runs = {name: folder(given.runs, name) for name in MODELS}
    report({name: run for name, run in runs.items() if (run / "evaluations").exists()}, given.results)


def folder(runs: Path, name: str) -> Path:
    return runs / name.replace(" ", "_")


def call(door: str, *settings: str) -> None:
    """Run a front door in a process of its own."""
    if code := subprocess.run([sys.executable, "-m", f"rmt_lightning.{door}", *settings]).returncode:
        sys.exit(code)


def report(runs: dict[str, Path], results: Path) -> None:
    """Write results.csv: a row for each model and length."""
    lengths = {name: read_csv(next(run.glob("evaluations/*/evaluation.csv"))) for name, run in runs.items()}
    rows = [{"model": name, "trained_to": TRAINED_TO} | row for name in runs for row in lengths[name]]
    write_csv(results / "results.csv", rows)


if __name__ == "__main__":
    main()
