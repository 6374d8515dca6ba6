"""Front door: `rmt-lightning`, or `python -m rmt_lightning`, tells the version and the other front doors."""

from __future__ import annotations

import rmt_lightning
from rmt_lightning.app.console import Parser, command

DOORS = {
    "train": "train a model, go on with a run, or run a sweep",
    "evaluate": "test a run on inputs of any length, or on a published set",
    "ask": "ask an exported model about a text",
    "export": "make a folder of a run's model that from_pretrained opens",
    "plot": "draw one figure of runs, for a paper or a talk",
    "report": "compare runs on one HTML page",
    "attend": "draw what memory attends to",
    "flops": "compare the FLOPs of full attention with those of a recurrent model",
    "dashboard": "lay out the workspace on Weights & Biases",
    "lm_eval": "the lm-evaluation-harness, for exported models",
}


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(
        prog="rmt-lightning",
        usage="rmt-lightning [--version]",
        description="Recurrent Memory Transformers on PyTorch Lightning. The commands are:",
    )
    parser.add_argument("--version", action="version", version=f"rmt_lightning {rmt_lightning.__version__}")
    parser.epilog = "Each has --help."
    parser.parse_args(arguments)
    print(parser.description)
    for door, what in DOORS.items():
        print(f"  {f'python -m rmt_lightning.{door}':36}{what}")
    print(parser.epilog)


run = command(main)

if __name__ == "__main__":
    run()
