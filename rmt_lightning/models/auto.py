"""Saved models as transformers' `AutoModel` opens them: tensors in, what its own models return out.

Shapes: B batch, N tokens, C answers, D width, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutput, SequenceClassifierOutput
from transformers.modeling_utils import PreTrainedModel

from rmt_lightning.core.errors import UserError
from rmt_lightning.models.configuration import RecurrentConfig
from rmt_lightning.models.recurrence import Segment, text_mask

if TYPE_CHECKING:
    from rmt_lightning.models.answerer import Answerer
    from rmt_lightning.models.segment_model import SegmentModel

# What a caller may say about a config without another model being meant.
_SAID = {"_name_or_path", "dtype", "transformers_version"}
# Of `snapshot_download`, as transformers hands them on.
_OF_THE_HUB = {"cache_dir", "force_download", "local_files_only", "revision", "token"}
# AutoModel's own; and nothing that is opened is executed, whatever may be trusted.
_OF_AUTO = {"_from_auto", "adapter_kwargs", "trust_remote_code"}


class RecurrentModel(PreTrainedModel):
    """A saved model by itself; `AutoModel` opens it, and those with an answer or a next token as the classes below.

    `model` is the model of this package. `save_pretrained` and `push_to_hub` write what it would write itself.
    """

    config_class = RecurrentConfig
    main_input_name = "input_ids"
    _supports_sdpa = True

    def __init__(self, config: RecurrentConfig, model: SegmentModel[Any]) -> None:
        super().__init__(config)
        self.model = model

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        config: RecurrentConfig | None = None,
        dtype: torch.dtype | str | None = None,
        device_map: Any = None,
        **options: Any,
    ) -> Self:
        """Open what `save_pretrained`, `push_to_hub` or `python -m rmt_lightning.export` has left.

        Args:
            pretrained_model_name_or_path: a folder, or an id on the Hugging Face Hub.
            config: the model's own, as `AutoConfig` opens it.
            dtype: of the weights; None or "auto" for the one that they were saved in.
            device_map: a single device, such as "cpu" or "cuda:0"; None for the CPU.
            options: of `huggingface_hub.snapshot_download`: revision, token, cache_dir …

        Raises:
            UserError: if there is no such model, it is of another kind, or something is asked for that is not obeyed.
        """
        # Imported here: they import transformers, whose import leads here.
        from rmt_lightning.models.answerer import Answerer
        from rmt_lightning.models.pretrained import HEAD, has_adapters, opened
        from rmt_lightning.models.segment_model import SegmentModel
        from rmt_lightning.models.sources import refuse_kernels

        if place := (options.get("adapter_kwargs") or {}).get("_adapter_model_path"):
            # transformers has found some, and would go on with the model that they belong to.
            raise has_adapters(place)
        given = {name: value for name, value in options.items() if name not in _OF_AUTO and value is not None}
        if unknown := ", ".join(sorted(given.keys() - _OF_THE_HUB)):
            raise UserError(f"{unknown}: is not obeyed here; give dtype, device_map, or what snapshot_download takes")
        device = _device(device_map)
        with opened(pretrained_model_name_or_path, **given) as folder:
            own = RecurrentConfig.from_pretrained(folder)
            _check_same(config, own)
            refuse_kernels(own, str(folder))
            own.name_or_path, own.dtype = str(pretrained_model_name_or_path), _dtype(dtype, own)
            if (folder / HEAD).exists():
                answerer = Answerer.from_pretrained(folder)
                own.id2label = dict(enumerate(answerer.answers))
                own.label2id = {answer: number for number, answer in own.id2label.items()}
                found: RecurrentModel = RecurrentForSequenceClassification(own, answerer.model, answerer.head)
            else:
                model: SegmentModel[Any] = SegmentModel.from_pretrained(folder)
                found = (RecurrentForCausalLM if model.predicts else RecurrentModel)(own, model)
            if not isinstance(found, cls):
                raise UserError(f"{folder}: is opened as a {type(found).__name__}; use AutoModel.from_pretrained")
            # That of transformers is not typed.
            return nn.Module.to(found, device, own.dtype).eval()

    @classmethod
    def _from_config(cls, config: Any, **options: Any) -> Any:
        raise UserError("a config holds no tokenizer, which the model needs; use from_pretrained")

    @property
    def _saved(self) -> Any:
        """What writes itself."""
        return self.model

    def save_pretrained(self, save_directory: str | Path) -> None:  # type: ignore[override]
        """Write the model as a folder, which `from_pretrained` and all of this package open."""
        self._saved.save_pretrained(save_directory)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:  # type: ignore[override]
        """Write it to the Hugging Face Hub; options are those of `ModelHubMixin.push_to_hub`."""
        return cast(str, self._saved.push_to_hub(repo_id, **options))

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> Any:
        """Read texts of any length.

        Args:
            input_ids: (B, N), padded anywhere. Special tokens that the tokenizer puts around texts are passed over.
            attention_mask: (B, N), 1 for text.
            token_type_ids: of no meaning here; some tokenizers give them.

        Returns:
            `last_hidden_state`: of the last segment; `pooler_output` (B, D): what stands where an answer is read.
        """
        for reading in self.model.read(input_ids, self._text(input_ids, attention_mask)):  # noqa: B007
            pass
        pooled = self.model.readout(reading.hidden, reading.segment)
        return BaseModelOutputWithPooling(last_hidden_state=reading.hidden, pooler_output=pooled)

    def _text(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """(B, N), 1 for text, which the model was trained on without the tokens that tokenizers put around it."""
        mask = text_mask(input_ids, attention_mask)
        if self.model.tokenizer is None:
            return mask
        around = torch.tensor(self.model.tokenizer("")["input_ids"], dtype=torch.long, device=input_ids.device)
        return mask * ~torch.isin(input_ids, around)


class RecurrentForSequenceClassification(RecurrentModel):
    """A saved model with the head that chooses an answer; `config.id2label` names the answers."""

    def __init__(self, config: RecurrentConfig, model: SegmentModel[Any], head: nn.Linear) -> None:
        super().__init__(config, model)
        self.head = head

    @property
    def _saved(self) -> Answerer:
        from rmt_lightning.models.answerer import Answerer

        answers = cast(dict[int, str], self.config.id2label)
        return Answerer(self.model, self.head, [answers[number] for number in range(self.head.out_features)])

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> SequenceClassifierOutput:
        """Answer texts of any length, each of which ends with its question.

        Args:
            input_ids: (B, N), padded anywhere. Special tokens that the tokenizer puts around texts are passed over.
            attention_mask: (B, N), 1 for text.
            token_type_ids: of no meaning here; some tokenizers give them.
            labels: (B,) numbers of the right answers.

        Returns:
            `logits` (B, C), larger for likelier answers; with labels, `loss` as well.
        """
        summary = self.model.encode(input_ids, self._text(input_ids, attention_mask))
        logits: Tensor = self.head(summary.to(self.head.weight.dtype))
        return SequenceClassifierOutput(loss=None if labels is None else cross_entropy(logits, labels), logits=logits)


class RecurrentForCausalLM(RecurrentModel):
    """A saved model that tells which token comes next. It writes with `rmt_lightning.generate(model.model, …)`."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> CausalLMOutput:
        """Read texts of any length. Segments are counted from their beginning.

        Args:
            input_ids: (B, N), padded anywhere.
            attention_mask: (B, N), 1 for text.
            token_type_ids: of no meaning here; some tokenizers give them.
            labels: (B, N) the same ids, -100 where nothing is to be learnt.

        Returns:
            `logits` (B, N, V) of the token after each; with labels, `loss` as well.
        """
        mask = text_mask(input_ids, attention_mask)
        order = mask.argsort(dim=1, descending=True, stable=True)
        pieces = (x.gather(1, order).split(self.model.text_length, dim=1) for x in (input_ids, mask))
        readings = self.model.read(Segment(ids, there) for ids, there in zip(*pieces, strict=True))
        moved = torch.cat([self.model.logits(reading.hidden) for reading in readings], dim=1)
        logits = moved.gather(1, order.argsort(dim=1)[..., None].expand_as(moved))
        if labels is None:
            return CausalLMOutput(logits=logits)
        return CausalLMOutput(loss=cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()), logits=logits)


