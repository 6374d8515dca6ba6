"""What is computed in a faster way is what the plain way gives, with random weights everywhere."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, Run, final
from test_backbones import CONFIGS
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import AutoModel

from rmt_lightning import ARMT, PRMT, RMTDecoder, RMTEncoder, RMTRetrieval, Segment, TinyGPT, TransformerXL
from rmt_lightning.models import bert
from rmt_lightning.models.encoder import Encoder
from rmt_lightning.models.recurrence import unroll
from rmt_lightning.models.segment_model import WordModel
from rmt_lightning.training.callbacks import hardware
from rmt_lightning.training.callbacks.hardware import multiply_fast
from rmt_lightning.training.optimization import WarmupDecay
from rmt_lightning.training.trainer import compile_step

SMALL = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
PADDED = torch.arange(20) < torch.tensor([[20], [13]])


def make(kind: str, tokenizer: PreTrainedTokenizerBase) -> Encoder:
    torch.manual_seed(0)
    config: PreTrainedConfig = AutoConfig.for_model(kind, vocab_size=1000, max_position_embeddings=48, **SMALL)
    config.pad_token_id = 0
    if kind in ("electra", "roformer"):
        config.embedding_size = 8
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        setattr(config, name, 0.0)
    encoder = Encoder(AutoModel.from_config(config), tokenizer)
    for weight in encoder.parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.3)
    return encoder


def results(encoder: Encoder, mask: Tensor | None, rows: int, fast: bool) -> dict[str, Tensor]:
    """The hidden states that are read, and the gradients of all weights and inputs that they give."""
    encoder.zero_grad()
    generator = torch.Generator().manual_seed(1)
    dtype = encoder.model.dtype
    embeddings = torch.randn(2, 20, encoder.embedding_width, generator=generator, dtype=dtype).requires_grad_()
    hidden = encoder(embeddings, mask, rows=rows) if fast else encoder._whole(embeddings, mask)[:, :rows]
    if mask is not None:
        hidden = hidden * mask[:, :rows, None]
    (hidden * torch.randn(hidden.shape, generator=generator, dtype=dtype)).sum().backward()
    found = {name: weight.grad for name, weight in encoder.named_parameters()} | {"embeddings": embeddings.grad}
    return {"hidden": hidden.detach()} | {name: grad.clone() for name, grad in found.items() if grad is not None}


@pytest.mark.parametrize(("dtype", "precision"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["fp64", "fp32"])
@pytest.mark.parametrize("rows", [1, 5, 20])
@pytest.mark.parametrize("mask", [None, PADDED.long()], ids=["full", "padded"])
@pytest.mark.parametrize("kind", bert._FAMILIES)
def test_of_the_last_layer_what_is_read(
    kind: str,
    mask: Tensor | None,
    rows: int,
    dtype: torch.dtype,
    precision: float,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    encoder = make(kind, tokenizer).to(dtype)
    assert bert.known(encoder.model)
    expected = results(encoder, mask, rows, fast=False)
    found = results(encoder, mask, rows, fast=True)
    assert found.keys() == expected.keys()
    largest = max(float(value.abs().max()) for name, value in expected.items() if name != "hidden")
    for name, value in expected.items():
        # The gradient of a key's bias is 0 but for rounding.
        scale = value.abs().max() if name == "hidden" else largest
        assert (found[name] - value).abs().max() <= precision * scale, name


@pytest.mark.parametrize("kind", ["distilbert", "mpnet", "modernbert"])
def test_others_are_cut_to_what_is_read(kind: str, tokenizer: PreTrainedTokenizerBase) -> None:
    encoder = Encoder(AutoModel.from_config(copy.deepcopy(CONFIGS[kind][0])), tokenizer).eval()
    assert not bert.known(encoder.model)
    embeddings = torch.randn(2, 20, encoder.embedding_width)
    torch.testing.assert_close(encoder(embeddings, None, rows=5), encoder(embeddings, None)[:, :5])


def test_dropout_is_obeyed(tokenizer: PreTrainedTokenizerBase) -> None:
    """In training the same input gives other states each time, by dropout of attention alone too."""
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        config = AutoConfig.for_model("bert", vocab_size=1000, **SMALL)
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
        setattr(config, name, 0.5)
        encoder = Encoder(AutoModel.from_config(config), tokenizer).train()
        embeddings = torch.randn(2, 20, 16)
        assert not torch.equal(encoder(embeddings, None, rows=5), encoder(embeddings, None, rows=5))
        encoder.eval()
        assert torch.equal(encoder(embeddings, None, rows=5), encoder(embeddings, None, rows=5))


def test_classes_from_elsewhere_do_as_they_like(tokenizer: PreTrainedTokenizerBase) -> None:
    """A model that bears the name of a family, but is another."""
    encoder = make("bert", tokenizer)
    encoder.model.__class__ = type("BertModel", (type(encoder.model),), {"__module__": "elsewhere"})
    assert not bert.known(encoder.model)


def test_products_are_as_exact_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    try:
        multiply_fast()
        assert hardware._error_of_products() < 1e-5
        torch.set_float32_matmul_precision("highest")
        # A processor that takes its leave to compute in bf16.
        monkeypatch.setattr(hardware, "_error_of_products", lambda: 1e-3)
        multiply_fast()
        assert torch.get_float32_matmul_precision() == "highest"
        # What somebody has chosen stays.
        torch.set_float32_matmul_precision("high")
        multiply_fast()
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def reads_in_training(kind: str, tokenizer: PreTrainedTokenizerBase) -> WordModel[Any]:
    """A small model with dropout off and random weights everywhere, in double precision."""
    torch.manual_seed(0)
    backbone = TinyGPT(vocabulary_size=200, width=16, layers=2, heads=2)
    model: WordModel[Any] = {
        "encoder": lambda: RMTEncoder(make("bert", tokenizer), 20, 3),
        "electra": lambda: RMTEncoder(make("electra", tokenizer), 20, 3),
        "decoder": lambda: RMTDecoder(backbone.decoder(tokenizer), 20, 3),
        "transformer_xl": lambda: TransformerXL(tokenizer, 20, 16, 2, 2, 8, 3),
        "armt": lambda: ARMT(make("electra", tokenizer), 20, 3),
        "prmt": lambda: PRMT(backbone.decoder(tokenizer), 20, 3),
        "retrieval": lambda: RMTRetrieval(make("electra", tokenizer), 20, 3),
        "causal armt": lambda: ARMT(backbone.decoder(tokenizer), 20, 3),
    }[kind]()
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.3)
    return model.double().eval()


@pytest.mark.parametrize("bptt_depth", [-1, 1])
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize(
    "kind", ["encoder", "electra", "decoder", "transformer_xl", "armt", "causal armt", "prmt", "retrieval"]
)
def test_words_are_looked_up_once(
    kind: str, padded: bool, bptt_depth: int, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = reads_in_training(kind, tokenizer)
    model.bptt_depth = bptt_depth
    ids = torch.randint(5, len(tokenizer), (2, 3 * model.text_length), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, : model.text_length + 4] = 0 if padded else 1
    given = (ids, mask) if padded else (ids.view(2, 3, -1), None)
    looked_up: list[Tensor] = []
    embed = model.embed
    monkeypatch.setattr(model, "embed", lambda tokens: looked_up.append(tokens) or embed(tokens))

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        hidden, _ = model(*given)
        (
            hidden * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1), dtype=hidden.dtype)
        ).sum().backward()
        return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}

    found = gradients()
    assert len(looked_up) == 1
    monkeypatch.setattr(model, "looked_up", lambda segments: segments)
    expected = gradients()
    assert len(looked_up) == 4
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-10, atol=1e-12, msg=name)


def test_words_are_not_kept_where_memory_counts(tokenizer: PreTrainedTokenizerBase) -> None:
    model = reads_in_training("encoder", tokenizer)
    segments = [Segment(torch.full((1, 14), 7)) for _ in range(3)]
    assert all(segment.words is not None for segment in model.looked_up(segments))
    with torch.no_grad():
        assert model.looked_up(segments) is segments
    model.gradient_checkpointing = True
    assert model.looked_up(segments) is segments


@pytest.mark.parametrize("segments", [[0, 1, 2, 3], iter([0, 1, 2, 3])], ids=["known", "stream"])
def test_the_last_segment_is_not_computed_again(segments: Iterable[int]) -> None:
    read: list[int] = []

    def step(segment: int, state: Tensor) -> tuple[Tensor, Tensor]:
        read.append(segment)
        return state.sin(), state.sin()

    known = isinstance(segments, list)
    state = torch.ones(3, requires_grad=True)
    *_, (hidden, _) = unroll(step, segments, state, checkpointing=True)
    hidden.sum().backward()
    assert read == [0, 1, 2, 3, 2, 1, 0] if known else [0, 1, 2, 3, 3, 2, 1, 0]
    expected = torch.ones(3, requires_grad=True)
    expected.sin().sin().sin().sin().sum().backward()
    torch.testing.assert_close(state.grad, expected.grad)


@pytest.mark.soak
def test_a_compiled_run_is_the_same_run(train: Run, tmp_path: Path) -> None:
    """It learns the same, and can be resumed without being compiled."""
    options = ("trainer.max_steps=6", "test.segments=[1,3]", "trainer.threads=1")
    for name, more in (("plain", ()), ("compiled", ("trainer.compile=default",))):
        result = train(*options, *more, f"hydra.run.dir={name}")
        assert result.returncode == 0, result.stderr
    plain, compiled = (final(tmp_path / name) for name in ("plain", "compiled"))
    assert plain.keys() == compiled.keys()
    for name, weight in plain.items():
        torch.testing.assert_close(compiled[name], weight, rtol=1e-3, atol=1e-5, msg=name)
    hardware = json.loads((tmp_path / "compiled" / "hardware.json").read_text())
    assert hardware[-1]["threads"] == 1
    again = train("resume=compiled", "trainer.max_steps=8", "trainer.compile=null", small=False)
    assert again.returncode == 0, again.stderr


def test_nothing_can_be_compiled_here(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(*_: object, **__: object) -> None:
        raise RuntimeError("no working C++ compiler found\nin many lines")

    monkeypatch.setattr(torch, "compile", no_compiler)
    told = refused("noise.documents=20", "trainer.compile=default")
    assert told == (
        "error: trainer.compile=default: nothing can be compiled here (no working C++ compiler found); install a C++ "
        "compiler, or leave it out\n"
    )


def test_graphs_do_not_write_over_what_has_left_them(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They give their results in the same memory each time."""

    def compile_to_a_graph(step: Callable[..., Any], mode: str) -> Callable[..., Any]:
        memory: list[Tensor] = []

        def replay(*arguments: Any) -> tuple[Tensor, Tensor]:
            hidden, state = step(*arguments)
            if not memory:
                memory.extend((torch.empty_like(hidden), torch.empty_like(state)))
            return memory[0].copy_(hidden), memory[1].copy_(state)

        return replay

    monkeypatch.setattr(torch, "compile", compile_to_a_graph)
    plain, replayed = (reads_in_training("encoder", tokenizer).eval() for _ in range(2))
    compile_step(replayed, "reduce-overhead")
    ids = torch.randint(5, len(tokenizer), (2, 4, plain.text_length))
    with torch.no_grad():
        for found, expected in zip(list(replayed.read(ids)), list(plain.read(ids)), strict=True):
            torch.testing.assert_close(found[1:], expected[1:])


