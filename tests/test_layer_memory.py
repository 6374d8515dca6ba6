"""Memory in every layer: ARMT and PRMT against a transcription of their paper, row by row, with random weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import chain
from typing import Any

import pytest
import torch
from reference import (
    Associations,
    look_back,
    read_associative_segment,
    read_causal_segment,
    read_parallel_segment,
    read_segment,
)
from test_decoder import CONFIGS
from test_recurrence import assert_same, gradients, probe, texts
from torch import Tensor, nn
from transformers import AlbertConfig, AutoModel, AutoModelForCausalLM, PreTrainedTokenizerBase

from rmt_lightning.core.errors import UserError
from rmt_lightning.models import state as tree
from rmt_lightning.models.armt import ARMT, AssociativeMemory
from rmt_lightning.models.decoder import Decoder
from rmt_lightning.models.encoder import Encoder
from rmt_lightning.models.prmt import PRMT
from rmt_lightning.models.retrieval import Remembered, RMTRetrieval
from rmt_lightning.models.rmt import RMTDecoder, RMTEncoder
from rmt_lightning.models.tiny import TinyBert, TinyLongformer
from rmt_lightning.models.update import Gated, Replace

Make = Callable[..., Any]
S, M = 6, 3
# These normalize in single precision, whatever the precision of the rest.
SINGLE = ("llama",)
KINDS = ("bert", "gpt2", "opt", "llama")
VARIANTS = {
    "armt": (ARMT, {}),
    "heads": (ARMT, {"heads": 2}),
    "no normalizer": (ARMT, {"heads": 2, "normalizer": False}),
    "prmt": (PRMT, {}),
    "retrieval": (RMTRetrieval, {"update": Gated}),
}
IN_LAYERS = [variant for variant in VARIANTS if variant != "retrieval"]


def random_weights(model: nn.Module, std: float = 0.3) -> None:
    for weight in model.parameters():
        nn.init.normal_(weight, std=std)


@pytest.fixture
def make(tokenizer: PreTrainedTokenizerBase) -> Make:
    def make(kind: str = "gpt2", variant: str = "armt", layers: int = 2, **options: Any) -> Any:
        torch.manual_seed(0)
        if kind == "bert":
            backbone: Any = TinyBert(width=16, layers=layers, heads=2, max_positions=64).encoder(tokenizer)
        else:
            config = copy.deepcopy(CONFIGS[kind])
            config.num_hidden_layers = layers
            backbone = Decoder(AutoModelForCausalLM.from_config(config), tokenizer)
        model_class, own = VARIANTS[variant]
        if model_class is ARMT:
            own = {"key_size": 6} | own
        beside = M + 3 if kind == "bert" else M if model_class is ARMT else 2 * M
        model = model_class(backbone, S + beside, M, **own | options)
        random_weights(model)
        return model.double().eval()

    return make


def heads_of(memory: AssociativeMemory) -> list[Associations]:
    """The parts of each head; the bias of β comes last."""
    parts = (memory.query.weight, memory.key.weight, memory.value.weight, memory.strength.weight, memory.strength.bias)
    split = zip(*(part.chunk(memory.heads) for part in parts), strict=True)
    return [Associations(q, k, v, beta[0], bias[0], memory.normalizer) for q, k, v, beta, bias in split]


def transcribe(model: Any, row: list[int], cut_before: int | None = None) -> tuple[Tensor, list[Tensor]]:
    """What is read at the end of a row of full segments, and what is left in the memories, leaf by leaf."""
    backbone, words = model.backbone, model.backbone.model.get_input_embeddings().weight
    armt, encoder = isinstance(model, ARMT), isinstance(backbone, Encoder)
    heads = [heads_of(memory) for memory in model.memories] if armt else []
    memories = [] if armt else [list(layer) for layer in model.memory]
    memory, hidden = list(model.memory) if armt else [words[0]] * M, torch.empty(0)
    for number, start in enumerate(range(0, len(row), S)):
        if number == cut_before:
            for head in chain(*heads):
                head.cut()
            memories = [[token.detach() for token in layer] for layer in memories]
        text = [words[token] for token in row[start : start + S]]
        if encoder:
            cls, sep = words[backbone.cls_token_id], words[backbone.sep_token_id]
            rows, read, blocks = [cls, *memory, sep, *text, sep], slice(1 + M), [slice(1, 1 + M)]
        elif armt:
            rows, read, blocks = [*text, *memory], slice(S), [slice(S, S + M)]
        else:
            rows, read = [*memory, *text, *memory], slice(M, M + S)
            blocks = [slice(M), slice(M + S, M + S + M)]
        parts = backbone.model.base_model, backbone._layers(), rows
        output = (
            read_associative_segment(*parts, blocks[0], heads)
            if armt
            else read_parallel_segment(*parts, memories, blocks)
        )
        hidden = output[read]
    if not armt:
        return hidden, [torch.stack(layer) for layer in memories]
    kept = (([h.A for h in layer], [h.z for h in layer if h.z is not None]) for layer in heads)
    return hidden, [torch.stack(part) for layer in kept for part in layer if part]


def assert_equals(found: Tensor, expected: Tensor, kind: str) -> None:
    precision = 1e-5 if kind in SINGLE else 1e-10
    assert (found - expected).abs().max() <= precision * max(1, expected.abs().max())


@pytest.mark.parametrize("variant", IN_LAYERS)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_transcription(make: Make, kind: str, variant: str) -> None:
    """Hidden states, all that is left in memories, and the gradients of all weights."""
    # Written out, memory tokens see each other as the backbone's own mask has it.
    model = make(kind, variant, **{"memory_attention": "causal"} if variant == "prmt" else {})
    ids = texts(2, 3, S)
    hidden, state = model(ids)
    assert all(leaf.abs().max() > 0.01 for leaf in tree.leaves(state))
    for row in range(2):
        expected, left = transcribe(model, ids[row].flatten().tolist())
        assert_equals(hidden[row], expected, kind)
        for found, written in zip(tree.leaves(tree.take(state, row)), left, strict=True):
            assert_equals(found, written, kind)
    own = gradients(model, probe(hidden[1]) + sum(map(probe, tree.leaves(tree.take(state, 1)))))
    by_hand = gradients(model, probe(expected) + sum(map(probe, left)))
    assert own.keys() == by_hand.keys() and all(own[name].any() for name in own if "memor" in name)
    for name, gradient in own.items():
        assert_equals(gradient, by_hand[name], kind)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_looking_back_equals_the_transcription(make: Make, kind: str) -> None:
    model, ids = make(kind, "retrieval", update=Replace), texts(2, 4, S)
    hidden, state = model(ids)
    weights = [part.weight for part in (model.query, model.key, model.value, model.output)]
    backbone = model.backbone
    for row in range(2):
        memory, memories = model.memory, [model.memory]
        for text in ids[row].tolist():
            read = look_back(*weights, memory, memories)
            if kind == "bert":
                specials = backbone.cls_token_id, backbone.sep_token_id
                expected, memory = read_segment(backbone.model, *specials, text, read)
            else:
                expected, memory = read_causal_segment(backbone.model, text, read, free=True)
            memories.append(memory)
        assert_equals(hidden[row], expected[: 1 + M] if kind == "bert" else expected, kind)
        assert_equals(state.memory[row], memory, kind)
        assert_equals(state.earlier[row], torch.cat(memories[:-1]), kind)
    own = gradients(model, probe(hidden[1, :1]) + probe(state.memory[1]))
    assert_same(own, gradients(model, probe(expected[:1]) + probe(memory)))
    assert own["output.weight"].any() and state.known.all() and state.earlier.shape == (2, 4 * M, 16)
    nn.init.zeros_(model.output.weight)
    plain = RMTEncoder(backbone, S + M + 3, M) if kind == "bert" else RMTDecoder(backbone, S + 2 * M, M)
    plain.double().eval().load_state_dict({"memory": model.memory}, strict=False)
    torch.testing.assert_close(model.encode(ids), plain.encode(ids))


@pytest.mark.parametrize("variant", ["armt", "prmt"])
@pytest.mark.parametrize("depth", [0, 1, 2, -1])
def test_gradients_flow_as_deep_as_asked(make: Make, depth: int, variant: str) -> None:
    model, ids = make("bert", variant, bptt_depth=depth), texts(1, 4, S)
    cut = None if depth < 0 else 3 - depth
    own = gradients(model, probe(model(ids)[0][0, 0]))
    assert_same(own, gradients(model, probe(transcribe(model, ids[0].flatten().tolist(), cut)[0][0])))
    # What was written is read if a border is crossed.
    if variant == "armt":
        assert own["memories.1.key.weight"].any() == (depth != 0)
    else:
        assert own["memory"].any() == (depth == -1)
    # What several processes need: no parameter is without a gradient, also where truncation leaves it at zero.
    model.zero_grad()
    model.encode(ids).sum().backward()
    assert all(weight.grad is not None for weight in model.parameters())


@pytest.mark.parametrize("variant", ["armt", "prmt"])
def test_checkpointing_changes_nothing(make: Make, variant: str) -> None:
    ids = texts(2, 4, S)
    plain, checkpointed = (
        gradients(model, probe(model(ids)[0][:, 0]))
        for model in (make("gpt2", variant), make("gpt2", variant, gradient_checkpointing=True))
    )
    assert_same(plain, checkpointed)


@pytest.mark.parametrize("kind", KINDS)
def test_it_begins_as_its_backbone(make: Make, kind: str) -> None:
    """Though memory has been written: its values are 0."""
    model = make(kind)
    for memory in model.memories:
        nn.init.zeros_(memory.value.weight)
    ids, backbone = texts(2, 3, S), model.backbone
    for reading in model.read(ids):
        found, text = reading.hidden, reading.segment.input_ids
        if kind == "bert":
            words = model.words(reading.segment)
            expected = backbone(torch.cat([words[:, :1], model.memory_tokens(words), words[:, 1:]], dim=1), None)
            torch.testing.assert_close(found, expected[:, : 1 + M])
        else:
            torch.testing.assert_close(found, backbone.model.base_model(input_ids=text)[0])
    assert all(layer.weights.abs().max() > 0 for layer in reading.state.layers)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_text_in_pieces_and_padding_change_nothing(make: Make, kind: str, variant: str) -> None:
    """Each row gives what it gives alone, wherever its padding stands; a row without text keeps its state."""
    model, lengths = make(kind, variant), (11, 4, 6, 1, 0)
    ids, mask = torch.full((5, 13), 3), torch.zeros(5, 13, dtype=torch.long)
    for row, length in enumerate(lengths):
        start = (0, 13 - length, 2)[row % 3]
        ids[row, start : start + length] = texts(5, 1, 11)[row, 0, :length]
        mask[row, start : start + length] = 1
    together, (_, states) = model.encode(ids, mask), model(ids, mask)
    assert all(part.isfinite().all() for part in (together, *tree.leaves(states)))
    for row, length in enumerate(lengths[:-1]):
        first = length % S or min(length, S)
        pieces = texts(5, 1, 11)[row, :, :length].split([first, *[S] * ((length - first) // S)], dim=1)
        torch.testing.assert_close(model.encode(iter(pieces)), together[row : row + 1])
        _, state = model(iter(pieces))
        for alone, among_others in zip(tree.leaves(state), known_of(tree.take(states, row)), strict=True):
            torch.testing.assert_close(alone[0], among_others)
    for untouched, first in zip(known_of(tree.take(states, 4)), tree.leaves(model.initial_state(1)), strict=True):
        assert torch.equal(untouched, first[0])


def known_of(state: Any) -> list[Tensor]:
    """The leaves of a row's state, without what fills up a text that has had fewer segments than others."""
    if isinstance(state, Remembered):
        return [state.memory, state.earlier[state.known], state.known[state.known]]
    return tree.leaves(state)


