"""Every kind of backbone in its parts: embedding, layers one by one and what follows equal the model's own forward."""

from __future__ import annotations

import copy

import pytest
import torch
from test_backbones import CONFIGS as ENCODERS
from test_decoder import CONFIGS as DECODERS
from test_decoder import SMALL, WINDOWED
from torch import Tensor
from transformers import (
    AlbertConfig,
    AutoModel,
    AutoModelForCausalLM,
    BioGptConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedTokenizerBase,
)

from rmt_lightning.core.errors import UserError
from rmt_lightning.models.backbone import SPARSE, Transformer
from rmt_lightning.models.decoder import Decoder
from rmt_lightning.models.encoder import Encoder
from rmt_lightning.models.rmt import RMTDecoder, RMTEncoder

DECODERS = DECODERS | {
    # A final norm beside no projection.
    "opt_125m": OPTConfig(**SMALL, num_attention_heads=4, ffn_dim=32),
    # Names of their own for what follows, and scales of embeddings.
    "phi": PhiConfig(**SMALL, num_attention_heads=4, intermediate_size=32, partial_rotary_factor=0.5),
    "biogpt": BioGptConfig(**SMALL, num_attention_heads=4, intermediate_size=32),
    "gemma3_text": WINDOWED["gemma3_text"],
}  # fmt: skip
PRECISIONS = [torch.float64, torch.float32]


def make(name: str, tokenizer: PreTrainedTokenizerBase) -> Transformer:
    torch.manual_seed(0)
    if name in ENCODERS:
        return Encoder(AutoModel.from_config(copy.deepcopy(ENCODERS[name][0])), tokenizer)
    return Decoder(AutoModelForCausalLM.from_config(copy.deepcopy(DECODERS[name])), tokenizer)


def inputs(backbone: Transformer) -> tuple[Tensor | None, ...]:
    """What RMT gives a backbone: two rows, the second of which is short; masks, and positions of a decoder."""
    model = RMTEncoder(backbone, 30, 4) if isinstance(backbone, Encoder) else RMTDecoder(backbone, 30, 4)
    given: list[tuple[Tensor | None, ...]] = []
    hook = backbone.register_forward_pre_hook(lambda _module, args: given.append(args))
    ids = torch.randint(5, 600, (2, model.text_length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    model.to(next(backbone.parameters()).dtype)(ids, mask)
    hook.remove()
    return given[0]


@pytest.mark.parametrize("dtype", PRECISIONS, ids=["fp64", "fp32"])
@pytest.mark.parametrize("name", [*(name for name in ENCODERS if name not in ("longformer", "bigbird")), *DECODERS])
def test_the_parts_make_the_whole(name: str, dtype: torch.dtype, tokenizer: PreTrainedTokenizerBase) -> None:
    backbone = make(name, tokenizer).eval()
    for weight in backbone.parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.2)
    backbone.to(dtype)
    embeddings, *others = inputs(backbone)
    embeddings = embeddings.detach().requires_grad_()
    whole = backbone(embeddings, *others)
    parts = backbone.apart(embeddings, *others)
    assert len(parts.steps) == 2 and parts.hidden.shape == (2, 30, 16)
    hidden = parts.hidden
    for step in parts.steps:
        hidden = step(hidden)
    found = parts.finish(hidden)
    torch.testing.assert_close(found, whole, atol=1e-6, rtol=1e-6)
    direction = torch.randn(whole.shape[-1], dtype=dtype)
    weights = [embeddings, *(weight for weight in backbone.model.base_model.parameters() if weight.requires_grad)]
    gradients = [
        torch.autograd.grad((hidden * direction).sum(), weights, allow_unused=True, materialize_grads=True)
        for hidden in (found, whole)
    ]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    # It is left as it was, and a layer reads whatever hidden states it is given.
    torch.testing.assert_close(backbone(embeddings, *others), whole, atol=0, rtol=0)
    assert not torch.allclose(parts.steps[0](parts.hidden.flip(1)), parts.steps[0](parts.hidden))


def test_only_the_embedding_is_computed(tokenizer: PreTrainedTokenizerBase) -> None:
    backbone = make("distilbert", tokenizer)
    ran: list[str] = []
    for name, module in backbone.named_modules():
        if not list(module.children()):
            module.register_forward_hook(lambda _module, _args, _output, name=name: ran.append(name))
    embeddings, mask, _ = inputs(backbone)
    backbone.apart(embeddings, mask)  # tries all of it once
    ran.clear()
    parts = backbone.apart(embeddings, mask)
    assert ran and all(name.startswith("model.embeddings.") for name in ran)
    with pytest.raises(RuntimeError, match="a fault in the middle"):
        broken = backbone.model.transformer.layer[0].register_forward_pre_hook(fail)
        backbone.apart(embeddings, mask)
    broken.remove()
    assert parts.steps[1](parts.steps[0](parts.hidden)).shape == backbone(embeddings, mask).shape


def fail(*_arguments: object) -> None:
    raise RuntimeError("a fault in the middle")


@pytest.mark.parametrize("name", ["longformer", "bigbird"])
def test_sparse_attention_has_no_layers_to_show(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    backbone = make(name, tokenizer)
    assert backbone.model.config.model_type in SPARSE
    with pytest.raises(UserError, match=r"^backbone: the layers of \w+ cannot be run one by one; choose an encoder"):
        backbone.apart(torch.zeros(1, 8, 16), None)


def test_layers_that_are_shared_cannot_be_shown(tokenizer: PreTrainedTokenizerBase) -> None:
    config = AlbertConfig(
        vocab_size=1000, embedding_size=16, hidden_size=16, num_hidden_layers=3, num_attention_heads=2
    )
    backbone = Encoder(AutoModel.from_config(config), tokenizer)
    with pytest.raises(UserError, match=r"^backbone: the layers of albert cannot be run one by one; choose an encoder"):
        backbone.apart(torch.rand(1, 8, 16), None)