def test_segments_are_one_program(tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first and the others, of inputs of any length: to compile another takes half a minute."""
    programs: list[object] = []

    def count(graph: Callable[..., Any], _: object) -> Callable[..., Any]:
        programs.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=count))
    model = reads_in_training("encoder", tokenizer)
    compile_step(model, "default")
    for segments in (3, 1, 2):
        model(torch.randint(5, len(tokenizer), (2, segments, model.text_length)))[0].sum().backward()
    assert len(programs) == 1


@pytest.mark.parametrize("word", ["+trainer.accumulate_grad_batches=2", "model.gradient_checkpointing=true"])
def test_what_graphs_cannot_do_is_refused(word: str, refused: Callable[..., str]) -> None:
    told = refused("noise.documents=20", word, "trainer.compile=reduce-overhead")
    assert told == (
        f"error: trainer.compile=reduce-overhead: its CUDA graphs do not go together with {word.lstrip('+')}; give "
        "trainer.compile=default, or leave one of them out\n"
    )


def test_the_commit_is_noted() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("this is no checkout")
    told = hardware._commit()
    assert told and len(told.removesuffix("-dirty")) == 40


@pytest.mark.fault("gradients are clipped in mixed precision, as on every GPU", "the run trains")
def test_gradients_are_clipped_in_mixed_precision(train: Run) -> None:
    """Also if the run has begun in another one, whose optimizer was fused."""
    begun = train("trainer.max_steps=2", "trainer.precision=32-true", "hydra.run.dir=run")
    assert begun.returncode == 0, begun.stderr
    mixed = train("resume=run", "trainer.max_steps=4", "trainer.precision=bf16-mixed", small=False)
    assert mixed.returncode == 0, mixed.stderr


def test_the_fused_optimizer_takes_the_same_steps() -> None:
    weights = [nn.Parameter(torch.ones(5)) for _ in range(2)]
    for weight, fused in zip(weights, (False, True), strict=True):
        optimizer, schedule = WarmupDecay(steps=20, lr=0.1, weight_decay=0.5).build([weight], 1, fused)
        for step in range(10):
            weight.grad = torch.arange(5.0) - step
            optimizer.step()
            schedule.step()
    assert not torch.equal(weights[0], torch.ones(5))
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-5, atol=0)
