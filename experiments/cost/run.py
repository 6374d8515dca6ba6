"""What it costs to read 1 … 128 segments all at once, and one after the other with a memory.

python experiments/cost/run.py
"""

from __future__ import annotations

import resource
import time
from multiprocessing import get_context
from pathlib import Path

import torch

from rmt_lightning import Detect, FullAttention, RMTEncoder, SegmentModel, TinyBert
from rmt_lightning.core.files import write_csv

TEXT = 51  # tokens of text in a segment; RMT adds 10 memory and 3 special tokens
SEGMENTS = (1, 2, 4, 8, 16, 32, 64, 128)
MODELS = ("RMT", "full attention, fused", "full attention, written out")


def build(name: str) -> SegmentModel:
    backbone = TinyBert(max_positions=TEXT * max(SEGMENTS) + 2)
    encoder = backbone.encoder(backbone.tokenizer(Detect().sentences()))
    if name == "RMT":
        return RMTEncoder(encoder, segment_length=TEXT + 13, memory_size=10)
    if name.endswith("written out"):
        encoder.model.set_attn_implementation("eager")
    return FullAttention(encoder, segment_length=TEXT)


@torch.inference_mode()
def measure(name: str, segments: int) -> dict[str, object]:
    """Seconds of CPU time, the best of three, and what the first of them adds to the memory of program and weights."""
    torch.set_num_threads(1)
    model = build(name).eval()
    text = torch.randint(3, 300, (1, segments, TEXT))
    seconds, peaks = [], [peak()]
    for _ in range(3):
        began = time.process_time()
        model.encode(iter(text.unbind(dim=1)))
        seconds.append(time.process_time() - began)
        peaks.append(peak())
    megabytes = peaks[1] - peaks[0]
    return {"model": name, "segments": segments, "seconds": round(min(seconds), 4), "megabytes": round(megabytes, 1)}


def peak() -> float:
    """Largest resident memory of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def main() -> None:
    # A process for each measurement, for a process never gives its peak back.
    with get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        rows = pool.starmap(measure, [(name, segments) for name in MODELS for segments in SEGMENTS], chunksize=1)
    write_csv(Path(__file__).parent / "measured.csv", rows)


if __name__ == "__main__":
    main()
