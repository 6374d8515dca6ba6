"""Are some facts always lost and others never? Tell each of many sets of facts to several streams of noise.

    python experiments/lessons/by_facts.py outputs/reasoning --results experiments/lessons/by_facts.csv

Facts and noise are those of training: what is lost here is not lost for being new. With `--split validation` the facts
are new, and the noise is the same. A row of the table says how many sets of facts were still known, after so many
segments of noise, to 0, 1, … of their streams. A second table beside it, by_facts_sets.csv, names the sets and says to
how many streams each was known at the end.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import cast

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

from rmt_lightning.app.build import load
from rmt_lightning.core.files import write_csv
from rmt_lightning.core.run_folder import CHECKPOINTS, CONFIG, LAST
from rmt_lightning.models.recurrence import Segment
from rmt_lightning.tasks.facts import Split
from rmt_lightning.tasks.noise import token_ids
from rmt_lightning.training.classification import FactClassifier

ASKED_AFTER = (0, 1, 2, 4, 8, 16, 32, 64)
SETS, STREAMS = 150, 6


@torch.inference_mode()
def known(run: Path, split: Split) -> tuple[list[dict[str, int]], list[dict[str, object]]]:
    """How many of the sets are known to how many streams, after each number of segments; and which at the end."""
    parts = load(cast(DictConfig, OmegaConf.load(run / CONFIG)), run, run / CHECKPOINTS / LAST)
    classifier, placement = cast(FactClassifier, parts.classifier).eval(), parts.data.placement
    rng = np.random.default_rng(0)
    examples = [placement.task.draw(rng, split) for _ in range(SETS)]

    def over(text: torch.Tensor, sentences: list[str], at_end: bool) -> Segment:
        """Noise (B, S) with sentences written over its beginning or its end, the same for all streams of a set."""
        text = text.clone()
        for number, ids in enumerate(token_ids(placement.tokenizer, sentences)):
            rows = slice(number * STREAMS, (number + 1) * STREAMS)
            text[rows, slice(-len(ids), None) if at_end else slice(len(ids))] = torch.tensor(ids)
        return Segment(text)

    answers = torch.tensor([example.answer for example in examples]).repeat_interleave(STREAMS)
    first, *noise = parts.data.noise("train", max(ASKED_AFTER) + 2, range(SETS * STREAMS))
    model, rows = classifier.model, []
    told = over(first, [" ".join(example.facts) for example in examples], at_end=False)
    _, state = model.step(told, model.initial_state(len(first)))
    for segments, text in enumerate(noise):
        if segments in ASKED_AFTER:
            question = over(text, [example.question for example in examples], at_end=True)
            scores = classifier.score(model.readout(model.step(question, state)[0], question))
            right = (scores.argmax(dim=1) == answers).view(SETS, STREAMS).sum(dim=1)
            counts = torch.bincount(right, minlength=STREAMS + 1).tolist()
            rows.append({"segments": segments} | {f"known_to_{n}": count for n, count in enumerate(counts)})
            print(rows[-1], flush=True)
        _, state = model.step(Segment(text), state)
    sets: list[dict[str, object]] = [
        {"facts": " ".join(example.facts), "question": example.question, "known_to": int(streams)}
        for example, streams in zip(examples, right, strict=True)
    ]
    return rows, sets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--split", choices=("train", "validation"), default="train")
    given = parser.parse_args()
    rows, sets = known(given.run, given.split)
    write_csv(given.results, rows)
    write_csv(given.results.with_name(f"{given.results.stem}_sets.csv"), sets)


if __name__ == "__main__":
    main()
