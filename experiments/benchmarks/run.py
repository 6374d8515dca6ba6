"""How fast training, reading, writing and starting are, beside the published way and the machine's own limit.

make bench                              all cases, some minutes on 2 cores; on a GPU if there is one
make bench ARGS="--only train/tiny"     some of them

Variants of a case take turns, so that whatever else runs on the machine burdens all of them alike. A row is the median
of a variant's turns; the first variant is what the others are compared with. The share of the limit is that of the best
product that was measured in the same process, and counts the products of all rows, also of those that are left out.
On a GPU a row has the megabytes that the last turn has taken above those that were there before it, too.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import chain, count
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from published import PublishedDecoder, PublishedEncoder
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import default_collate
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, GPT2Config, LlamaConfig, PreTrainedModel

from rmt_lightning import (
    ARMT,
    Decoder,
    Detect,
    Encoder,
    FactClassifier,
    Placement,
    Prose,
    RMTDecoder,
    RMTEncoder,
    TinyBert,
    generate,
)
from rmt_lightning.analysis.extrapolation import replies, score_length
from rmt_lightning.core.files import write_csv
from rmt_lightning.tasks.corpus import tokenize
from rmt_lightning.tasks.datamodule import FactDataset
from rmt_lightning.tasks.placement import Key, side_by_side
from rmt_lightning.training.callbacks.hardware import make_fast, multiply_fast
from rmt_lightning.training.optimization import WarmupDecay
from rmt_lightning.training.trainer import CompileMode, compile_step

SEGMENT, MEMORY, VOCABULARY = 128, 10, 2000
TEXT = SEGMENT - MEMORY - RMTEncoder.NUM_SPECIAL_TOKENS
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COMPILED: dict[str, CompileMode] = {"compiled": "default", "graphs": "reduce-overhead"}
# The first turns warm up: they compile, and a GPU's second one records graphs.
WARMING_UP = 1 if DEVICE == "cpu" else 3
PROSE = Prose(documents=200)
TOKENIZER = TinyBert(vocabulary_size=VOCABULARY).tokenizer(chain.from_iterable(PROSE.documents("train")))


class Size(NamedTuple):
    """A backbone, and how many rows a step of training and a turn of reading have."""

    width: int
    layers: int
    heads: int
    batch: int

    def encoder(self, attention: str = "sdpa") -> PreTrainedModel:
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=VOCABULARY, hidden_size=self.width, num_hidden_layers=self.layers,
            num_attention_heads=self.heads, intermediate_size=4 * self.width,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        return AutoModel.from_config(config, add_pooling_layer=False, attn_implementation=attention).to(DEVICE)


# A GPU is idle with fewer rows.
SIZES = {
    "tiny": Size(128, 4, 4, 8 if DEVICE == "cpu" else 32),
    "MiniLM": Size(384, 6, 12, 2 if DEVICE == "cpu" else 32),
    "BERT-base": Size(768, 12, 12, 1 if DEVICE == "cpu" else 32),
}


def llama(attention: str = "sdpa") -> PreTrainedModel:
    """The shape of SmolLM2-135M, but for its vocabulary."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).to(DEVICE)


def gpt() -> PreTrainedModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=128, n_layer=4, n_head=4, n_positions=1024, bos_token_id=None, eos_token_id=None
    )
    return AutoModelForCausalLM.from_config(config).to(DEVICE).eval()


class Case(NamedTuple):
    """Something to measure.

    Attributes:
        name: kind/size/….
        variants: what takes turns; the first one is what the others are compared with.
        amount: what a turn gets done, in `unit`.
        flops: what a turn multiplies and adds in matrix products if nothing is left out; 0 if that is not counted.
    """

    name: str
    variants: dict[str, Callable[[], object]]
    amount: float
    unit: str = "tokens"
    flops: float = 0.0


def products(model: PreTrainedModel, tokens: int, segment: int) -> float:
    """FLOPs of the layers' matrix products for so many tokens, forward."""
    config = model.config
    weights = sum(weight.numel() for name, weight in model.named_parameters() if "layer" in name and weight.dim() == 2)
    attention = 2 * segment * config.hidden_size * config.num_hidden_layers
    return 2.0 * tokens * (weights + attention)


def synchronized(work: Callable[[], object]) -> Callable[[], object]:
    if DEVICE == "cpu":
        return work

    def timed() -> object:
        done = work()
        torch.cuda.synchronize()
        return done

    return timed


