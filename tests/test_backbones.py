"""Every kind of encoder that the README names, with small random weights."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import pickle
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    BartConfig,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    BigBirdConfig,
    CanineConfig,
    ConvBertConfig,
    DistilBertConfig,
    ElectraConfig,
    FNetConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    LongformerConfig,
    ModernBertConfig,
    MPNetConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    ReformerConfig,
    RobertaConfig,
    RoFormerConfig,
    SqueezeBertConfig,
    T5Config,
    XLNetConfig,
    YosoConfig,
)
from transformers.models.auto.modeling_auto import AutoModel

from rmt_lightning.app.build import save_architecture
from rmt_lightning.core.errors import UserError
from rmt_lightning.models.backbone import Transformer
from rmt_lightning.models.decoder import Decoder
from rmt_lightning.models.encoder import Encoder
from rmt_lightning.models.recurrence import Segment
from rmt_lightning.models.rmt import RMTDecoder, RMTEncoder
from rmt_lightning.models.sources import Pretrained, Restored
from rmt_lightning.models.tiny import TinyBert, TinyGPT, TrainingText

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
CONFIGS: dict[str, tuple[PreTrainedConfig, int]] = {
    "bert": (BertConfig(vocab_size=1000, max_position_embeddings=48, **SMALL), 48),
    "roberta": (RobertaConfig(vocab_size=1000, max_position_embeddings=50, pad_token_id=1, **SMALL), 48),
    "distilbert": (
        DistilBertConfig(vocab_size=1000, max_position_embeddings=48, dim=16, n_layers=2, n_heads=2, hidden_dim=32),
        48,
    ),
    "electra": (ElectraConfig(vocab_size=1000, max_position_embeddings=48, embedding_size=8, **SMALL), 48),
    "mpnet": (MPNetConfig(vocab_size=1000, max_position_embeddings=50, pad_token_id=1, **SMALL), 48),
    "modernbert": (
        ModernBertConfig(
            vocab_size=1000, max_position_embeddings=48, pad_token_id=0, bos_token_id=2, eos_token_id=3,
            cls_token_id=2, sep_token_id=3, local_attention=16, **SMALL,
        ),
        48,
    ),
    "roformer": (RoFormerConfig(vocab_size=1000, embedding_size=16, max_position_embeddings=48, **SMALL), 48),
    # Their inputs are padded to whole windows and blocks, so the last few positions are of no use.
    "longformer": (LongformerConfig(vocab_size=1000, max_position_embeddings=53, attention_window=16, **SMALL), 48),
    "bigbird": (
        BigBirdConfig(vocab_size=1000, max_position_embeddings=50, block_size=4, num_random_blocks=1, **SMALL), 48
    ),
}  # fmt: skip

# Their only layers see a window of the text.
LOCAL = ["sliding_attention"] * 2
WINDOWED: dict[str, PreTrainedConfig] = {
    "modernbert": ModernBertConfig(**CONFIGS["modernbert"][0].to_dict() | {"local_attention": 4, "layer_types": LOCAL}),
    "longformer": LongformerConfig(**CONFIGS["longformer"][0].to_dict() | {"attention_window": 4}),
    "openai_privacy_filter": AutoConfig.for_model(
        "openai_privacy_filter", vocab_size=1000, sliding_window=2, head_dim=8, num_key_value_heads=2,
        num_local_experts=2, num_experts_per_tok=2, pad_token_id=0, **SMALL,
    ),
}  # fmt: skip

# They mix tokens beside attention, ignore masks, or take no embeddings.
DISOBEDIENT: dict[str, tuple[PreTrainedConfig, str]] = {
    "fnet": (FNetConfig(vocab_size=1000, **SMALL), "does not obey a mask"),
    "yoso": (YosoConfig(vocab_size=1000, **SMALL), "does not obey a mask"),
    "convbert": (ConvBertConfig(vocab_size=1000, embedding_size=16, **SMALL), "does not obey a mask"),
    "reformer": (
        ReformerConfig(vocab_size=1000, hidden_size=16, num_attention_heads=2, attention_head_size=8,
                       attn_layers=["local"], axial_pos_shape=(8, 8), axial_pos_embds_dim=(8, 8)),
        "gives no hidden state for each token",
    ),
    "bart": (BartConfig(vocab_size=1000, d_model=16, encoder_layers=1, decoder_layers=1), "cannot be run on"),
    "t5": (T5Config(vocab_size=1000, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2), "cannot be run on embed"),
    "squeezebert": (SqueezeBertConfig(vocab_size=1000, embedding_size=16, **SMALL), "cannot be run on embeddings"),
    "canine": (CanineConfig(**SMALL), "cannot be run on embeddings"),
    "gpt2": (GPT2Config(vocab_size=1000, n_embd=16, n_layer=1, n_head=2), "lets its first token"),
}  # fmt: skip
if "ultrabert" in CONFIG_MAPPING:  # not in all versions of transformers
    local = AutoConfig.for_model("ultrabert", vocab_size=1000, layer_types=LOCAL, num_key_value_heads=2, **SMALL)
    DISOBEDIENT["ultrabert"] = (local, "has layers that see a window of a text, and cannot be told to see memory")


@pytest.mark.parametrize("name", CONFIGS)
def test_encoder(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    config, positions = CONFIGS[name]
    torch.manual_seed(0)
    model = RMTEncoder(Encoder(AutoModel.from_config(config), tokenizer), positions, memory_size=4).eval()
    assert model.encoder.max_positions == positions

    segments = torch.randint(5, 600, (2, 3, model.text_length))
    hidden, memory = model(segments)
    assert hidden.shape == (2, 1 + 4, 16)
    assert memory.shape == (2, 4, 16)

    # Memory matters across segments, and learns.
    changed = segments.clone()
    changed[:, 0] = changed[:, 0].flip(1)
    assert not torch.equal(model(changed)[0][:, 0], hidden[:, 0])
    hidden[:, 0, 0].sum().backward()
    unused = {key: value.requires_grad for key, value in model.named_parameters() if value.grad is None}
    # RoFormer keeps the table of its rotations, which is never trained, among the parameters.
    assert unused == ({"encoder.model.encoder.embed_positions.weight": False} if name == "roformer" else {})
    assert model.memory.grad is not None and model.memory.grad.abs().sum() > 0

    # A row gives the same alone and beside a longer one.
    ids = torch.randint(5, 600, (2, 70))
    mask = torch.ones_like(ids)
    mask[0, 45:] = 0
    with torch.no_grad():
        together = model(ids, mask)[0][:, 0]
        torch.testing.assert_close(together[0], model(ids[:1, :45])[0][0, 0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(together[1], model(ids[1:])[0][0, 0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_one_segment_without_memory_is_what_the_plain_model_sees(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    config, positions = CONFIGS[name]
    torch.manual_seed(0)
    plain = AutoModel.from_config(config).eval()
    encoder = Encoder(copy.deepcopy(plain), tokenizer)
    # MPNet counts positions over all words but those with the id of its padding, which is that of [CLS] here.
    encoder.cls_token_id = 600
    model = RMTEncoder(encoder, positions, memory_size=0).eval()
    ids = torch.randint(5, 600, (1, model.text_length))
    words = torch.cat([torch.tensor([[600, encoder.sep_token_id]]), ids, torch.tensor([[encoder.sep_token_id]])], dim=1)
    at_cls = (torch.arange(words.shape[1]) == 0).long()[None]
    options = {"global_attention_mask": at_cls} if name == "longformer" else {}
    with torch.no_grad():
        torch.testing.assert_close(model(ids)[0], plain(input_ids=words, **options)[0][:, :1], atol=1e-5, rtol=1e-4)


@pytest.mark.fault("an encoder whose layers see a window of the text", "the window holds, and all see memory")
@pytest.mark.parametrize("name", WINDOWED)
def test_a_window_of_the_text_is_kept(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    torch.manual_seed(0)
    config = copy.deepcopy(WINDOWED[name])
    config.num_hidden_layers = 1
    model = RMTEncoder(Encoder(AutoModel.from_config(config), tokenizer), 44, memory_size=3).eval()
    text = model.layout(model.text_length).place("text")
    ids = torch.randint(5, 600, (1, model.text_length))
    other = ids.clone()
    other[0, -1] = 600
    with torch.no_grad():
        hidden, memory = model.read_segment(Segment(ids, None), model.initial_state(1))
        otherwise, written = model.read_segment(Segment(other, None), model.initial_state(1))
        remembered, _ = model.read_segment(Segment(ids, None), torch.randn_like(memory))
    assert not torch.isclose(memory, written).all(dim=2).any()
    assert not torch.isclose(hidden, remembered)[0, text].all(dim=1).any()
    assert torch.equal(hidden[0, text][:20], otherwise[0, text][:20])


@pytest.mark.fault("an encoder that does not obey a mask or takes no embeddings", "it is refused in one line")
@pytest.mark.parametrize("name", DISOBEDIENT)
def test_what_does_not_obey_is_refused(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    torch.manual_seed(0)
    config, why = DISOBEDIENT[name]
    with pytest.raises(UserError, match=rf"^backbone: {name} {why}[^\n]*; choose an encoder such as BERT"):
        Encoder(AutoModel.from_config(config), tokenizer)


def test_the_trial_leaves_no_trace(tokenizer: PreTrainedTokenizerBase) -> None:
    model = AutoModel.from_config(CONFIGS["bert"][0])
    frozen = model.encoder.layer[0].attention.eval()
    before = torch.get_rng_state()
    encoder = Encoder(model, tokenizer)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(weight.grad is None for weight in encoder.parameters())
    assert frozen.training and all(module.training for module in encoder.modules())


def test_relative_positions_have_no_end(tokenizer: PreTrainedTokenizerBase) -> None:
    config = XLNetConfig(vocab_size=1000, d_model=16, n_layer=1, n_head=2, d_inner=32)
    model = RMTEncoder(Encoder(AutoModel.from_config(config), tokenizer), 700)
    assert model(torch.randint(5, 600, (1, model.text_length)))[0].shape == (1, 1 + 10, 16)


@pytest.mark.fault("weights of a backbone that are no numbers", "it is refused before training, by their name")
def test_weights_that_are_no_numbers_are_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    model = AutoModel.from_config(CONFIGS["bert"][0])
    model.encoder.layer[1].output.dense.bias.data[3] = torch.nan
    with pytest.raises(UserError, match=r"its weights are damaged \(encoder.layer.1.output.dense.bias is not finite\)"):
        Encoder(model, tokenizer)
    config = copy.deepcopy(CONFIGS["bert"][0])
    config.layer_norm_eps = math.nan
    with pytest.raises(UserError, match=r"^backbone: bert makes of words what is no number, so its config or its weig"):
        Encoder(AutoModel.from_config(config), tokenizer)
    model = TinyGPT(width=16, layers=1, heads=2).decoder(tokenizer).model
    model.transformer.ln_f.eps = math.nan
    with pytest.raises(UserError, match=r"^backbone: gpt2 makes of words what is no number"):
        Decoder(model, tokenizer)


def test_a_tokenizer_larger_than_the_embedding_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    config = copy.deepcopy(CONFIGS["bert"][0])
    config.vocab_size = len(tokenizer) - 7
    with pytest.raises(UserError, match=r"^backbone: its tokenizer has 7 tokens beyond the \d+ that its embedding has"):
        Encoder(AutoModel.from_config(config), tokenizer)
    # A special token that no text holds needs none.
    larger = copy.deepcopy(tokenizer)
    larger.add_special_tokens({"additional_special_tokens": ["<image>"]})
    config.vocab_size = len(tokenizer)
    Encoder(AutoModel.from_config(config), larger)


class Adapted(nn.Module):
    """A linear layer and an adapter beside it, as PEFT puts them in its place."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = layer.requires_grad_(False)
        self.lora = nn.Linear(layer.in_features, layer.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.lora(x)


class Wrapped(nn.Module):
    """What PEFT hands out: a model with adapters in its layers, and perhaps a prompt beside them."""

    def __init__(self, model: nn.Module, prompt: bool = False) -> None:
        super().__init__()
        self.inside = model
        self.prompt = nn.Parameter(torch.zeros(3, 16)) if prompt else None

    def get_base_model(self) -> nn.Module:
        return self.inside

    def __getattr__(self, name: str) -> object:
        return super().__getattr__(name) if name in ("inside", "prompt") else getattr(self.inside, name)

    def forward(self, *args: object, **kwargs: object) -> object:
        return self.inside(*args, **kwargs)


@pytest.mark.fault("a backbone with adapters, which its config does not tell of", "it runs; saving it is refused")
@pytest.mark.parametrize("kind", [Encoder, Decoder])
def test_adapters(kind: type[Transformer], tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    if kind is Encoder:
        inside = AutoModel.from_config(CONFIGS["bert"][0])
        layer = inside.encoder.layer[0].intermediate
        layer.dense = Adapted(layer.dense)
    else:
        inside = LlamaForCausalLM(LlamaConfig(vocab_size=1000, **SMALL))
        layer = inside.model.layers[0].self_attn
        layer.q_proj = Adapted(layer.q_proj)
    model = (RMTEncoder if kind is Encoder else RMTDecoder)(kind(Wrapped(inside), tokenizer), 24, memory_size=2)
    hidden, _ = model(torch.randint(5, 600, (2, 3, model.text_length)))
    hidden.square().sum().backward()
    assert all(weight.grad is not None for weight in layer.parameters() if weight.requires_grad)
    for save in (model.save_pretrained, partial(save_architecture, model)):
        with pytest.raises(UserError, match=r"^backbone: \d+ of its weights, such as .* are not as its config tells"):
            save(tmp_path)
    assert not any(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"comes with trained parts beside its layers, such as prompts, which would be"):
        kind(Wrapped(inside, prompt=True), tokenizer)


@pytest.mark.parametrize("name", ["bert", "roberta", "mpnet"])
def test_more_than_all_positions_is_refused(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    config, positions = CONFIGS[name]
    encoder = Encoder(AutoModel.from_config(config), tokenizer)
    with pytest.raises(UserError, match=f"at most {positions} tokens"):
        RMTEncoder(encoder, positions + 1)


def test_saved_and_restored(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    encoder = TinyBert(width=16, layers=1, heads=2).encoder(tokenizer)
    for folder in (tmp_path, tmp_path / "backbone"):
        encoder.model.save_pretrained(folder)
    for folder in (tmp_path, tmp_path / "tokenizer"):
        tokenizer.save_pretrained(folder)
    for backbone in (Pretrained(str(tmp_path)), Restored(tmp_path)):
        again = backbone.tokenizer([])
        text = "Mary went back to the kitchen."
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
        other = backbone.encoder(again)
        assert {k: v.shape for k, v in other.state_dict().items()} == {
            k: v.shape for k, v in encoder.state_dict().items()
        }
    loaded = Pretrained(str(tmp_path)).encoder(tokenizer)
    assert all(module.training for module in loaded.modules())
    for key, value in encoder.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[key], value)


def _weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _rename(weights: dict[str, torch.Tensor]) -> None:
    for name in list(weights):
        weights[f"net.{name}"] = weights.pop(name)


def _config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def _cut(folder: Path) -> None:
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-1000])


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "without its tokenizer": (
        lambda folder: [path.unlink() for path in folder.glob("tokenizer*")],
        r"its tokenizer knows 0 words, and the model",
    ),
    "of a few words": (
        lambda folder: [
            *(path.unlink() for path in folder.glob("tokenizer*")),
            (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nthe\nof\n"),
        ],
        r"its tokenizer knows 2 words",
    ),
    "with a damaged tokenizer": (lambda folder: (folder / "tokenizer.json").write_text("{"), r"cannot be loaded \(Ex"),
    "a tokenizer without [UNK]": (
        lambda folder: [
            *(path.unlink() for path in folder.glob("tokenizer*")),
            (folder / "vocab.txt").write_text("\n".join(map(str, range(900)))),
        ],
        r"cannot be loaded \(Exception: WordPiece error: Missing \[UNK\] token from the vocabulary\)",
    ),
    "weights by other names": (lambda folder: _weights(folder, _rename), r"21 of its weights are missing, such"),
    "a weight is missing": (
        lambda folder: _weights(folder, lambda weights: weights.pop("encoder.layer.0.output.dense.bias")),
        r"1 of its weights are missing, such as encoder.layer.0.output.dense.bias; give",
    ),
    "wider config": (
        lambda folder: _config(folder, hidden_size=32),
        r"its weights do not fit its config.json \(embeddings.LayerNorm.bias has shape \(16,\), not \(32,\)\)",
    ),
    "truncated": (_cut, r"cannot be loaded \(SafetensorError: Error while deserializing header"),
    "quantized": (
        lambda folder: _config(folder, quantization_config={"quant_method": "gptq", "bits": 4}),
        r"its weights are quantized, and such cannot be trained",
    ),
    "a pickle": (
        lambda folder: [
            (folder / "model.safetensors").unlink(),
            (folder / "pytorch_model.bin").write_bytes(pickle.dumps(os.getcwd, protocol=2)),
        ],
        r"its pytorch_model.bin holds more than weights, which would have to be executed; give a model.safetensors",
    ),
    "config of no model": (lambda folder: _config(folder, hidden_act="none such"), r"cannot be loaded \(KeyError"),
}  # fmt: skip


@pytest.mark.fault("a model folder whose files are missing, damaged or of another model", "one line says which")
@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_folder_is_refused(name: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    damage, message = DAMAGE[name]
    TinyBert(width=16, layers=1, heads=2).encoder(tokenizer).model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    damage(tmp_path)
    backbone = Pretrained(str(tmp_path))
    with pytest.raises(UserError, match=rf"^backbone.name={tmp_path}: {message}[^\n]*$"):
        backbone.encoder(backbone.tokenizer([]))


@pytest.mark.fault("a run or saved model whose tokenizer or config is damaged", "one line says which")
@pytest.mark.parametrize("name", ["tokenizer/tokenizer.json", "backbone/config.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"model": 3}', b"\xff\xfe", None])
def test_a_damaged_run_is_refused(
    name: str, content: bytes | None, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    CONFIGS["bert"][0].save_pretrained(tmp_path / "backbone")
    saved = Restored(tmp_path)
    assert saved.encoder(saved.tokenizer([])).width == 16
    (tmp_path / name).unlink() if content is None else (tmp_path / name).write_bytes(content)
    part = name.partition("/")[0]
    with pytest.raises(UserError, match=rf"^{tmp_path}: holds no whole model \({part}: [^\n]*$"):
        saved.encoder(saved.tokenizer([]))
    shutil.rmtree(tmp_path / part)
    with pytest.raises(UserError, match=rf"^{tmp_path}: has no {part}/, which its weights need; put it back$"):
        saved.encoder(saved.tokenizer([]))


@pytest.mark.fault("a config.json tells of fewer layers than there are weights for", "said; heads are none")
def test_layers_without_a_place(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    BertForMaskedLM(CONFIGS["bert"][0]).save_pretrained(tmp_path)
    Pretrained(str(tmp_path)).encoder(tokenizer)
    assert not caplog.messages
    _config(tmp_path, num_hidden_layers=1)
    Pretrained(str(tmp_path)).encoder(tokenizer)
    (told,) = caplog.messages
    assert (
        f"{tmp_path}: 16 of its weights, such as bert.encoder.layer.1.attention.output.LayerNorm.bias, have no" in told
    )


def test_heads_may_be_missing(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """A pooler is not used, and a head that words are read off with is asked for when it is."""
    BertForMaskedLM(CONFIGS["bert"][0]).save_pretrained(tmp_path / "bert")
    assert Pretrained(str(tmp_path / "bert")).encoder(tokenizer).width == 16
    config = LlamaConfig(vocab_size=1000, **SMALL, tie_word_embeddings=False)
    LlamaForCausalLM(config).model.save_pretrained(tmp_path / "llama")
    decoder = Pretrained(str(tmp_path / "llama")).decoder(tokenizer)
    with pytest.raises(UserError, match=r"no weights that words are read off with, so it can only classify; choose"):
        decoder.logits(torch.zeros(1, 16))


def test_a_half_precision_checkpoint_trains_in_full_precision(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    TinyBert(width=16, layers=1, heads=2).encoder(tokenizer).model.half().save_pretrained(tmp_path)
    assert {p.dtype for p in Pretrained(str(tmp_path)).encoder(tokenizer).parameters()} == {torch.float32}


def test_the_tiny_tokenizer_is_the_same_every_time(tokenizer: PreTrainedTokenizerBase) -> None:
    texts = [f"Mary went to the {word}" for word in ("garden", "gardens", "gardener", "kitchen", "kitten")] * 3
    vocabularies = [TinyBert(vocabulary_size=320).tokenizer(texts).get_vocab() for _ in range(5)]
    assert all(vocabulary == vocabularies[0] for vocabulary in vocabularies)


@pytest.mark.fault("a trained tokenizer in the cache is damaged", "it is trained again")
def test_a_tokenizer_is_trained_once(tmp_path: Path) -> None:
    texts = [f"Mary went to the {word}" for word in ("garden", "gardener", "Kitchen", "kitten")]
    read: list[str] = []

    def sentences() -> Iterator[str]:
        for text in texts:
            read.append(text)
            yield text

    def trained(backbone: TinyBert | TinyGPT, name: str = "a text") -> str:
        """What becomes of the text, or of what was kept of it: `read` tells which."""
        read.clear()
        tokenizer: Any = backbone.tokenizer(TrainingText(sentences(), lambda: name, str(tmp_path)))
        return str(tokenizer.backend_tokenizer.to_str())

    bert = TinyBert(vocabulary_size=320)
    plain: Any = bert.tokenizer(texts)
    first = plain.backend_tokenizer.to_str()
    assert trained(bert) == first and read
    (kept,) = tmp_path.rglob("tokenizers/*")
    assert trained(bert) == first and not read
    for backbone, name in ((TinyGPT(vocabulary_size=320), "a text"), (TinyBert(), "a text"), (bert, "another")):
        trained(backbone, name)
        assert read, "nothing else may be taken for it"
    damaged = kept.read_bytes().replace(b"garden", b"burden", 1)

    def pipe() -> None:
        kept.unlink()
        os.mkfifo(kept)

    for damage in (partial(kept.write_bytes, damaged), partial(os.truncate, kept, 99), pipe, kept.unlink):
        damage()
        assert trained(bert) == first and read
    shutil.rmtree(tmp_path)
    tmp_path.write_text("no folder")
    assert trained(bert) == first and read


def test_bfloat16_autocast(tokenizer: PreTrainedTokenizerBase) -> None:
    model = RMTEncoder(TinyBert(width=16, layers=2, heads=2).encoder(tokenizer), 24, memory_size=4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden, memory = model(torch.randint(5, 600, (2, 4, model.text_length)))
    hidden.sum().backward()
    assert memory.dtype == torch.float32
    assert model.memory.grad is not None and model.memory.grad.isfinite().all()


@pytest.mark.fault("the Hub cannot be reached while a backbone is loaded", "said before, and one line within seconds")
def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    # Nobody listens there, and the client of the Hub would try again for half a minute, for each part of a model.
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    began = time.monotonic()
    backbone = Pretrained("somebody/bert")
    for load in (backbone.config, lambda: backbone.tokenizer([])):
        with caplog.at_level("INFO"), pytest.raises(UserError, match=r"backbone\.name=somebody/bert: cannot be loaded"):
            load()
    assert time.monotonic() - began < 10
    said = [record.getMessage() for record in caplog.records if record.name.startswith("rmt")]
    assert said == ["backbone.name=somebody/bert: asking the Hugging Face Hub"]


class _Hub(BaseHTTPRequestHandler):
    """As much of the Hub as a model needs that is somebody/bert there; its files stand in `server.folder`."""

    def do_GET(self) -> None:
        file = self.server.folder / self.path.rpartition("/")[2]
        known = {"/": b"", "/api/models/somebody/bert": json.dumps({"id": "somebody/bert", "sha": "0" * 40}).encode()}
        content = file.read_bytes() if file.is_file() else known.get(self.path)
        self.send_response(404 if content is None else 200)
        self.send_header("ETag", f'"{hashlib.sha256(content or b"").hexdigest()}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(content or b"")))
        if content is None:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()
        self.wfile.write(content if content and self.command == "GET" else b"")

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.soak  # transformers asks addresses of its own, again and again for a minute and a half
@pytest.mark.fault("HF_HOME cannot be written to", "one line says so; what has been loaded before is used")
def test_the_place_of_what_is_loaded(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    there = tmp_path / "there"
    BertModel(CONFIGS["bert"][0]).save_pretrained(there)
    tokenizer.save_pretrained(there)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    server.folder = there
    Thread(target=server.serve_forever, daemon=True).start()
    address, files = f"http://127.0.0.1:{server.server_port}", "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", address + files)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    backbone = Pretrained("somebody/bert")
    for place in ("/proc/hub/hub", str(there / "config.json" / "hub")):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", place)
        with pytest.raises(UserError, match=r"be loaded \(.*\); give a folder that can be written in HF_HOME, or one"):
            backbone.tokenizer([])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert backbone.encoder(backbone.tokenizer([])).width == 16
    for folder, _, _ in os.walk(tmp_path / "hub"):
        os.chmod(folder, 0o555)
    assert backbone.encoder(backbone.tokenizer([])).width == 16
    for folder, _, _ in os.walk(tmp_path / "hub"):
        os.chmod(folder, 0o755)
    server.shutdown()
    server.server_close()
