"""The recurrent decoder on every kind of causal language model that the README names, with small random weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from reference import read_causal_segment, read_causal_text
from test_recurrence import assert_same, gradients, probe
from torch import Tensor
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    FalconConfig,
    FalconH1Config,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    Lfm2Config,
    LlamaConfig,
    MistralConfig,
    MptConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen3Config,
    Qwen3NextConfig,
)

from rmt_lightning.core.errors import UserError
from rmt_lightning.models.armt import ARMT
from rmt_lightning.models.decoder import Decoder
from rmt_lightning.models.recurrence import Segment
from rmt_lightning.models.rmt import RMTDecoder
from rmt_lightning.models.sources import Pretrained, Restored
from rmt_lightning.models.tiny import TinyGPT

SMALL = {"vocab_size": 1000, "max_position_embeddings": 48, "hidden_size": 16, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "intermediate_size": 32, "bos_token_id": 0, "eos_token_id": 0}
GROUPED = {"num_key_value_heads": 2, "head_dim": 4}
CONFIGS: dict[str, PreTrainedConfig] = {
    "gpt2": GPT2Config(vocab_size=1000, n_positions=48, n_embd=16, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0),
    # Embeddings narrower than the layers, as in the OPT of 350M.
    "opt": OPTConfig(
        **{key: SMALL[key] for key in ("vocab_size", "max_position_embeddings", "hidden_size", "num_hidden_layers")},
        num_attention_heads=4, ffn_dim=32, word_embed_proj_dim=8, do_layer_norm_before=False,
    ),
    "gpt_neox": GPTNeoXConfig(**SMALL, **HEADS),
    "llama": LlamaConfig(**SMALL, **HEADS, **GROUPED),
    "qwen2": Qwen2Config(**SMALL, **HEADS, num_key_value_heads=2),
    "qwen3": Qwen3Config(**SMALL, **HEADS, **GROUPED),
}  # fmt: skip
MIXED = ["sliding_attention", "full_attention"]
# Layers see a window of the last four tokens: all of them, or some.
WINDOWED: dict[str, PreTrainedConfig] = {
    "mistral": MistralConfig(**SMALL, **HEADS, **GROUPED, sliding_window=4),
    "phi3": Phi3Config(**SMALL, **HEADS, num_key_value_heads=2, pad_token_id=0, sliding_window=4),
    "gemma3_text": Gemma3TextConfig(**SMALL, **HEADS, **GROUPED, sliding_window=4, layer_types=MIXED),
    "qwen2 windowed": Qwen2Config(
        **SMALL, **HEADS, num_key_value_heads=2, use_sliding_window=True, sliding_window=4, layer_types=MIXED
    ),
}
# Rotations are others where any text of a batch is longer than 24 tokens.
STRETCHED = Phi3Config(
    **SMALL, **HEADS, num_key_value_heads=2, pad_token_id=0, original_max_position_embeddings=24,
    rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 2, "long_factor": [2.0, 8.0],
                     "original_max_position_embeddings": 24},
)  # fmt: skip
CONV = {"layer_types": ["conv", "full_attention"]}
LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
# What they hand from token to token beside attention is not masked, or positions cannot be told.
DISOBEDIENT: dict[str, PreTrainedConfig] = {
    "lfm2": Lfm2Config(**SMALL, **HEADS, num_key_value_heads=2, **CONV),
    "qwen3_next": Qwen3NextConfig(**SMALL, **HEADS, **GROUPED, **LINEAR, num_experts=0),
    "falcon_h1": FalconH1Config(
        **SMALL, **HEADS, num_key_value_heads=2, mamba_n_heads=4, mamba_d_ssm=32, mamba_d_head=8
    ),
    "falcon": FalconConfig(vocab_size=1000, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, alibi=True),
}
# Some backbones compute softmax and rotations in single precision, whatever the precision of the rest.
ATOL = 1e-6
Make = Callable[..., RMTDecoder]


@pytest.fixture
def make_decoder(tokenizer: PreTrainedTokenizerBase) -> Make:
    def make(
        kind: str = "gpt2", segment_length: int = 17, memory_size: int = 3, double: bool = True, **options
    ) -> RMTDecoder:
        torch.manual_seed(0)
        gpt = AutoModelForCausalLM.from_config(copy.deepcopy((CONFIGS | WINDOWED)[kind]))
        # Small random weights say little; larger ones make every position and every word matter.
        for weight in gpt.parameters():
            weight.data.mul_(4 if weight.dim() > 1 else 1)
        model = RMTDecoder(Decoder(gpt, tokenizer), segment_length, memory_size, **options)
        # In double precision, differences between two ways to the same result are rounding only. Dropout is off.
        return (model.double() if double else model).eval()

    return make


def texts(batch: int, length: int) -> Tensor:
    return torch.randint(5, 600, (batch, length), generator=torch.Generator().manual_seed(1))


def plain(model: RMTDecoder) -> torch.nn.Module:
    """The backbone by itself, its attention written out."""
    gpt = copy.deepcopy(model.decoder.model)
    gpt.set_attn_implementation("eager")
    return gpt


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=ATOL, rtol=1e-6)


@pytest.mark.parametrize("attention", ["free", "causal"])
@pytest.mark.parametrize("memory_size", [0, 3])
@pytest.mark.parametrize("kind", CONFIGS)
def test_equals_the_transcription(make_decoder: Make, kind: str, memory_size: int, attention: str) -> None:
    model = make_decoder(kind, memory_size=memory_size, memory_attention=attention)
    assert (model.text_length, model.decoder.max_positions) == (17 - 2 * memory_size, 48)
    ids = texts(2, 3 * model.text_length)
    hidden, memory = model(ids.view(2, 3, -1))
    for row in range(2):
        expected_hidden, expected_memory = read_causal_text(
            plain(model), ids[row].tolist(), model.memory, model.text_length, free=attention == "free"
        )
        assert_close(hidden[row], expected_hidden)
        assert_close(memory[row], expected_memory)


def test_free_and_causal_memory_differ(make_decoder: Make) -> None:
    ids = texts(1, 33).view(1, 3, 11)
    free, causal = (make_decoder(memory_attention=attention)(ids)[0] for attention in ("free", "causal"))
    assert not torch.allclose(free, causal, atol=1e-3)


@pytest.mark.parametrize("kind", CONFIGS)
def test_text_is_causal_and_sees_all_memory(make_decoder: Make, kind: str) -> None:
    model = make_decoder(kind)
    ids = texts(1, model.text_length)
    memory = model.memory[None].detach()
    hidden, _ = model.step(Segment(ids), memory)
    changed = ids.clone()
    changed[:, 6] += 1
    other, _ = model.step(Segment(changed), memory)
    assert_close(other[:, :6], hidden[:, :6])
    assert (other[:, 6:] != hidden[:, 6:]).any(dim=-1).all()
    for token in range(model.memory_size):
        nudged = memory.clone()
        nudged[:, token] *= -1
        assert (model.step(Segment(ids), nudged)[0] != hidden).any(dim=-1).all()


@pytest.mark.parametrize("depth", [1, 2, 3, 9, -1])
def test_gradients_equal_a_graph_cut_by_hand(make_decoder: Make, depth: int) -> None:
    model = make_decoder(bptt_depth=depth)
    ids = texts(1, 5 * model.text_length)
    cut = 4 - depth if 0 <= depth < 4 else None
    own = gradients(model, probe(model(ids.view(1, 5, -1))[0][0]))
    gpt = model.decoder.model
    gpt.set_attn_implementation("eager")
    options = {} if cut is None else {"cut_before": cut}
    by_hand = gradients(model, probe(read_causal_text(gpt, ids[0].tolist(), model.memory, 11, **options)[0]))
    assert_same(own, by_hand)
    assert (own["memory"].abs().sum() > 0) == (cut is None)


def test_depths_differ(make_decoder: Make) -> None:
    ids = texts(2, 55).view(2, 5, 11)
    found = [
        gradients(model, probe(model(ids)[0][:, -1]))
        for model in (make_decoder(bptt_depth=depth) for depth in (1, 2, 3, -1))
    ]
    name = "decoder.model.transformer.wte.weight"
    for one, other in pairwise(found):
        assert not torch.allclose(one[name], other[name], atol=1e-6)


@pytest.mark.fault("a backbone whose layers see a window of the text", "the window holds, and all see memory")
@pytest.mark.parametrize("kind", WINDOWED)
def test_a_window_of_the_text_is_kept(make_decoder: Make, kind: str) -> None:
    ids = texts(2, 17)
    without = make_decoder(kind, memory_size=0)
    with torch.no_grad():
        assert_close(without(ids)[0], without.decoder.model.base_model(input_ids=ids)[0])
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    assert_close(without(ids, mask)[0][1, :9], without(ids[1:, :9])[0][0, :9])
    model = make_decoder(kind)
    ids = texts(1, model.text_length)
    memory = model.memory[None].detach()
    hidden, written = model.step(Segment(ids), memory)
    other, _ = model.step(Segment(ids), memory.flip(-1))
    assert (other != hidden).any(dim=-1).all()
    changed = ids.clone()
    changed[:, 0] += 1
    assert (model.step(Segment(changed), memory)[1] != written).any(dim=-1).all()
    # Weights of attention are looked at through the same windows.
    with model.recorded():
        assert_close(model.step(Segment(ids), memory)[0], hidden)


@pytest.mark.fault("rotations that depend on the longest text of a batch", "segments are not longer than they hold")
def test_rotations_do_not_depend_on_other_rows(tokenizer: PreTrainedTokenizerBase) -> None:
    torch.manual_seed(0)
    decoder = Decoder(AutoModelForCausalLM.from_config(STRETCHED), tokenizer)
    with pytest.raises(UserError, match=r"^data.segment_length=25: the backbone sees at most 24 tokens"):
        RMTDecoder(decoder, 25, memory_size=0)
    model = RMTDecoder(decoder, 24, memory_size=0).double().eval()
    ids, mask = texts(2, 24), torch.ones(2, 24)
    mask[0, 9:] = 0
    assert_close(model(ids, mask.long())[0][0, :9], model(ids[:1, :9])[0][0, :9])


@pytest.mark.fault("a backbone that sees images too", "its sizes are those of what reads text, which alone is trained")
def test_what_sees_images_too(tokenizer: PreTrainedTokenizerBase) -> None:
    torch.manual_seed(0)
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    text = WINDOWED["gemma3_text"].to_dict()
    config = Gemma3Config(text_config=text, vision_config=vision | {"image_size": 8, "patch_size": 4})
    decoder = Decoder(AutoModelForCausalLM.from_config(config), tokenizer)
    with pytest.raises(UserError, match=r"^data.segment_length=49: the backbone sees at most 48 tokens"):
        RMTDecoder(decoder, 49)
    for kind in (RMTDecoder, ARMT):
        model = kind(decoder, 40, memory_size=3)
        hidden, state = model(texts(2, 60))
        (hidden.sum() + sum(part.sum() for part in tree_leaves(state))).backward()
        left = [name for name, weight in model.named_parameters() if weight.requires_grad and weight.grad is None]
        assert not [name for name in left if "vision" in name or "projector" in name]
        assert model.step(Segment(texts(1, 9)), model.initial_state(1))[0].shape == (1, 9, 16)
    model = RMTDecoder(decoder, 40, memory_size=3)
    with model.recorded() as maps:
        model.step(Segment(texts(1, 9)), model.initial_state(1))
    assert maps[0].shape[:2] == (2, 1)


@pytest.mark.fault("a backbone that does not obey a mask", "it is refused in one line")
@pytest.mark.parametrize("kind", DISOBEDIENT)
def test_what_does_not_obey_is_refused(kind: str, tokenizer: PreTrainedTokenizerBase) -> None:
    torch.manual_seed(0)
    gpt = AutoModelForCausalLM.from_config(copy.deepcopy(DISOBEDIENT[kind]))
    with pytest.raises(UserError, match=rf"^backbone: {kind} [^\n]*; choose a causal language model such as GPT-2"):
        Decoder(gpt, tokenizer)


@pytest.mark.parametrize("kind", CONFIGS)
def test_checkpointing_changes_nothing(make_decoder: Make, kind: str) -> None:
    ids = texts(2, 33).view(2, 3, 11)
    kept, computed_again = (
        gradients(model, probe(model(ids)[0]))
        for model in (make_decoder(kind), make_decoder(kind, gradient_checkpointing=True))
    )
    assert_same(kept, computed_again)


@pytest.mark.parametrize("kind", CONFIGS)
def test_padding_changes_nothing(make_decoder: Make, kind: str) -> None:
    """Rows of unequal length, padded left, right or on both sides with anything: each gives what it gives alone."""
    model = make_decoder(kind)
    rows = [texts(1, n)[0] for n in (1, 7, 11, 12, 30)]
    width = max(map(len, rows)) + 3
    ids = torch.full((len(rows), width), 3)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        start = (0, width - len(row), 2)[number % 3]
        ids[number, start : start + len(row)] = row
        mask[number, start : start + len(row)] = 1
    read = model.encode(ids, mask)
    assert_close(model.encode(torch.where(mask.bool(), ids, 99), mask), read)
    _, memory = model(ids, mask)
    for number, row in enumerate(rows):
        assert_close(read[number], model.encode(row[None])[0])
        assert_close(memory[number], model(row[None])[1][0])
    # In a segment that is half full, the memory after the text is as near as if there were no padding.
    hidden, written = read_causal_segment(plain(model), rows[1].tolist(), model.memory, free=True)
    assert_close(read[1], hidden[-1])
    assert_close(memory[1], written)


def test_a_row_without_text_keeps_its_memory(make_decoder: Make) -> None:
    for memory_size in (0, 3):
        model = make_decoder(memory_size=memory_size)
        mask = torch.zeros(2, 5, dtype=torch.long)
        mask[0, :3] = 1
        hidden, memory = model(texts(2, 5), mask)
        assert hidden.isfinite().all() and memory.isfinite().all()
        assert torch.equal(memory[1], model.memory)
        found = gradients(model, probe(hidden[0, 2]))
        assert all(gradient.isfinite().all() for gradient in found.values())
        assert_same(found, gradients(model, probe(model(texts(2, 5)[:1, :3])[0][0, 2])))


def test_a_stream_equals_all_at_once(make_decoder: Make) -> None:
    model = make_decoder()
    ids = texts(2, 66).view(2, 6, 11)
    whole, memory = model(ids)
    streamed, _ = model(segment for segment in ids.unbind(dim=1))
    _, half = model(ids[:, :3])
    resumed, after = model(ids[:, 3:], state=half)
    for found, expected in ((streamed, whole), (resumed, whole), (after, memory)):
        assert_close(found, expected)


@pytest.mark.parametrize("kind", CONFIGS)
def test_words_and_classes(make_decoder: Make, kind: str) -> None:
    """Scores are the backbone's own, and neither loss leaves a parameter without gradient, which DDP would not bear."""
    model = make_decoder(kind, memory_size=0, double=False)
    ids = texts(2, model.text_length)
    hidden, _ = model(ids[:, None])
    torch.testing.assert_close(model.logits(hidden), model.decoder.model(ids).logits, atol=1e-4, rtol=1e-4)
    model = make_decoder(kind, double=False)
    for loss in (model.encode(ids).sum(), model.logits(model(ids)[0]).logsumexp(-1).sum()):
        model.zero_grad()
        loss.backward()
        assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_bfloat16_autocast(make_decoder: Make) -> None:
    model = make_decoder(double=False)
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[1, 9:] = 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden, memory = model(texts(2, 30), mask)
    hidden.sum().backward()
    assert memory.dtype == torch.float32 and hidden.isfinite().all()
    assert model.memory.grad is not None and model.memory.grad.isfinite().all()


