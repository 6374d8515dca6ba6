"""What does a memory of carried hold? Accuracy on two segments, by which facts the first one tells.

    python experiments/lessons/by_split.py outputs/carried --results experiments/lessons/by_split.csv

In the table "took, other took" means that the first segment tells of both takes, first of the one that is asked about,
and the second one of both goes.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import cast

import torch
from omegaconf import DictConfig, OmegaConf

from rmt_lightning.app.build import load
from rmt_lightning.core.files import write_csv
from rmt_lightning.core.run_folder import CHECKPOINTS, CONFIG, LAST
from rmt_lightning.tasks.placement import Key, Sample

SAMPLES, BATCH = 1024, 64


def first_segment(sample: Sample) -> str:
    """The facts of the first segment, in order, named by what they are to the question."""
    assert sample.example is not None
    support = sample.example.support
    before = [fact for fact, home in enumerate(sample.homes) if home == 0]
    names = dict(zip(support, ("took", "went"), strict=True))
    others = dict(zip(sorted({0, 1, 2, 3} - set(support)), ("other took", "other went"), strict=True))
    return ", ".join((names | others)[fact] for fact in before)


@torch.inference_mode()
def by_split(run: Path) -> list[dict[str, object]]:
    """Rows of the table."""
    parts = load(cast(DictConfig, OmegaConf.load(run / CONFIG)), run, run / CHECKPOINTS / LAST)
    placement, classifier = parts.data.placement, parts.classifier.eval()
    samples, right = Counter[str](), Counter[str]()
    for start in range(0, SAMPLES, BATCH):
        keys = [Key(2, number) for number in range(start, start + BATCH)]
        drawn = [placement.sample("validation", key) for key in keys]
        text = [torch.tensor([segment.tolist() for segment in sample.segments]) for sample in drawn]
        said = classifier(torch.stack(text)).argmax(dim=1).tolist()
        for sample, answer in zip(drawn, said, strict=True):
            samples[first_segment(sample)] += 1
            right[first_segment(sample)] += answer == sample.answer
    order = sorted(samples, key=lambda split: (split.count(",") + bool(split), split))
    return [{"first_segment": split, "right": right[split], "samples": samples[split]} for split in order]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--results", type=Path, required=True)
    given = parser.parse_args()
    rows = by_split(given.run)
    for row in rows:
        print(row)
    write_csv(given.results, rows)


if __name__ == "__main__":
    main()
