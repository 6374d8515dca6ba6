"""Whom memory attends to and how much of it is rewritten: exact maps, a curve against a plain loop, the command."""

from __future__ import annotations

import json
import shutil
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Run
from hydra.core.global_hydra import GlobalHydra
from reference import read_segment
from test_backbones import CONFIGS
from torch import Tensor
from transformers import AutoModel, PreTrainedTokenizerBase

from rmt_lightning import attend as front_door
from rmt_lightning.analysis.attention import (
    AttentionMap,
    choose_sample,
    curve_from_rows,
    maps_from_rows,
    maps_to_rows,
    name_tokens,
    rewriting,
    rewriting_curve,
    select,
    watch,
)
from rmt_lightning.core.errors import UserError
from rmt_lightning.core.files import read_csv, write_csv
from rmt_lightning.models.encoder import Encoder
from rmt_lightning.models.rmt import RMTDecoder, RMTEncoder
from rmt_lightning.models.tiny import TinyGPT
from rmt_lightning.models.transformer_xl import TransformerXL
from rmt_lightning.reporting import figures
from rmt_lightning.tasks.corpus import Corpus
from rmt_lightning.tasks.facts import Carried, Detect, Memorize, Reasoning, Split, Task
from rmt_lightning.tasks.placement import Key, Placement, side_by_side

Make = Callable[..., RMTEncoder]
CPU = torch.device("cpu")


def texts(*shape: int) -> Tensor:
    return torch.randint(5, 600, shape, generator=torch.Generator().manual_seed(1))


