"""Transformer-XL and its hybrid with memory, against a transcription of the papers token by token."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run
from omegaconf import OmegaConf
from reference import replace
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rmt_lightning.app.build import load
from rmt_lightning.core.errors import UserError
from rmt_lightning.models import state as tree
from rmt_lightning.models.recurrence import Segment
from rmt_lightning.models.transformer_xl import Layer, TransformerXL

Make = Callable[..., TransformerXL]
KINDS = {
    "no recurrence": {"cache_length": 0, "memory_size": 0},
    "transformer-xl": {"cache_length": 6, "memory_size": 0},
    "rmt": {"cache_length": 0, "memory_size": 2},
    "hybrid": {"cache_length": 6, "memory_size": 2},
}


@pytest.fixture
def make(tokenizer: PreTrainedTokenizerBase) -> Make:
    def make(text_length: int = 4, memory_size: int = 0, **options: int) -> TransformerXL:
        torch.manual_seed(0)
        length = text_length + 2 * memory_size
        model = TransformerXL(tokenizer, length, width=8, layers=2, heads=2, memory_size=memory_size, **options)
        for parameter in model.parameters():
            # At their first values u and v are 0 and all attention is nearly even, so mistakes would not show.
            torch.nn.init.normal_(parameter, std=0.4)
        return model.double()

    return make


def texts(batch: int, length: int) -> Tensor:
    return torch.randint(5, 600, (batch, length), generator=torch.Generator().manual_seed(1))


def r(distance: int, width: int) -> Tensor:
    """The sinusoid of one distance."""
    angles = [distance / 10_000 ** (2 * i / width) for i in range(width // 2)]
    return torch.tensor([math.sin(a) for a in angles] + [math.cos(a) for a in angles], dtype=torch.double)


def attend(layer: Layer, model: TransformerXL, x: Tensor, place: int, keys: list[tuple[Tensor, int]]) -> Tensor:
    """Equations of Transformer-XL, section 3.3, for one query: A = (a) + (b) + (c) + (d), softmax, weighted values."""
    heads, size = layer.heads, model.width // layer.heads
    parts = []
    for head in range(heads):
        rows = slice(head * size, (head + 1) * size)
        w_q, w_k, w_v, w_r = (m.weight[rows] for m in (layer.query, layer.key, layer.value, layer.position))
        q, u, v = w_q @ x, model.u[head, 0], model.v[head, 0]
        scores = []
        for key, at in keys:
            distance = w_r @ r(place - at, model.width)
            scores.append((q @ (w_k @ key) + q @ distance + u @ (w_k @ key) + v @ distance) / math.sqrt(size))
        weights = torch.stack(scores).softmax(dim=0)
        parts.append(sum(weight * (w_v @ key) for weight, (key, _) in zip(weights, keys, strict=True)))
    return layer.output.weight @ torch.cat(parts)


def transcribe(
    model: TransformerXL, row: list[int], cut_before: int | None = None, update: Any = replace
) -> tuple[Tensor, Tensor]:
    """Read one row of full segments token by token, with places in the whole text instead of places in a segment.

    Returns the hidden states of all its tokens and the last memory. The graph is cut before segment `cut_before`.
    """
    size, length, memory = model.memory_size, model.text_length, list(model.memory)
    caches: list[list[tuple[Tensor, int]]] = [[] for _ in model.layers]
    hidden = []
    for start in range(0, len(row), length):
        if start // length == cut_before:
            memory = [token.detach() for token in memory]
        read = [(memory[m], start - model.cache_length - size + m) for m in range(size)]
        text = [(model.embedding.weight[row[start + i]] * math.sqrt(model.width), start + i) for i in range(length)]
        write = [(memory[m], start + length + m) for m in range(size)]
        for n, layer in enumerate(model.layers):
            cache = caches[n][max(0, start - model.cache_length) :]
            caches[n] = caches[n] + [(x.detach(), place) for x, place in text]
            sees = [(token, read) for token in read]
            sees += [(text[i], [*read, *cache, *text[: i + 1]]) for i in range(length)]
            sees += [(token, [*read, *cache, *text, *write]) for token in write]
            after = []
            for (x, place), keys in sees:
                x = layer.attention_norm(x + attend(layer, model, x, place, keys))
                after.append((layer.feed_forward_norm(x + layer.feed_forward(x)), place))
            read, text, write = after[:size], after[size : size + length], after[size + length :]
        memory = list(update(torch.stack([x for x, _ in write]), torch.stack(memory))) if size else memory
        hidden += [x for x, _ in text]
    return torch.stack(hidden), torch.stack(memory) if memory else model.memory


def read_all(model: TransformerXL, ids: Tensor) -> Tensor:
    """The hidden states of all segments, (B, T * S, D)."""
    state, found = model.initial_state(len(ids)), []
    for segment in ids.split(model.text_length, dim=1):
        hidden, state = model.step(Segment(segment), state)
        found.append(hidden)
    return torch.cat(found, dim=1)


def probe(x: Tensor) -> Tensor:
    """A loss. Squares would not do: LayerNorm makes their sum constant."""
    return (x * torch.randn(x.shape[-1], dtype=x.dtype, generator=torch.Generator().manual_seed(2))).sum()


def gradients(model: TransformerXL, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return dict(zip(names, found, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_transcription(make: Make, kind: str) -> None:
    model = make(**KINDS[kind])
    ids = texts(2, 3 * model.text_length)
    hidden = read_all(model, ids)
    _, state = model(ids)
    for row in range(2):
        expected, memory = transcribe(model, ids[row].tolist())
        torch.testing.assert_close(hidden[row], expected)
        torch.testing.assert_close(state.memory[row], memory)


def test_a_long_cache_is_full_attention_over_both_segments(make: Make) -> None:
    ids = texts(2, 8)
    recurrent, full = make(text_length=4, cache_length=4), make(text_length=8, cache_length=0)
    full.load_state_dict(recurrent.state_dict())
    torch.testing.assert_close(read_all(recurrent, ids), read_all(full, ids))
    short = make(text_length=4, cache_length=3)
    assert not torch.allclose(read_all(short, ids), read_all(full, ids), atol=1e-3)


@pytest.mark.parametrize("depth", [0, 1, 2, -1])
def test_gradients_flow_through_memory_as_deep_as_asked_and_never_through_the_cache(make: Make, depth: int) -> None:
    model = make(**KINDS["hybrid"], bptt_depth=depth)
    ids = texts(1, 4 * model.text_length)
    own = gradients(model, probe(model(ids)[0]))
    last = slice(3 * model.text_length, None)
    by_hand = gradients(model, probe(transcribe(model, ids[0].tolist(), None if depth < 0 else 3 - depth)[0][last]))
    for name in own:
        torch.testing.assert_close(own[name], by_hand[name], msg=lambda text, name=name: f"{name}: {text}")
    assert (own["memory"].abs().sum() > 0) == (depth == -1)
    # What several processes need: no parameter is without a gradient, also where truncation leaves it at zero.
    model.encode(ids).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_checkpointing_changes_nothing(make: Make) -> None:
    ids = texts(2, 12)
    models = make(**KINDS["hybrid"]), make(**KINDS["hybrid"], gradient_checkpointing=True)
    plain, checkpointed = (gradients(model, probe(model(ids)[0])) for model in models)
    for name in plain:
        torch.testing.assert_close(plain[name], checkpointed[name], atol=1e-10, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_text_in_pieces_and_padding_change_nothing(make: Make, kind: str) -> None:
    """Each row gives what it gives alone, wherever its padding stands; a row without text keeps its state."""
    model = make(**KINDS[kind])
    lengths = (11, 4, 6, 1, 0)
    ids, mask = torch.full((5, 13), 3), torch.zeros(5, 13, dtype=torch.long)
    for row, length in enumerate(lengths):
        start = (0, 13 - length, 2)[row % 3]
        ids[row, start : start + length] = texts(5, 11)[row, :length]
        mask[row, start : start + length] = 1
    together = model.encode(ids, mask)
    _, states = model(ids, mask)
    assert all(part.isfinite().all() for part in (together, *tree.leaves(states)))
    for row, length in enumerate(lengths[:-1]):
        first = length % model.text_length or min(length, model.text_length)
        pieces = texts(5, 11)[row : row + 1, :length].split([first, *[model.text_length] * 3][: -(-length // 4)], dim=1)
        torch.testing.assert_close(model.encode(iter(pieces)), together[row : row + 1])
        _, state = model(iter(pieces))
        for alone, among_others in zip(tree.leaves(state), tree.leaves(states), strict=True):
            torch.testing.assert_close(alone[0], among_others[row])
    for untouched, first in zip(tree.leaves(states), tree.leaves(model.initial_state(1)), strict=True):
        torch.testing.assert_close(untouched[4], first[0])


def test_the_state_of_an_earlier_checkpoint(make: Make) -> None:
    """There the caches of all layers were one tensor (B, L, C, D)."""
    model = make(**KINDS["hybrid"])
    _, state = model(texts(2, 12))
    now = tree.leaves(state)
    earlier = [torch.stack(state.layers, dim=1), state.cached, state.memory]
    for leaves in (earlier, now):
        for one, other in zip(model.saved_state(leaves), now, strict=True):
            assert torch.equal(one, other)


def test_logits_come_from_the_text_to_the_left(make: Make) -> None:
    model = make(**KINDS["hybrid"])
    ids = texts(1, 8)
    scores = model.logits(read_all(model, ids))
    assert scores.shape == (1, 8, model.embedding.num_embeddings)
    ids[0, 5] += 1
    changed = (model.logits(read_all(model, ids)) != scores).any(dim=2)[0]
    assert changed.tolist() == [False] * 5 + [True] * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"segment_length": 20, "memory_size": 10}, r"data\.segment_length=20: 10 memory .* give more than 20"),
        ({"segment_length": 20, "width": 10, "heads": 4}, r"model\.width=10: must be even and a multiple of model\."),
        ({"segment_length": 20, "width": 3, "heads": 3}, r"model\.width=3: must be even"),
    ],
)
def test_bad_sizes(tokenizer: PreTrainedTokenizerBase, options: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TransformerXL(tokenizer, **options)


SIZES = ("model.width=32", "model.layers=2", "model.heads=2", "model.cache_length=8", "optim.lr=5e-3")


def weights(folder: Path) -> dict[str, Tensor]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


@pytest.mark.soak
def test_a_run_learns_and_its_checkpoint_is_loaded(train: Run, tmp_path: Path, cache: Path) -> None:
    result = train(
        "model=transformer_xl", *SIZES, "noise.documents=50", "data.segment_length=30", "data.batch_size=32",
        "data.steps_per_epoch=25", "data.validation_samples=64", "curriculum.max_segments=1", "curriculum.steps=200",
        "curriculum.threshold=0.9", "curriculum.validations=1", "test.segments=[1]", "test.samples=64",
        "hydra.run.dir=run",
    )  # fmt: skip
    assert result.returncode == 0 and result.stderr == "", result.stdout + result.stderr
    run = tmp_path / "run"
    with (run / "evaluation.csv").open() as file:
        assert float(next(csv.DictReader(file))["accuracy"]) > 0.8
    config = OmegaConf.load(run / "config.yaml")
    config.cache_dir = str(cache)
    module = load(config, run, run / "checkpoints" / "last.ckpt").module
    assert module.model.cache_length == 8
    loaded = module.state_dict()
    assert all(torch.equal(loaded[name], saved) for name, saved in weights(run).items())


@pytest.mark.soak
@pytest.mark.parametrize(
    "model",
    [
        ("rmt_transformer_xl", *SIZES),
        ("armt",),
        ("prmt", "backbone=tiny_gpt", "model.schedule=diagonal"),
        ("rmt_retrieval",),
    ],
    ids=str,
)
def test_two_processes(model: tuple[str, ...], train: Run, tmp_path: Path) -> None:
    name, *sizes = model
    settings = (
        f"model={name}", *sizes, "model.memory_size=2", "model.bptt_depth=1", "curriculum.lengths=exact",
        "curriculum.steps=3", "optim.lr=1e-3",
    )  # fmt: skip
    alone = train(*settings, "hydra.run.dir=alone", "data.batch_size=8")
    both = train(*settings, "trainer.accelerator=cpu", "trainer.devices=2", "hydra.run.dir=both")
    assert alone.returncode == 0 and both.returncode == 0, alone.stderr + both.stderr
    one, two = weights(tmp_path / "alone"), weights(tmp_path / "both")
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-5, rtol=1e-4)