def autocast(precision: str) -> Any:
    return torch.autocast(DEVICE, dtype=torch.bfloat16) if precision == "bf16" else nullcontext()


def bf16_is_fast() -> bool:
    """Whether a product in bf16 is faster than one in fp32 here."""
    return rate(torch.bfloat16, 1024) > rate(torch.float32, 1024)


def rate(dtype: torch.dtype, size: int) -> float:
    """FLOPs a second of a square product."""
    left, right = (torch.randn(size, size, device=DEVICE, dtype=dtype) for _ in range(2))
    work = synchronized(lambda: left @ right)
    work()
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / min(seconds)


def limits() -> dict[str, float]:
    """The machine's best FLOPs a second, by precision, over the ways that there are to multiply."""
    best = {"fp32": 0.0, "bf16": rate(torch.bfloat16, 1024)}
    for way in ("highest", "medium") if DEVICE == "cpu" else ("highest",):
        torch.set_float32_matmul_precision(way)
        best["fp32"] = max(best["fp32"], *(rate(torch.float32, size) for size in (512, 1024, 2048)))
    torch.set_float32_matmul_precision("highest")
    if DEVICE != "cpu":
        best["bf16"] = max(rate(torch.bfloat16, size) for size in (2048, 4096, 8192))
    return best


def training_step(model: nn.Module, loss: Callable[[], Tensor], fused: bool, precision: str = "") -> Callable[[], None]:
    """A step, optimizer included."""
    parameters = [weight for weight in model.parameters() if weight.requires_grad]
    if fused:
        optimizer, _ = WarmupDecay(steps=1000, lr=1e-5).build(parameters, 1, fused=True)
    else:
        optimizer = torch.optim.AdamW(parameters, lr=1e-5)

    def step() -> None:
        optimizer.zero_grad()
        with autocast(precision):
            value = loss()
        value.backward()
        optimizer.step()

    return step


def in_fp32_or_bf16(name: str, work: Callable[[str], Callable[[], object]]) -> dict[str, Callable[[], object]]:
    """Our variants of a case, with bf16 where that pays."""
    return {name: work("")} | ({f"{name}, bf16": work("bf16")} if bf16_is_fast() else {})


def encoder_step(name: str, variant: str, segments: int) -> Callable[[], None]:
    """A step of "published" or "ours", followed by words that say how it is taken."""
    size = SIZES[name]
    ids = torch.randint(5, VOCABULARY, (size.batch, segments, TEXT), device=DEVICE)
    answers = torch.randint(6, (size.batch,), device=DEVICE)
    head = nn.Linear(size.width, 6).to(DEVICE)
    who, *how = variant.split(", ")
    precision = "bf16" if "bf16" in how else ""
    if who == "published":
        published = PublishedEncoder(size.encoder("eager" if "eager" in how else "sdpa"), MEMORY).to(DEVICE)
        return training_step(published, lambda: cross_entropy(head(published(ids)).float(), answers), False, precision)
    encoder = Encoder(size.encoder(), TOKENIZER)
    model = RMTEncoder(encoder, SEGMENT, MEMORY, gradient_checkpointing="checkpointing" in how).to(DEVICE)
    if mode := next((COMPILED[word] for word in how if word in COMPILED), None):
        compile_step(model, mode)
    return training_step(model, lambda: cross_entropy(head(model.encode(ids)).float(), answers), True, precision)


def train_encoder(name: str, segments: int) -> Case:
    tried = ["published, sdpa", "published, eager", "ours", "ours, checkpointing"]
    if DEVICE != "cpu":
        ways = ("sdpa", "eager"), ("compiled", "graphs", "checkpointing")
        tried = [f"published, {way}, bf16" for way in ways[0]] + ["ours, bf16"]
        tried += [f"ours, {way}, bf16" for way in ways[1]]
    elif bf16_is_fast():
        tried.append("ours, bf16")
    tokens = SIZES[name].batch * segments * SEGMENT
    flops = 3 * products(SIZES[name].encoder(), tokens, SEGMENT)
    steps = {variant: encoder_step(name, variant, segments) for variant in tried}
    return Case(f"train/{name}/{segments} segments", steps, tokens, flops=flops)


def memory_of_a_step(variant: str, segments: int) -> tuple[float]:
    """MB of a step above what one on a single segment has taken. For a process of its own."""
    encoder_step("tiny", variant, 1)()
    before = peak()
    step = encoder_step("tiny", variant, segments)
    step()
    step()
    return (round(peak() - before),)