def test_the_maps_are_those_of_the_fast_attention(make_model: Make) -> None:
    """What the last layer makes of the recorded weights are the hidden states of an ordinary forward pass."""
    model = make_model().eval()
    last = model.encoder.model.encoder.layer[-1]
    read: list[Tensor] = []
    hook = last.register_forward_pre_hook(lambda _layer, args: read.append(args[0]))
    ids = texts(2, 3, model.text_length)
    with torch.no_grad():
        hidden, memory = model(ids)
        with model.recorded() as weights:
            slow, slow_memory = model(ids)
        before = read[-1]
        values = last.attention.self.value(before).unflatten(-1, (2, 8)).transpose(1, 2)  # (B, H, N, D / H)
        mixed = last.attention.output((weights[-1][-1] @ values).transpose(1, 2).flatten(2), before)
        by_hand = last.output(last.intermediate(mixed), mixed)
    hook.remove()
    torch.testing.assert_close(by_hand[:, : hidden.shape[1]], hidden, atol=1e-10, rtol=1e-8)
    torch.testing.assert_close(slow, hidden, atol=1e-10, rtol=1e-8)
    torch.testing.assert_close(slow_memory, memory, atol=1e-10, rtol=1e-8)
    assert [tuple(of_segment.shape) for of_segment in weights] == [(2, 2, 2, 20, 20)] * 3


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in ("longformer", "bigbird")])
def test_every_backbone_shows_its_attention_and_is_left_as_it_was(
    name: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    config, positions = CONFIGS[name]
    torch.manual_seed(0)
    model = RMTEncoder(Encoder(AutoModel.from_config(config), tokenizer), positions, memory_size=4).eval()
    ids = texts(2, 50)
    mask = torch.ones_like(ids)
    mask[1, 40:] = 0  # with 41 tokens of text a segment, the first one holds 9 tokens of row 0 and none of row 1
    fast = model.encoder.model.config._attn_implementation
    with torch.no_grad():
        hidden, _ = model(ids, mask)
        with model.recorded() as weights:
            watched, _ = model(ids, mask)
        torch.testing.assert_close(watched[:, 0], hidden[:, 0], atol=1e-5, rtol=1e-5)
        assert torch.equal(model(ids, mask)[0], hidden)
    assert model.encoder.model.config._attn_implementation == fast
    assert len(weights) == 2, "the list has stopped growing"
    for of_segment in weights:
        torch.testing.assert_close(of_segment.sum(dim=-1), torch.ones(of_segment.shape[:-1]))
    # [CLS], 4 memory tokens, [SEP], 9 tokens, [SEP]; the rest is padding.
    assert weights[0][:, 0, :, :16, 16:].abs().max() == 0
    assert weights[0][:, 0, :, :16, :16].min() > 0 or name == "modernbert"  # whose layers look at a window


@pytest.mark.parametrize("name", ["longformer", "bigbird"])
def test_sparse_attention_is_refused(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    encoder = Encoder(AutoModel.from_config(CONFIGS[name][0]), tokenizer)
    with (
        pytest.raises(UserError, match=r"^backbone: the sparse attention of \w+ keeps no whole maps"),
        encoder.recorded(),
    ):
        pass


def test_select() -> None:
    weights = torch.rand(3, 2, 5, 5)
    np.testing.assert_array_equal(select(weights, 2, 1), weights[1, 0])
    np.testing.assert_allclose(select(weights, "mean", 2), weights[:, 1].mean(dim=0))
    np.testing.assert_allclose(select(weights, 3, "mean"), weights[2].mean(dim=0))
    np.testing.assert_allclose(select(weights, "mean", "mean"), weights.mean(dim=(0, 1)), rtol=1e-6)
    with pytest.raises(UserError, match=r"^layer=4: the backbone has layers 1 to 3; give one of them, or mean$"):
        select(weights, 4, "mean")
    with pytest.raises(UserError, match=r"^head=3: the backbone has heads 1 to 2; give one of them, or mean$"):
        select(weights, 1, 3)


PARTS = ("[CLS]", "memory", "memory", "[SEP]", "noise", "noise", "fact 1", "fact 1", "noise", "[SEP]")


@pytest.fixture
def attention() -> AttentionMap:
    weights = np.random.default_rng(0).random((10, 10))
    tokens = ("[CLS]", "[mem 1]", "[mem 2]", "[SEP]", "so,", '"', "$x$", "\u00e9", "=1", "[SEP]")
    return AttentionMap(tokens, PARTS, weights / weights.sum(axis=1, keepdims=True))


def test_folding_sums_what_noise_is_given(attention: AttentionMap) -> None:
    folded = attention.folded()
    assert folded.parts == ("[CLS]", "memory", "memory", "[SEP]", "noise", "fact 1", "fact 1", "noise", "[SEP]")
    assert folded.tokens[4] == "2 tokens" and folded.tokens[7] == "=1"
    np.testing.assert_allclose(folded.weights.sum(axis=1), 1)
    np.testing.assert_allclose(folded.weights[0, 4], attention.weights[0, 4] + attention.weights[0, 5])
    np.testing.assert_allclose(folded.weights[4, 0], (attention.weights[4, 0] + attention.weights[5, 0]) / 2)
    np.testing.assert_allclose(folded.weights[1, 5:], attention.weights[1, 6:])
    assert folded.share == pytest.approx(attention.share)
    by_hand = attention.weights[1:3, 6:8].sum() / 2
    assert attention.operation == ("memory", ("fact 1",)) and attention.share == pytest.approx(by_hand)


@pytest.mark.parametrize(
    ("text", "event", "operation"),
    [
        (["noise"], "noise passes", ("memory", ("memory",))),
        (["noise", "fact 2", "fact 2", "noise"], "fact 2 is written", ("memory", ("fact 2",))),
        (["fact 1", "noise", "fact 2"], "facts 1, 2 are written", ("memory", ("fact 1", "fact 2"))),
        (["noise", "question"], "[CLS] reads", ("[CLS]", ("memory",))),
        (["fact 1", "question"], "fact 1 is written, [CLS] reads", ("[CLS]", ("memory", "fact 1"))),
    ],
)
def test_events(text: list[str], event: str, operation: tuple[str, tuple[str, ...]]) -> None:
    parts = ("[CLS]", "memory", "[SEP]", *text, "[SEP]")
    one = AttentionMap(parts, parts, np.eye(len(parts)))
    assert (one.event, one.operation) == (event, operation)


def test_a_csv_file_holds_the_maps(attention: AttentionMap, tmp_path: Path) -> None:
    maps = [attention.folded(), attention]
    write_csv(tmp_path / "attention.csv", maps_to_rows(maps))
    for one, again in zip(maps, maps_from_rows(read_csv(tmp_path / "attention.csv")), strict=True):
        assert (again.tokens, again.parts) == (one.tokens, one.parts)
        np.testing.assert_allclose(again.weights, one.weights, atol=1e-6)


Corpora = dict[Split, Corpus]


def make_placement(task: Task, corpora: Corpora, tokenizer: PreTrainedTokenizerBase) -> Placement:
    return Placement(task, corpora, tokenizer, text_length=45, seed=3)


@pytest.mark.parametrize(
    ("task", "num_segments", "homes"),
    [
        (Memorize(), 4, (0,)), (Detect(), 4, (0,)), (Reasoning(), 4, (0, 2)), (Reasoning(), 3, (0, 1)),
        (Carried(), 5, (0, 1, 2, 3)), (Detect(), 1, (0,)), (Reasoning(), 1, (0, 0)),
    ],
)  # fmt: skip
def test_the_sample_in_which_operations_are_apart(
    task: Task, num_segments: int, homes: tuple[int, ...], corpora: Corpora, tokenizer: PreTrainedTokenizerBase
) -> None:
    placement = make_placement(task, corpora, tokenizer)
    number = choose_sample(placement, num_segments)
    assert placement.sample("test", Key(num_segments, number)).homes == homes
    assert choose_sample(placement, num_segments) == number


def test_the_tokens_of_a_watched_sample(make_model: Make, corpora: Corpora, tokenizer: PreTrainedTokenizerBase) -> None:
    model = make_model(segment_length=52).eval()
    placement = make_placement(Reasoning(), corpora, tokenizer)
    key = Key(4, choose_sample(placement, 4))
    example = placement.sample("test", key).example
    scores, maps = watch(
        lambda ids: model(ids)[0][:, 0, :6], model, tokenizer, placement.sample("test", key), CPU, layer=2, head=1
    )
    ids = torch.from_numpy(np.stack(list(placement.sample("test", key).segments)))[None]
    with torch.no_grad():
        torch.testing.assert_close(scores, model(ids)[0][0, 0, :6])
        with model.recorded() as weights:
            model(ids)
    assert [one.event for one in maps] == ["fact 1 is written", "noise passes", "fact 2 is written", "[CLS] reads"]
    said = {"fact 1": example.facts[0], "fact 2": example.facts[1], "question": example.question}
    for one, of_segment in zip(maps, weights, strict=True):
        np.testing.assert_allclose(one.weights, of_segment[1, 0, 0])
        assert one.tokens[:7] == ("[CLS]", "[mem 1]", "[mem 2]", "[mem 3]", "[mem 4]", "[SEP]", one.tokens[6])
        assert one.parts[:6] == ("[CLS]", "memory", "memory", "memory", "memory", "[SEP]") and one.parts[-1] == "[SEP]"
        for part in set(one.parts) & set(said):
            words = "".join(token for token, of in zip(one.tokens, one.parts, strict=True) if of == part)
            assert words == said[part].lower().replace(" ", "")


TINY = {"width": 16, "layers": 2, "heads": 2}
CAUSAL: dict[str, Callable[[PreTrainedTokenizerBase], Any]] = {
    "decoder": lambda tokenizer: RMTDecoder(TinyGPT(**TINY).decoder(tokenizer), 53, 4),
    "causal memory": lambda tokenizer: RMTDecoder(TinyGPT(**TINY).decoder(tokenizer), 53, 4, "causal"),
    "transformer-xl": lambda tokenizer: TransformerXL(tokenizer, 53, **TINY, memory_size=4, cache_length=6),
    "no cache": lambda tokenizer: TransformerXL(tokenizer, 53, **TINY, memory_size=4, cache_length=0),
}


@pytest.mark.parametrize("kind", CAUSAL)
def test_causal_models_are_watched(kind: str, corpora: Corpora, tokenizer: PreTrainedTokenizerBase) -> None:
    torch.manual_seed(0)
    model = CAUSAL[kind](tokenizer).eval()
    placement = make_placement(Reasoning(), corpora, tokenizer)
    key = Key(4, choose_sample(placement, 4))
    sample = placement.sample("test", key)
    scores, maps = watch(lambda ids: model.encode(ids)[:, :6], model, tokenizer, sample, CPU)
    ids = torch.from_numpy(np.stack(list(placement.sample("test", key).segments)))[None]
    with torch.no_grad():
        torch.testing.assert_close(scores, model.encode(ids)[0, :6])
    assert [one.event for one in maps] == [
        "fact 1 is written", "noise passes", "fact 2 is written", "question end reads"
    ]  # fmt: skip
    assert [one.operation for one in maps] == [
        ("write memory", ("fact 1",)), ("write memory", ("read memory", "write memory")),
        ("write memory", ("fact 2",)), ("question end", ("read memory",)),
    ]  # fmt: skip
    cache = getattr(model, "cache_length", 0)
    read, kept, text, write = (slice(0, 4), slice(4, 4 + cache), slice(4 + cache, 49 + cache), slice(49 + cache, None))
    for number, one in enumerate(maps):
        weights = one.weights
        assert weights.shape == (53 + cache, 53 + cache) and len(one.tokens) == 53 + cache
        assert set(one.parts[read]) == {"read memory"} and set(one.parts[write]) == {"write memory"}
        assert set(one.parts[kept]) <= {"cache"} and not weights[kept].any()
        readers = [place for place, part in enumerate(one.parts) if part != "cache"]
        np.testing.assert_allclose(weights[readers].sum(axis=1), 1, rtol=1e-5)
        # Text sees all of the read memory, and what stands to its left; nothing was cached before the first segment.
        assert not weights[text, text][np.triu_indices(45, 1)].any() and not weights[text, write].any()
        assert not weights[read, 4:].any()
        assert weights[text, read].min() > 0 and weights[write, text].min() > 0
        assert weights[text, kept].min(initial=1) > 0 if number else not weights[text, kept].any()
        free = kind != "causal memory"
        for block in (read, write):
            assert (weights[block, block][np.triu_indices(4, 1)] > 0).all() == free
        assert 0 < one.share < 1
    said = {"fact 1": maps[0], "fact 2": maps[2]}
    for (part, one), fact in zip(said.items(), placement.sample("test", key).example.facts, strict=True):
        words = "".join(token for token, of in zip(one.tokens, one.parts, strict=True) if of == part)
        assert words == fact.lower().replace(" ", "")
    asked = "".join(token for token, of in zip(maps[3].tokens, maps[3].parts, strict=True) if of.startswith("question"))
    assert asked == placement.sample("test", key).example.question.lower().replace(" ", "")
    assert maps[3].parts[text][-1] == "question end" and maps[3].parts.count("question end") == 1
    folded = maps[1].folded()
    assert folded.parts.count("cache") == (cache > 0) and folded.weights[0].sum() == pytest.approx(1, rel=1e-5)
    assert len(figures.attention(maps, "title").axes) == 5


def test_the_maps_of_transformer_xl_are_what_it_mixes_with(tokenizer: PreTrainedTokenizerBase) -> None:
    """What its last layer makes of the recorded weights are the hidden states of an ordinary forward pass."""
    torch.manual_seed(0)
    model = TransformerXL(tokenizer, 20, **TINY, memory_size=3, cache_length=6).double().eval()
    last, read = model.layers[-1], []
    hook = last.register_forward_pre_hook(lambda _layer, args: read.append(args))
    ids = texts(2, 3, model.text_length)
    with torch.no_grad(), model.recorded() as weights:
        hidden, _ = model(ids)
        before, seen, _ = read[-1]
        rows = [place for place in range(26) if not 3 <= place < 9]
        values = last.value(seen).unflatten(-1, (2, 8)).transpose(1, 2)
        mixed = last.output((weights[-1][-1][:, :, rows] @ values).transpose(1, 2).flatten(2))
        by_hand = last.attention_norm(before + mixed)
        by_hand = last.feed_forward_norm(by_hand + last.feed_forward(by_hand))
    hook.remove()
    torch.testing.assert_close(by_hand[:, 3:17], hidden)
    assert [tuple(of_segment.shape) for of_segment in weights] == [(2, 2, 2, 26, 26)] * 3
    model(ids)
    assert len(weights) == 3, "the list has stopped growing"


@pytest.mark.parametrize("kind", ["decoder", "transformer-xl"])
def test_rewriting_of_causal_models(kind: str, tokenizer: PreTrainedTokenizerBase) -> None:
    torch.manual_seed(0)
    model = CAUSAL[kind](tokenizer).double().eval()
    ids = texts(2, 3, model.text_length)
    with torch.no_grad():
        found = list(rewriting(model, ids.unbind(dim=1), 2))
        memories = [model.memory[None].expand(2, -1, -1)]
        memories += [model.memory_of(reading.state) for reading in model.read(ids)]
    for (rewritten, cosine), old, new in zip(found, memories, memories[1:], strict=False):
        torch.testing.assert_close(rewritten, (new - old).norm(dim=-1) / new.norm(dim=-1))
        torch.testing.assert_close(cosine, torch.cosine_similarity(old, new, dim=-1))


def test_long_segments_are_folded(
    make_model: Make, corpora: Corpora, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rmt_lightning.analysis.attention.MOST_TOKENS", 51)
    model = make_model(segment_length=52).eval()
    placement = make_placement(Detect(), corpora, tokenizer)
    _, (one,) = watch(lambda ids: model(ids)[0][:, 0], model, tokenizer, placement.sample("test", Key(1, 0)), CPU)
    names, parts = name_tokens(next(placement.sample("test", Key(1, 0)).pieces), tokenizer, model.layout(45))
    assert len(names) == 52 > len(one.tokens)
    assert [part for part in one.parts if part != "noise"] == [part for part in parts if part != "noise"]
    np.testing.assert_allclose(one.weights.sum(axis=1), 1)


def test_rewriting_against_the_transcription(make_model: Make) -> None:
    model = make_model().eval()
    ids = texts(2, 4, model.text_length)
    with torch.no_grad():
        found = list(rewriting(model, ids.unbind(dim=1), 2))
        for row in range(2):
            memory = model.memory
            for segment in range(4):
                encoder = model.encoder
                text = ids[row, segment].tolist()
                _, after = read_segment(encoder.model, encoder.cls_token_id, encoder.sep_token_id, text, memory)
                for token in range(model.memory_size):
                    old, new = memory[token].numpy(), after[token].numpy()
                    rewritten, cosine = (one[row, token].item() for one in found[segment])
                    assert rewritten == pytest.approx(np.linalg.norm(new - old) / np.linalg.norm(new))
                    assert cosine == pytest.approx(old @ new / np.linalg.norm(old) / np.linalg.norm(new))
                memory = after


def test_rewriting_takes_constant_memory(make_model: Make) -> None:
    model = make_model(double=False).eval()
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most = 0

    def stream() -> Iterator[Tensor]:
        nonlocal most
        for _ in range(60):
            segment = texts(1, model.text_length)
            alive.add(segment)
            most = max(most, len(alive))
            yield segment

    with torch.no_grad():
        read = sum(1 for _ in rewriting(model, stream(), 1))
    assert read == 60 and most <= 2


@pytest.mark.parametrize("task", [Detect(), Reasoning()], ids=["detect", "reasoning"])
def test_the_curve_tells_facts_from_noise(
    task: Task, make_model: Make, corpora: Corpora, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model = make_model(segment_length=52, double=False).eval()
    placement = make_placement(task, corpora, tokenizer)
    curve = [point for points in rewriting_curve(model, placement, 6, 5, CPU) for point in points]
    homes = [placement.sample("test", Key(6, number)).homes for number in range(5)]
    with torch.no_grad():
        samples = [placement.sample("test", Key(6, number)) for number in range(5)]
        ids = torch.stack([ids for ids, _ in side_by_side([(6, sample.segments) for sample in samples])])
        by_hand = [values.numpy() for values, _ in rewriting(model, ids, 5)]
    for point in curve:
        of_part = [point.segment - 1 in home for home in homes]
        if point.part == "noise":
            of_part = [not fact for fact in of_part]
        if point.part == "question":
            of_part = [True] * 5
            assert point.segment == 6
        values = by_hand[point.segment - 1][of_part]
        assert point.texts == len(values) > 0
        assert point.rewritten == pytest.approx(values.mean(), abs=1e-5)
        assert (point.low, point.high) == pytest.approx(np.quantile(values, (0.1, 0.9)), abs=1e-5)
    for segment in range(1, 7):
        assert sum(point.texts for point in curve if point.segment == segment) == 5
    write_csv(tmp_path / "rewrite.csv", [asdict(point) for point in curve])
    assert curve_from_rows(read_csv(tmp_path / "rewrite.csv")) == curve


def test_the_curve_is_drawn_where_segments_are() -> None:
    points = [(float(segment), 1 / segment) for segment in range(1, 3001)]
    where, mean = figures._binned(points)
    assert where[0] == 1 and where[1] == 2 and len(where) <= 96 and (np.diff(where) > 0).all()
    assert mean[:2].tolist() == [1, 0.5] and where[-1] < 3000
    last = [segment for segment, _ in points if segment > 2 * where[-1] - 3000 - 0.5]
    assert where[-1] == pytest.approx(np.mean(last)) and mean[-1] == pytest.approx(np.mean([1 / s for s in last]))


@pytest.fixture
def here(finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> Path:
    shutil.copytree(finished_run, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RMT_LIGHTNING_CACHE", environment["RMT_LIGHTNING_CACHE"])
    return tmp_path


SHORT = ("checkpoint=run", "device=cpu", "streams=3", "stream_segments=20")


def attend(monkeypatch: pytest.MonkeyPatch, *settings: str) -> None:
    monkeypatch.setattr(sys, "argv", ["attend", *SHORT, *settings])
    GlobalHydra.instance().clear()
    front_door.run()


def test_the_real_command(here: Path, command: Run) -> None:
    result = command("rmt_lightning.attend", *SHORT, "task=reasoning")
    assert result.returncode == 0, result.stderr
    (folder,) = (here / "run" / "attention").iterdir()
    assert folder.name.startswith("last-reasoning-")
    files = [f"{name}.{kind}" for name in ("attention", "rewrite") for kind in ("csv", "pdf", "png")]
    assert sorted(path.name for path in folder.iterdir() if path.suffix) == [*files, "settings.json"]
    assert f"run/attention/{folder.name} holds {', '.join([*files, 'settings.json'])}" in result.stdout
    for said in (
        "(right)" if "(right)" in result.stdout else "(wrong: ",
        "fact 2 is written",
        "[CLS] → memory",
        "noise",
    ):
        assert said in result.stdout
    maps = maps_from_rows(read_csv(folder / "attention.csv"))
    assert len(maps) == 4 and maps[0].weights.shape == (48, 48)
    for one in maps:
        np.testing.assert_allclose(one.weights.sum(axis=1), 1, atol=1e-4)
    curve = curve_from_rows(read_csv(folder / "rewrite.csv"))
    assert {point.segment for point in curve} == set(range(1, 21))
    assert json.loads((folder / "settings.json").read_text())["stream_segments"] == 20
    # What is drawn can be drawn again from the csv files alone.
    assert len(figures.attention(maps, "title").axes) == 5 and len(figures.rewriting(curve, "title").axes) == 1


@pytest.mark.soak
def test_another_head_is_drawn_beside_it_and_the_curve_is_not_read_again(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    story = "1 Mary moved to the [red] office.\n2 John went to the garden.\n3 Where is John? \tgarden\t2\n"
    (here / "qa.txt").write_text(story * 10)
    babi = ("task=babi", "task.path=qa.txt", "segments=2")
    attend(monkeypatch, *babi, "layer=1")
    assert "[red]" in capsys.readouterr().out
    (folder,) = (here / "run" / "attention").iterdir()
    path = folder / "rewrite.csv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:-1], "20,question,3,0.123,0.1,0.2,0.9"]) + "\n")
    attend(monkeypatch, *babi, "layer=1", "head=2")
    assert "0.123" in capsys.readouterr().out
    assert {path.stem for path in folder.glob("*.csv")} == {"attention-layer-1", "attention-layer-1-head-2", "rewrite"}
    both, single = (read_csv(folder / f"attention-{view}.csv") for view in ("layer-1", "layer-1-head-2"))
    assert [row["token"] for row in both] == [row["token"] for row in single]
    assert [row["1"] for row in both] != [row["1"] for row in single]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("layer=2", "layer=2: the backbone has layers 1 to 1; give one of them, or mean"),
        ("head=3", "head=3: the backbone has heads 1 to 2; give one of them, or mean"),
        ("head=0", "head=0: must be greater than or equal to 1 or must be 'mean'"),
        ("layer=first", "layer=first: must be a valid integer or must be 'mean'"),
        ("segments=0", "segments=0: must be greater than or equal to 1"),
        ("segments=17", "segments=17: must be less than or equal to 16"),
        ("streams=0", "streams=0: must be greater than or equal to 1"),
        ("heads=1", "heads: no such setting; did you mean head?"),
        ("checkpoint=absent", "checkpoint=absent: no run there; give a run folder or one of its checkpoints/*.ckpt"),
        ("checkpoint=run/checkpoints/none.ckpt", "checkpoint=run/checkpoints/none.ckpt: has no memory tokens"),
    ],
)
def test_bad_input(
    setting: str, message: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if "none.ckpt" in setting:
        config = here / "run" / "config.yaml"
        config.write_text(config.read_text().replace("memory_size: 10", "memory_size: 0"))
        saved = torch.load(here / "run" / "checkpoints" / "last.ckpt", weights_only=True)
        saved["state_dict"]["model.memory"] = saved["state_dict"]["model.memory"][:0]
        torch.save(saved, here / "run" / "checkpoints" / "none.ckpt")
    with pytest.raises(SystemExit) as exit_:
        attend(monkeypatch, setting)
    errors = capsys.readouterr().err
    assert exit_.value.code == 2, errors
    assert errors.startswith(f"error: {message}") and errors.count("\n") == 1, errors
    assert not (here / "run" / "attention").exists()
