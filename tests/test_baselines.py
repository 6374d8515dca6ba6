"""What RMT is compared with: the contract of segment models, and the equations of the papers."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import SMALL
from hydra.core.global_hydra import GlobalHydra
from reference import ask_memory, turn_head, write_memory
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves, tree_map
from transformers import BigBirdModel, PreTrainedTokenizerBase

from rmt_lightning import evaluate, train
from rmt_lightning.core.errors import UserError
from rmt_lightning.models.baselines.full_attention import FullAttention
from rmt_lightning.models.baselines.lstm import LSTM
from rmt_lightning.models.baselines.memory_network import MemoryNetwork
from rmt_lightning.models.baselines.ntm import NeuralTuringMachine
from rmt_lightning.models.recurrence import Segment
from rmt_lightning.models.segment_model import SegmentModel
from rmt_lightning.models.tiny import TinyBert, TinyBigBird, TinyLongformer

S = 12
TINY = {"width": 16, "layers": 1, "heads": 2, "max_positions": 64}
Build = Callable[..., SegmentModel[Any]]
MODELS: dict[str, Build] = {
    "full_attention": lambda tokens: FullAttention(TinyBert(**TINY).encoder(tokens), S),
    "longformer": lambda tokens: FullAttention(TinyLongformer(**TINY, window=8).encoder(tokens), S),
    "bigbird": lambda tokens: FullAttention(TinyBigBird(**TINY, block_size=4).encoder(tokens), S),
    "lstm": lambda tokens, **options: LSTM(tokens, S, width=16, **options),
    "memory_network": lambda tokens, **options: MemoryNetwork(tokens, S, width=16, hops=2, slots=6, **options),
    # 12 tokens are two windows of 5 and a short one.
    "ntm": lambda tokens, **options: NeuralTuringMachine(
        tokens, S, width=16, slots=5, slot_width=4, heads=2, window=5, **options
    ),
}
RECURRENT = ("lstm", "memory_network", "ntm")


def make(name: str, tokenizer: PreTrainedTokenizerBase, **options: Any) -> SegmentModel[Any]:
    torch.manual_seed(0)
    return MODELS[name](tokenizer, **options).double()


def texts(*shape: int) -> Tensor:
    # The tokens of punctuation are among the first 100.
    return torch.randint(5, 100, shape, generator=torch.Generator().manual_seed(1))


def probe(read: Tensor) -> Tensor:
    return (read * torch.randn(read.shape[-1], dtype=read.dtype, generator=torch.Generator().manual_seed(2))).sum()


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], atol=1e-10, rtol=1e-6, msg=lambda t, name=name: f"{name}: {t}")


@pytest.mark.parametrize("name", MODELS)
def test_the_contract(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    model = make(name, tokenizer)
    ids = texts(3, 4, S)
    read = model.encode(ids)
    assert read.shape == (3, model.width)
    assert gradients(model, probe(read)).keys() == {name for name, _ in model.named_parameters()}

    # The first segment is felt at the end, and each row is read for itself.
    changed = ids.clone()
    changed[0, 0] = changed[0, 0].flip(0)
    difference = (model.encode(changed) - read).abs().amax(dim=1)
    assert difference[0] > 1e-9 and (difference[1:] < 1e-9).all()

    # A stream of segments, or one half after the other, gives what all at once give; the batch comes first in a state.
    with torch.no_grad():
        torch.testing.assert_close(model.encode(iter(ids.unbind(dim=1))), read)
        _, end = model(ids)
        _, half = model(ids[:, :2])
        resumed, after = model(ids[:, 2:], state=half)
    torch.testing.assert_close(model.readout(resumed, Segment(ids[:, -1])), read)
    torch.testing.assert_close(after, end)
    assert all(len(leaf) == 3 for leaf in tree_leaves(end) if leaf is not None)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "bigbird"])
def test_plain_ids_of_unequal_length(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Each row gives what it gives alone, wherever its padding stands. (BigBird's blocks depend on the longest row.)"""
    model = make(name, tokenizer)
    rows = [texts(1, length)[0] for length in (1, 12, 13, 40)]
    ids, mask = torch.full((5, 45), 3), torch.zeros(5, 45, dtype=torch.long)  # the last row holds nothing at all
    for number, row in enumerate(rows):
        start = (0, 2, 45 - len(row))[number % 3]
        ids[number, start : start + len(row)] = row
        mask[number, start : start + len(row)] = 1
    read = model.encode(ids, mask)
    for number, row in enumerate(rows):
        torch.testing.assert_close(read[number], model.encode(row[None])[0], atol=1e-10, rtol=1e-6)
    torch.testing.assert_close(read, model.encode(torch.where(mask.bool(), ids, 50), mask), atol=0, rtol=0)
    assert all(gradient.isfinite().all() for gradient in gradients(model, probe(read)).values())
    empty = torch.zeros(2, 30, dtype=torch.long)
    assert model.encode(empty, empty).isfinite().all()