def peak() -> float:
    """Largest memory so far, in MB: of the GPU, or of this process (Linux) without that of the one which began it."""
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    (line,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(line) * 1024 / 1e6


def train_decoder(segments: int) -> Case:
    ids = torch.randint(5, VOCABULARY, (1, segments, SEGMENT - 2 * MEMORY), device=DEVICE)

    def published(attention: str) -> Callable[[], None]:
        model = PublishedDecoder(llama(attention), MEMORY).to(DEVICE)
        return training_step(
            model, lambda: cross_entropy(model(ids).flatten(0, 2)[:-1], ids.flatten()[1:]), fused=False
        )

    def ours(precision: str) -> Callable[[], None]:
        model = RMTDecoder(Decoder(llama(), TOKENIZER), SEGMENT, MEMORY).to(DEVICE)

        def loss() -> Tensor:
            hidden = torch.cat([reading.hidden for reading in model.read(ids)], dim=1)
            return cross_entropy(model.logits(hidden[0, :-1]).float(), ids.flatten()[1:])

        return training_step(model, loss, True, precision)

    variants = {"published, sdpa": published("sdpa"), "published, eager": published("eager")}
    variants |= in_fp32_or_bf16("ours", ours)
    tokens = segments * SEGMENT
    return Case(f"train/Llama-135M/{segments} segments", variants, tokens, flops=3 * products(llama(), tokens, SEGMENT))


def stream(name: str, batch: int, segments: int) -> Case:
    size = SIZES[name]
    ids = torch.randint(5, VOCABULARY, (batch, segments, TEXT), device=DEVICE)
    published = reader("published", name)
    ours, compiled = reader("ours", name), reader("ours", name)
    compile_step(compiled, "default" if DEVICE == "cpu" else "reduce-overhead")

    def read(model: nn.Module, precision: str = "") -> Callable[[], Tensor]:
        def work() -> Tensor:
            with torch.inference_mode(), autocast(precision):
                return model.encode(iter(ids.unbind(dim=1)))

        return work

    variants: dict[str, Callable[[], object]] = {"published, sdpa": torch.no_grad()(lambda: published(ids))}
    if DEVICE != "cpu":
        variants = {"published, sdpa, bf16": torch.no_grad()(autocast("bf16")(lambda: published(ids)))}
        variants["ours, graphs, bf16"] = read(compiled, "bf16")
    variants |= in_fp32_or_bf16("ours", partial(read, ours))
    if DEVICE == "cpu" and segments > 8:  # to compile takes as long as many segments
        variants["ours, compiled"] = read(compiled)
    tokens = batch * segments * SEGMENT
    return Case(f"stream/{name}/batch {batch}", variants, tokens, flops=products(size.encoder(), tokens, SEGMENT))


def reader(who: str, name: str) -> Any:
    """The published loop or our model around a backbone of a size, for reading."""
    if who == "published":
        return PublishedEncoder(SIZES[name].encoder(), MEMORY).to(DEVICE).eval()
    return RMTEncoder(Encoder(SIZES[name].encoder(), TOKENIZER), SEGMENT, MEMORY).to(DEVICE).eval()


def schedules(segment: int, tokens: int, full_attention: bool) -> Case:
    """A text read by ARMT on a Llama, its cells in two orders (arXiv 2506.05229), and perhaps by the Llama alone."""
    segments, precision = tokens // segment, "" if DEVICE == "cpu" else "bf16"

    def read(schedule: Any) -> Callable[[], None]:
        model = ARMT(Decoder(llama(), TOKENIZER), segment, MEMORY, schedule=schedule).to(DEVICE).eval()
        ids = torch.randint(5, VOCABULARY, (1, segments, model.text_length), device=DEVICE)

        def work() -> None:
            with torch.no_grad(), autocast(precision):
                for _ in model.read(ids):
                    pass

        return work

    variants: dict[str, Callable[[], object]] = {f"ours, {name}": read(name) for name in ("vertical", "diagonal")}
    if full_attention:
        ids, plain = torch.randint(5, VOCABULARY, (1, tokens), device=DEVICE), llama().base_model.eval()
        variants["full attention"] = torch.no_grad()(autocast(precision)(lambda: plain(ids, use_cache=False)))
    return Case(f"schedule/Llama-135M/{tokens:,} tokens in segments of {segment:,}", variants, tokens)


def growth(variant: str, segments: int) -> tuple[float, float]:
    """Seconds and MB to read a text of one row, the memory above that of a single segment. For a process of its own."""
    make_fast()
    model = reader(variant, "tiny")
    read = model if variant == "published" else lambda ids: model.encode(iter(ids.unbind(dim=1)))
    with torch.no_grad():
        ids = torch.randint(5, VOCABULARY, (1, segments, TEXT), device=DEVICE)
        read(ids[:, :1])
        before, began = peak(), time.perf_counter()
        synchronized(lambda: read(ids))()
        return round(time.perf_counter() - began, 3), round(peak() - before)


def placement(folder: str) -> Placement:
    return Placement(Detect(), tokenize(PROSE, TOKENIZER, folder), TOKENIZER, TEXT, seed=1)


def evaluating(segments: int = 16, samples: int = 64) -> Case:
    """What `evaluate` does: questions are made, set into noise, read, answered; the published loop reads the same."""
    with tempfile.TemporaryDirectory() as folder:
        made = placement(folder)
        module = FactClassifier(reader("ours", "tiny"), made.task.answers).to(DEVICE).eval()
        published, batch = reader("published", "tiny"), 32 if DEVICE == "cpu" else 256

        def loop() -> None:
            for start in range(0, samples, batch):
                rows = range(start, min(start + batch, samples))
                texts = [made.sample("test", Key(segments, row)).segments for row in rows]
                stream = [ids for ids, _ in side_by_side([(segments, text) for text in texts])]
                with torch.no_grad():
                    published(torch.stack(stream, dim=1).to(DEVICE))

        variants: dict[str, Callable[[], object]] = {
            "published, sdpa": loop,
            "ours": lambda: score_length(
                replies(module, made, Key(segments, 0), samples, batch, torch.device(DEVICE)), made, Key(segments, 0)
            ),
        }
        return Case(f"evaluate/tiny/{segments} segments", variants, samples * segments * SEGMENT)


def data(segments: int = 7) -> Case:
    """The samples of a training step, beside the step itself."""
    with tempfile.TemporaryDirectory() as folder:
        samples, size = FactDataset(placement(folder), "train"), SIZES["tiny"].batch
        numbers = count()
        variants: dict[str, Callable[[], object]] = {
            "ours, the step": encoder_step("tiny", "ours", segments),
            "ours, its samples": lambda: default_collate([samples[Key(segments, next(numbers))] for _ in range(size)]),
        }
        return Case(f"data/tiny/{segments} segments", variants, size * segments * SEGMENT)


def write(segment: int, batch: int) -> Case:
    """Words written by a small GPT-2, beside what Hugging Face writes with the same backbone without memory."""
    new = 3 * segment // 4
    ids = torch.randint(5, VOCABULARY, (batch, segment // 8), device=DEVICE)
    plain = gpt()
    ours = RMTDecoder(Decoder(gpt(), TOKENIZER), segment, MEMORY).to(DEVICE).eval()
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    variants = {
        "Hugging Face, no memory": lambda: plain.generate(ids, attention_mask=torch.ones_like(ids), **options),
        "ours": lambda: generate(ours, ids, new),
    }
    return Case(f"write/tiny/segment {segment}, batch {batch}", variants, batch * new)


def start(name: str) -> Case:
    def work() -> None:
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([sys.executable, *STARTS[name]], cwd=folder, capture_output=True)

    return Case(name, {"ours": work}, 1, "starts")


# 14 segments of BERT-base would take as long as all else together.
LENGTHS = [("tiny", 7), ("tiny", 14), ("MiniLM", 7), ("MiniLM", 14), ("BERT-base", 7)]
# Size, batch and segments, the fewer of them the longer they take.
STREAMS = [("tiny", 1, 16), ("tiny", 16, 16), ("MiniLM", 1, 16), ("MiniLM", 16, 2), ("BERT-base", 1, 4)]
if DEVICE != "cpu":
    STREAMS = [("tiny", 1, 64), ("MiniLM", 1, 64), ("MiniLM", 64, 64), ("BERT-base", 64, 16)]
# Segment, tokens, and whether full attention, which knows no segments, is measured beside it.
SCHEDULES = [(64, 1024, False), (256, 1024, True)]
if DEVICE != "cpu":
    SCHEDULES = [(512, 2**17, False), (1024, 2**17, True), (4096, 2**17, False)]
TRAIN = ("-m", "rmt_lightning.train")
STARTS = {
    "start/import": ("-c", "import rmt_lightning"),
    "start/import of a model": ("-c", "from rmt_lightning import RMTEncoder"),
    "start/--help": (*TRAIN, "--help"),
    "start/typing mistake": (*TRAIN, "optim.rl=1"),
    "start/run of one step": (*TRAIN, "trainer.max_steps=1", "test.segments=[1]", "test.samples=1"),
}
CASES: dict[str, Callable[[], Case]] = {
    **{f"train/{n}/{t} segments": lambda n=n, t=t: train_encoder(n, t) for n, t in LENGTHS},
    "train/Llama-135M/7 segments": lambda: train_decoder(7),
    **{f"stream/{n}/batch {b}": lambda n=n, b=b, t=t: stream(n, b, t) for n, b, t in STREAMS},
    "evaluate/tiny": evaluating,
    "data/tiny": data,
    **{f"write/tiny/segment {s}, batch {b}": lambda s=s, b=b: write(s, b) for s in (128, 512) for b in (1, 16)},
    **{name: lambda name=name: start(name) for name in STARTS},
    **{f"schedule/{s}": lambda s=s, n=n, f=f: schedules(s, n, f) for s, n, f in SCHEDULES},
}
# What is measured in a process of its own, what of, and the names of what comes out.
ALONE: dict[str, tuple[Callable[[str, int], tuple[float, ...]], list[tuple[str, int]], tuple[str, ...]]] = {
    "memory": (
        memory_of_a_step,
        [(who, n) for n in (7, 64) for who in ("published, sdpa", "ours", "ours, checkpointing")],
        ("megabytes",),
    ),
    "growth": (
        growth,
        [(who, n) for n in (1, 16, 256, 4096) for who in ("published", "ours")],
        ("seconds", "megabytes"),
    ),
}


def measure(case: Case, turns: int, best: dict[str, float]) -> list[dict[str, object]]:
    seconds: dict[str, list[float]] = {name: [] for name in case.variants}
    megabytes = dict[str, float]()
    for turn in range(-WARMING_UP, turns):
        for name, work in case.variants.items():
            torch.set_float32_matmul_precision("highest")
            if name.startswith("ours"):
                multiply_fast()
            if DEVICE == "cuda":
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated() / 1e6
            began = time.perf_counter()
            synchronized(work)()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - began)
            if DEVICE == "cuda":
                megabytes[name] = round(peak() - before)
    first = statistics.median(next(iter(seconds.values())))
    rows = []
    for name, measured in seconds.items():
        median = statistics.median(measured)
        share = case.flops / median / best["bf16" if "bf16" in name else "fp32"]
        rows.append(
            {
                "case": case.name, "variant": name, "seconds": round(median, 4), "fastest": round(min(measured), 4),
                "rate": round(case.amount / median, 1), "unit": case.unit, "times_as_fast": round(first / median, 2),
                "share_of_limit": round(share, 2) if share else "", "megabytes": megabytes.get(name, ""),
            }
        )  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], help="cases whose names begin so")
    parser.add_argument("--turns", type=int, default=3, help="of each variant")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results.csv")
    options = parser.parse_args()
    best = limits()
    print(f"{DEVICE}, {torch.get_num_threads()} threads: at best {best['fp32'] / 1e9:.0f} GFLOP/s in fp32, ", end="")
    print(f"{best['bf16'] / 1e9:.0f} in bf16")
    rows: list[dict[str, object]] = []
    for name, make in CASES.items():
        if not name.startswith(tuple(options.only)):
            continue
        torch.compiler.reset()  # it compiles a method for so many models, and no more
        for row in measure(make(), options.turns, best):
            print("  ".join(f"{value}" for value in row.values()), flush=True)
            rows.append(row)
        write_csv(options.output, rows)
    if DEVICE == "cpu" and sys.platform != "linux":
        return
    for name, (measure_alone, tried, columns) in ALONE.items():
        if not name.startswith(tuple(options.only)):
            continue
        # A process for each measurement, for a process never gives its peak back.
        with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            measured = pool.starmap(measure_alone, tried, chunksize=1)
        table: list[dict[str, object]] = []
        for (variant, segments), found in zip(tried, measured, strict=True):
            table.append({"variant": variant, "segments": segments} | dict(zip(columns, found, strict=True)))
            print(name, *table[-1].values(), sep="  ", flush=True)
        write_csv(options.output.parent / f"{name}.csv", table)


if __name__ == "__main__":
    main()