def test_saved_and_restored(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    decoder = TinyGPT(width=16, layers=1, heads=2).decoder(tokenizer)
    decoder.model.half().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = Pretrained(str(tmp_path)).decoder(tokenizer)
    assert all(module.training for module in loaded.modules()) and loaded.untied == []
    for name, value in loaded.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, decoder.state_dict()[name].float())
    decoder.model.save_pretrained(tmp_path / "backbone")
    restored = Restored(tmp_path).decoder(tokenizer)
    assert {k: v.shape for k, v in restored.state_dict().items()} == {
        k: v.shape for k, v in loaded.state_dict().items()
    }


def test_scores_of_large_models_are_plain_but_for_rounding(tokenizer: PreTrainedTokenizerBase) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(**SMALL | {"hidden_size": 128}, **HEADS, tie_word_embeddings=False)
    )
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(20)
        model.lm_head.weight.mul_(1e4)
    assert Decoder(model, tokenizer).can_write


def test_what_cannot_serve_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    gpt = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS["gpt2"]), attn_implementation="eager")
    with pytest.raises(UserError, match="gpt2 comes with eager attention, and memory needs scaled-dot-product"):
        Decoder(gpt, tokenizer)
    # Their positions are slopes that are added to the scores.
    bloom = BloomConfig(vocab_size=1000, hidden_size=16, n_layer=1, n_head=2)
    for config in (bloom, MptConfig(vocab_size=1000, d_model=16, n_layers=1, n_heads=2)):
        with pytest.raises(UserError, match=rf"^backbone: {config.model_type} comes with eager attention"):
            Decoder(AutoModelForCausalLM.from_config(config), tokenizer)
    decoder = TinyGPT(width=16, layers=1, heads=2, max_positions=32).decoder(tokenizer)
    for config in (CohereConfig(**SMALL, **HEADS), GraniteConfig(**SMALL, **HEADS, logits_scaling=8.0)):
        with pytest.raises(UserError, match=rf"^backbone: {config.model_type} scales or bounds its scores of words"):
            Decoder(AutoModelForCausalLM.from_config(config), tokenizer)
    with pytest.raises(UserError, match=r"at most 32 tokens; give 32 or less"):
        RMTDecoder(decoder, segment_length=33)
    with pytest.raises(UserError, match=r"10 read memory and 10 write memory tokens leave no room .* more than 20"):
        RMTDecoder(decoder, segment_length=20)