@pytest.mark.parametrize("normalizer", [True, False])
def test_a_hundred_thousand_writes_stay_finite(normalizer: bool) -> None:
    torch.manual_seed(0)
    memory = AssociativeMemory(8, 4, 1, normalizer)
    random_weights(memory, std=1.0)
    state, always = memory.first(1), 3 * torch.randn(8)
    with torch.no_grad():
        for _ in range(1_000):
            state = memory.write(always + torch.randn(1, 100, 8), state)
    assert state.values.dtype == torch.float32 and all(leaf.isfinite().all() for leaf in tree.leaves(state))
    assert memory.read(always + torch.randn(1, 100, 8), state).isfinite().all()


@pytest.mark.parametrize("variant", ["armt", "prmt"])
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_the_state_is_in_single_precision_under_autocast(make: Make, kind: str, variant: str) -> None:
    model, ids = make(kind, variant).float(), texts(2, 3, S)
    _, expected = model(ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, state = model(ids)
    for found, exact in zip(tree.leaves(state), tree.leaves(expected), strict=True):
        assert found.dtype == torch.float32
        assert (found - exact).abs().max() < 0.3 * exact.abs().max()
    model.bfloat16().encode(ids)
    if variant == "armt":
        assert all(leaf.dtype == torch.float32 for leaf in tree.leaves(model.initial_state(2)))


@pytest.mark.parametrize("options", [{"heads": 3}, {"heads": 4, "key_size": 4}, {"heads": 2, "key_size": 7}])
def test_heads_that_divide_nothing(make: Make, options: dict[str, int]) -> None:
    with pytest.raises(
        UserError, match=r"^model\.heads=\d: must divide the backbone's width 16, and model\.key_size=\d"
    ):
        make(**options)


@pytest.mark.parametrize("kind", ["longformer", "albert"])
def test_backbones_without_layers_to_show(kind: str, tokenizer: PreTrainedTokenizerBase) -> None:
    if kind == "longformer":
        backbone = TinyLongformer(width=16, layers=1, heads=2, max_positions=64, window=8).encoder(tokenizer)
    else:
        size = {"embedding_size": 16, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
        backbone = Encoder(AutoModel.from_config(AlbertConfig(vocab_size=1000, **size)), tokenizer)
    with pytest.raises(UserError, match=rf"^backbone: the layers of {kind} cannot be run one by one; choose an encod"):
        ARMT(backbone, 20, M)
