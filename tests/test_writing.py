"""Writing with a cache is writing by reading whole segments, with random weights everywhere."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_decoder import CONFIGS, WINDOWED
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from rmt_lightning.core.errors import UserError
from rmt_lightning.models import state as tree
from rmt_lightning.models.armt import ARMT
from rmt_lightning.models.decoder import Decoder, SegmentCache
from rmt_lightning.models.generation import _CachedPen, _Pen, _pen, generate, read
from rmt_lightning.models.prmt import PRMT
from rmt_lightning.models.rmt import RMTDecoder
from rmt_lightning.models.transformer_xl import TransformerXL
from rmt_lightning.models.update import Gated

S = 7
Model = RMTDecoder | ARMT | PRMT
Make = Callable[..., Any]
# These normalize in single precision, whatever the precision of the rest.
SINGLE = ("llama", "qwen2", "qwen3", "mistral", "phi3", "gemma3_text", "qwen2 windowed")
WIDE = {**CONFIGS, **copy.deepcopy(WINDOWED)}
for config in WIDE.values():
    if getattr(config, "sliding_window", None):
        config.sliding_window = 64


@pytest.fixture
def make(tokenizer: PreTrainedTokenizerBase) -> Make:
    def make(
        kind: str = "gpt2", memory_size: int = 3, whole: bool = False, of: type = RMTDecoder, **options: Any
    ) -> Model:
        torch.manual_seed(0)
        gpt = AutoModelForCausalLM.from_config(copy.deepcopy((WINDOWED if whole else WIDE)[kind]))
        beside = memory_size if of is ARMT else 2 * memory_size
        model = of(Decoder(gpt, tokenizer), S + beside, memory_size, **options)
        for weight in model.parameters():
            nn.init.normal_(weight, std=0.3)
        return model.double().eval()

    return make


def ragged() -> tuple[Tensor, Tensor]:
    """Rows of unequal length, some at a border, with padding before, after and among their tokens."""
    generator = torch.Generator().manual_seed(2)
    mask = torch.zeros(6, 2 * S + 4, dtype=torch.long)
    for row, length in zip(mask, (1, S - 1, S, S + 1, 2 * S, 2 * S + 3), strict=True):
        row[torch.randperm(len(row), generator=generator)[:length]] = 1
    return torch.randint(5, 600, mask.shape, generator=generator), mask


def follow(pen: _Pen | _CachedPen, words: Tensor, ends: Tensor) -> list[Tensor]:
    """The scores (B, V) before each of the words (B, G), which rows write until their `ends`; and what is left."""
    scores = []
    for number in range(words.shape[1]):
        scores.append(pen.scores())
        pen.write(words[:, number, None], (number < ends).long()[:, None])
    scores.append(pen.scores())
    return [*scores, *(leaf for leaf in tree.leaves(pen.stream.state) if leaf.numel())]


def assert_same(model: Model, precision: float) -> None:
    words, ends = torch.randint(5, 600, (6, 3 * S)), torch.tensor([3 * S, 2 * S + 2, 3 * S, 9, 3 * S, 1])
    with torch.no_grad():
        stream = read(model, *ragged())
        plain, quick = _Pen(model, stream), _pen(model, stream)
        assert isinstance(quick, _CachedPen)
        for expected, found in zip(follow(plain, words, ends), follow(quick, words, ends), strict=True):
            assert found.dtype == expected.dtype
            assert (found - expected).abs().max() <= precision * expected.abs().max()
    before, after = plain.stream.segment, quick.stream.segment
    assert torch.equal(after.attention_mask, before.attention_mask)
    assert torch.equal(after.input_ids * after.attention_mask, before.input_ids * before.attention_mask)


@pytest.mark.parametrize("kind", WIDE)
def test_scores_and_memory(make: Make, kind: str) -> None:
    model = make(kind, update=Gated)
    assert_same(model, 1e-5 if kind in SINGLE else 1e-10)
    assert_same(model.float(), 1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "opt", "gpt_neox", "llama"])
def test_causal_memory(make: Make, kind: str) -> None:
    assert_same(make(kind, memory_attention="causal"), 1e-5 if kind in SINGLE else 1e-10)


@pytest.mark.parametrize("kind", ["opt", "gemma3_text"])
@pytest.mark.parametrize(
    ("of", "options"), [(ARMT, {"key_size": 6}), (PRMT, {}), (PRMT, {"memory_attention": "causal"})]
)
def test_memory_in_every_layer(make: Make, kind: str, of: type, options: dict[str, Any]) -> None:
    model = make(kind, of=of, **options)
    assert_same(model, 1e-5 if kind in SINGLE else 1e-10)
    assert_same(model.float(), 1e-4)


def test_without_memory(make: Make) -> None:
    assert_same(make(memory_size=0), 1e-10)


def test_bfloat16_autocast(make: Make) -> None:
    model = make(update=Gated).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(model, 0.05)


@pytest.mark.parametrize("of", [RMTDecoder, ARMT, PRMT])
@pytest.mark.parametrize("stopping", [False, True])
def test_words(make: Make, of: type, stopping: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, (ids, mask) = make("gpt_neox", of=of), ragged()
    written = generate(model, ids, 2, mask).input_ids
    # Some rows end before others.
    stops = written[:, 0].unique()[:1].tolist() if stopping else ()
    quick = generate(model, ids, 4 * S, mask, stop_tokens=stops)
    again = generate(model, ids[:, :0], S, stream=quick.stream, temperature=1.0, generator=torch.manual_seed(0))
    monkeypatch.setattr(of, "open_segment", lambda _model: None)
    plain = generate(model, ids, 4 * S, mask, stop_tokens=stops)
    assert torch.equal(quick.input_ids, plain.input_ids)
    assert torch.equal(quick.attention_mask, plain.attention_mask)
    assert len(set(quick.attention_mask.sum(dim=1).tolist())) > 1 or not stopping
    expected = generate(model, ids[:, :0], S, stream=plain.stream, temperature=1.0, generator=torch.manual_seed(0))
    assert torch.equal(again.input_ids, expected.input_ids)
    torch.testing.assert_close(again.stream, expected.stream)


def test_a_token_is_read_once(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    read_on, rows = Decoder.go_on, []

    def count(self: Decoder, embeddings: Tensor, *given: object) -> Tensor:
        rows.append(embeddings.shape[1])
        return read_on(self, embeddings, *given)

    model = make()
    model.open_segment()
    monkeypatch.setattr(Decoder, "go_on", count)
    generate(model, ragged()[0][:1, :2], S)
    # The memory and what is given, words one by one, the memory that is written, and that memory with the next word.
    assert rows == [3 + 2, *[1] * (S - 2), 3, 3 + 1]


class _Own(RMTDecoder):
    def read_segment(self, *given: object) -> tuple[Tensor, Tensor]:
        hidden, memory = super().read_segment(*given)
        return 2 * hidden, memory


def test_whole_segments_where_a_cache_would_not_do(
    make: Make, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(make().open_segment(), SegmentCache)
    assert make().train().open_segment() is None
    with (model := make()).recorded():
        assert model.open_segment() is None
    for kind in WINDOWED:
        assert make(kind, whole=True).open_segment() is None
    # Its rotations are others as soon as a text reaches beyond twelve positions, so no segment does.
    factors = {"long_factor": [4.0, 5.0], "short_factor": [1.0, 1.0], "original_max_position_embeddings": 12}
    rotation = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.8, **factors}
    monkeypatch.setattr(WIDE["llama"], "rope_parameters", rotation)
    with pytest.raises(UserError, match="the backbone sees at most 12 tokens"):
        make("llama")
    assert make("llama", memory_size=1).open_segment() is not None
    backbone = make().decoder
    assert _Own(backbone, S + 6, 3).open_segment() is None
    other = TransformerXL(tokenizer, S, width=8, layers=1, heads=2)
    assert isinstance(_pen(other, read(other, ragged()[0])), _Pen)


def test_a_family_with_a_cache_of_its_own(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that fills what it is given in another way, or does not look at it."""
    ids = ragged()[0]
    expected = generate(make(), ids, S)
    for wrong in (lambda _cache, keys, values, *_: (keys, values), lambda *_: None):
        with monkeypatch.context() as patch:
            patch.setattr(SegmentCache, "update", wrong)
            model = make()
            assert model.open_segment() is None
            assert torch.equal(generate(model, ids, S).input_ids, expected.input_ids)
