"""Compares untrained memories round a language model with the model alone, on one segment of text: results.csv.

python experiments/smollm2/run.py smollm2 wikitext-2/train.txt
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from rmt_lightning import ARMT, Pretrained, RMTDecoder
from rmt_lightning.core.files import write_csv
from rmt_lightning.models.likelihood import likelihood

SEGMENT, TOKENS = 512, 400


def run(folder: str, text: str) -> None:
    backbone = Pretrained(folder)
    tokenizer = backbone.tokenizer([])
    ids = torch.tensor([tokenizer(Path(text).read_text(encoding="utf-8")[:6000])["input_ids"][:TOKENS]])
    rows: list[dict[str, Any]] = []
    for dtype in (torch.float32, torch.bfloat16):
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        with torch.no_grad():
            logits = plain(ids).logits.float()
        loss = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])
        rows.append({"model": "plain", "memory_size": 0, "dtype": dtype, "perplexity": math.exp(loss)})
        for kind, memory_size in ((RMTDecoder, 0), (RMTDecoder, 10), (ARMT, 8)):
            # Memory tokens begin at random.
            torch.manual_seed(1)
            model = kind(backbone.decoder(tokenizer), segment_length=SEGMENT, memory_size=memory_size)
            found = likelihood(model.to(dtype).eval(), ids, torch.tensor([1])).log.item() / (TOKENS - 1)
            rows.append(
                {"model": kind.__name__, "memory_size": memory_size, "dtype": dtype, "perplexity": math.exp(-found)}
            )
            print(rows[-1], flush=True)
    write_csv(Path(__file__).with_name("results.csv"), rows)


if __name__ == "__main__":
    run(*sys.argv[1:])