@pytest.mark.parametrize("depth", [1, 3, -1])
@pytest.mark.parametrize("name", RECURRENT)
def test_gradients_equal_a_graph_cut_by_hand(name: str, depth: int, tokenizer: PreTrainedTokenizerBase) -> None:
    ids = texts(2, 5, S)
    model = make(name, tokenizer, bptt_depth=depth)
    own = gradients(model, probe(model.encode(ids)))
    state = model.initial_state(2)
    for number, segment in enumerate(ids.unbind(dim=1)):
        if number == 4 - depth:
            state = tree_map(Tensor.detach, state)
        hidden, state = model.step(Segment(segment), state)
    assert_same(own, gradients(model, probe(model.readout(hidden, Segment(segment)))))
    checkpointed = make(name, tokenizer, bptt_depth=depth, gradient_checkpointing=True)
    assert_same(own, gradients(checkpointed, probe(checkpointed.encode(ids))))
    whole = make(name, tokenizer)
    words = gradients(whole, probe(whole.encode(ids)))["words.weight"]
    assert torch.equal(words, own["words.weight"]) == (depth == -1)


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_autocast(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    model = make(name, tokenizer).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        read = model.encode(texts(2, 3, S))
    assert all(gradient.isfinite().all() for gradient in gradients(model, probe(read.float())).values())


@pytest.mark.parametrize("name", MODELS)
def test_learns(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Which of three words stands anywhere in two segments?"""
    model = make(name, tokenizer).float()
    head = nn.Linear(model.width, 3)
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    losses: list[float] = []
    while len(losses) < 5 or sum(losses[-5:]) > 2.5:
        assert len(losses) < 200
        ids = torch.randint(5, 100, (32, 2 * S), generator=generator)
        label = torch.randint(3, (32,), generator=generator)
        ids[torch.arange(32), torch.randint(2 * S, (32,), generator=generator)] = 100 + label
        loss = nn.functional.cross_entropy(head(model.encode(ids.view(32, 2, S))), label)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())


class Reader(nn.Module):
    """What DDP wraps: a module whose forward is all there is."""

    def __init__(self, model: SegmentModel[Any]) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model.encode(ids)


def read_in_two_processes(rank: int, meeting: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Each process reads half of a batch; the averaged gradients must be those of the whole one."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    for name in MODELS:
        options = {"bptt_depth": 1, "gradient_checkpointing": True} if name in RECURRENT else {}
        reader = Reader(make(name, tokenizer, **options))
        parallel = DistributedDataParallel(reader)
        for segments in (1, 4, 2):
            ids = texts(4, segments, S)
            expected = gradients(reader, probe(reader(ids)) / 2)
            assert_same(gradients(reader, probe(parallel(ids[2 * rank : 2 * rank + 2]))), expected)
    # In this order: what still uses the process group when it ends may wait for it for ever.
    del parallel
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(read_in_two_processes, (tmp_path / "meeting", tokenizer), nprocs=2)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RMT_LIGHTNING_CACHE", environment["RMT_LIGHTNING_CACHE"])
    yield tmp_path
    GlobalHydra.instance().clear()


@pytest.mark.parametrize(
    "name", ["longformer", "lstm", *(pytest.param(n, marks=pytest.mark.soak) for n in RECURRENT if n != "lstm")]
)
def test_a_run(name: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The real commands: a run is trained, and evaluated from its checkpoint."""
    tiny = ["curriculum.max_segments=2", "curriculum.steps=2", "data.steps_per_epoch=2", "test.segments=[1,26]"]
    if name in RECURRENT:
        tiny += ["model.width=16", "model.bptt_depth=1"]

    def run(door: ModuleType, *settings: str) -> None:
        GlobalHydra.instance().clear()
        monkeypatch.setattr(sys, "argv", [door.__name__, *settings])
        door.run()

    run(train, *SMALL, f"model={name}", *tiny, "hydra.run.dir=run")
    run(evaluate, "checkpoint=run", "samples=8", "segments=[1,26]", "device=cpu")
    printed = capsys.readouterr()
    assert printed.err == ""
    assert [row["stage"] for row in rows(here / "run" / "stages.csv")] == ["1", "2"]
    (found,) = (here / "run" / "evaluations").iterdir()
    end, again = rows(here / "run" / "evaluation.csv"), rows(found / "evaluation.csv")
    assert [(row["segments"], row["right"]) for row in again] == [(row["segments"], row["right"]) for row in end]
    # What sees all at once stops at its positions, and says so; what reads on does not.
    assert [row["segments"] for row in end] == (["1", "26"] if name in RECURRENT else ["1"])
    told = [line for line in printed.out.splitlines() if "too long for positions" in line and "25 segments fit" in line]
    assert len(told) == (0 if name in RECURRENT else 2)
    if name not in RECURRENT:
        with pytest.raises(SystemExit) as exit_:
            run(evaluate, "checkpoint=run", "segments=[26,90]")
        assert exit_.value.code == 2
        message = "too long for positions; at most 25 segments of 40 tokens fit; give 25 or less"
        assert capsys.readouterr().err == f"error: segments=26,90: {message}\n"


def test_full_attention_is_the_backbone_on_the_whole_text(tokenizer: PreTrainedTokenizerBase) -> None:
    model = make("full_attention", tokenizer)
    assert isinstance(model, FullAttention)
    ids = texts(2, 5, S)
    encoder = model.encoder
    special = torch.tensor([[encoder.cls_token_id], [encoder.sep_token_id]])
    plain = torch.cat([special[:1].expand(2, 1), ids.flatten(1), special[1:].expand(2, 1)], dim=1)
    expected = encoder.model(input_ids=plain).last_hidden_state[:, :1]
    torch.testing.assert_close(model(ids)[0], expected, atol=1e-10, rtol=1e-6)
    # Segment by segment as well, if somebody asks for what each of them adds.
    state = model.initial_state(2)
    for segment in ids.unbind(dim=1):
        hidden, state = model.step(Segment(segment), state)
    torch.testing.assert_close(hidden, expected, atol=1e-10, rtol=1e-6)

    assert model.max_segments == 5
    with pytest.raises(UserError, match="72 tokens are too long for positions; the backbone sees at most 62 tokens"):
        model(texts(2, 6, S))


def test_cls_of_longformer_sees_all_at_once(tokenizer: PreTrainedTokenizerBase) -> None:
    """With one layer, what lies far outside of the window reaches [CLS] only by global attention."""
    model = make("longformer", tokenizer)
    ids = texts(1, 5 * S)
    changed = ids.clone()
    changed[0, -1] = 99 if ids[0, -1] != 99 else 98
    encoder = model.encoder
    hidden, other = (encoder(encoder.embed(text), None)[0] for text in (ids.flatten(1), changed.flatten(1)))
    moved = (hidden - other).abs().amax(dim=1) > 1e-9
    assert moved[0] and not moved[1:-8].any() and moved[-2:].all()


def test_bigbird_returns_to_sparse_attention(tokenizer: PreTrainedTokenizerBase) -> None:
    model = make("bigbird", tokenizer).eval()
    assert isinstance(model, FullAttention) and isinstance(model.encoder.model, BigBirdModel)
    long, short = texts(1, 5, S), texts(1, 1, S)
    before = model.encode(long)
    assert model.encoder.model.attention_type == "block_sparse"
    model.encode(short)
    assert model.encoder.model.attention_type == "original_full"
    torch.testing.assert_close(model.encode(long), before, atol=0, rtol=0)
    assert model.encoder.model.attention_type == "block_sparse"


@pytest.mark.parametrize("segments", [1, 2, 5])
def test_memory_network_equals_the_transcription(segments: int, tokenizer: PreTrainedTokenizerBase) -> None:
    model = make("memory_network", tokenizer)
    assert isinstance(model, MemoryNetwork)
    ends = {token for token in range(len(tokenizer)) if set(tokenizer.decode([token])) & set(".!?")}
    ids = texts(4, segments, S)
    for row, read in zip(ids, model.encode(ids), strict=True):
        sentences: list[list[int]] = []
        for segment in row.tolist():
            sentences.append([])
            for token in segment:
                if sentences[-1] and sentences[-1][-1] in ends:
                    sentences.append([])
                sentences[-1].append(token)
        words = model.words.weight.unflatten(1, (model.hops + 1, model.width))
        expected = ask_memory(words, model.ages, sentences[:-1], sentences[-1])
        torch.testing.assert_close(read, expected, atol=1e-10, rtol=1e-6)


def test_ntm_equals_the_transcription(tokenizer: PreTrainedTokenizerBase) -> None:
    model = make("ntm", tokenizer)
    assert isinstance(model, NeuralTuringMachine)
    ids = texts(1, 2, S)
    memory = [torch.full((4,), 1e-6, dtype=torch.double)] * 5
    first = [torch.tensor(float(i == 0), dtype=torch.double) for i in range(5)]
    writing, reading = [first] * 2, [first] * 2
    read = torch.zeros(8, dtype=torch.double)
    hidden, cell = (torch.zeros(1, 16, dtype=torch.double) for _ in range(2))

    def turned(addressing: nn.Module, head: int, before: list[Tensor]) -> list[Tensor]:
        given = addressing.parameters_of_heads(hidden)[0].view(2, 10)[head]
        key, (beta, gate), shift, gamma = given[:4], given[4:6], given[6:9], given[9]
        softplus = nn.functional.softplus
        return turn_head(memory, before, key, softplus(beta), gate.sigmoid(), shift.softmax(dim=0), 1 + softplus(gamma))

    for segment in ids[0]:
        for start in (0, 5, 10):
            words = torch.zeros(5, 16, dtype=torch.double)
            words[: len(segment[start : start + 5])] = model.words(segment[start : start + 5])
            seen = torch.cat([words.flatten(), read])[None]
            hidden, cell = model.controller(seen, (hidden, cell))
            writing = [turned(model.to_write, head, writing[head]) for head in range(2)]
            erase = model.to_erase(hidden)[0].sigmoid().view(2, 4)
            add = model.to_add(hidden)[0].view(2, 4)
            memory = write_memory(memory, list(zip(writing, erase, add, strict=True)))
            reading = [turned(model.to_read, head, reading[head]) for head in range(2)]
            read = torch.cat([sum(w * row for w, row in zip(head, memory, strict=True)) for head in reading])
    expected = torch.cat([hidden[0], read])
    torch.testing.assert_close(model.encode(ids)[0], expected, atol=1e-10, rtol=1e-6)
    _, machine = model(ids)
    torch.testing.assert_close(machine.memory[0], torch.stack(memory), atol=1e-10, rtol=1e-6)