def _check_same(given: RecurrentConfig | None, own: RecurrentConfig) -> None:
    """Raise a UserError if a config asks for something else than what was saved."""
    if given is None:
        return
    asked, there = (one.to_dict() | {"attn_implementation": one._attn_implementation} for one in (given, own))
    for name in sorted((asked.keys() | there.keys()) - _SAID):
        if asked.get(name) != there.get(name):
            raise UserError(f"config: {name}={asked.get(name)} is not what the saved model has; leave it out")


def _device(device_map: Any) -> torch.device | None:
    if isinstance(device_map, dict) and device_map.keys() == {""}:
        device_map = device_map[""]
    try:
        return None if device_map is None else torch.device(device_map)
    except (RuntimeError, TypeError):
        raise UserError(f"device_map={device_map}: is no single device; give one, such as cpu or cuda:0") from None


def _dtype(asked: torch.dtype | str | None, own: RecurrentConfig) -> torch.dtype:
    if asked is None or asked == "auto":
        asked = own.dtype or torch.float32
    found = getattr(torch, asked, None) if isinstance(asked, str) else asked
    if not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise UserError(f"dtype={asked}: give float32, bfloat16, float16 or auto")
    return found


def register() -> None:
    """Make them known to `AutoModel`, `AutoModelForSequenceClassification` and `AutoModelForCausalLM`."""
    from transformers.models.auto import modeling_auto

    for auto_class, model_class in (
        (modeling_auto.AutoModel, RecurrentModel),
        (modeling_auto.AutoModelForSequenceClassification, RecurrentForSequenceClassification),
        (modeling_auto.AutoModelForCausalLM, RecurrentForCausalLM),
    ):
        auto_class.register(RecurrentConfig, model_class, exist_ok=True)
