"""Asking a trained model.

Shapes: B batch, N tokens of a text, C answers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import ModelHubMixin
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from rmt_lightning.core.errors import UserError
from rmt_lightning.models.pretrained import opened
from rmt_lightning.models.segment_model import SegmentModel

HEAD = "head.safetensors"
_HALF = re.compile("[\ud800-\udfff]")


def _are_texts(given: Any) -> bool:
    return isinstance(given, list | tuple) and all(isinstance(text, str) for text in given)


class Answerer(nn.Module, ModelHubMixin, library_name="rmt_lightning"):
    """A recurrent model and the linear head that was trained to read answers off it: texts in, answers out.

    It is saved beside its model, in the same folder: head.safetensors holds the head and the answers.

    Args:
        model: the recurrent model.
        head: from what the model reads off its last segment to scores.
        answers: the C answers that scores stand for.

    Raises:
        UserError: if the head does not read what the model makes, or there are not as many answers as scores.
    """

    def __init__(self, model: SegmentModel[Any], head: nn.Linear, answers: Sequence[str]) -> None:
        super().__init__()
        if head.in_features != model.width:
            raise UserError(f"head: reads {head.in_features} numbers, and the model makes {model.width}; give another")
        if not _are_texts(answers) or len(answers) != head.out_features:
            raise UserError(f"answers: the head gives {head.out_features} scores; give a list of so many texts")
        self.model = model
        self.head = head
        self.answers = tuple(answers)

    def forward(self, texts: str | Sequence[str]) -> str | list[str]:
        """The answers to questions, each at the end of a text of any length; of a single text, its answer.

        Raises:
            UserError: if that is not what is given.
        """
        answers = [self.answers[best] for best in self.scores(texts).argmax(dim=1).tolist()]
        return answers[0] if isinstance(texts, str) else answers

    @torch.no_grad()
    def scores(self, texts: str | Sequence[str]) -> Tensor:
        """(B, C), larger for likelier answers; a single text is a batch of one."""
        if isinstance(texts, str):
            texts = [texts]
        elif isinstance(texts, Iterable) and not isinstance(texts, Mapping | Set):
            # Those have no order that answers could keep.
            texts = list(texts)
        if not _are_texts(texts):
            raise UserError("texts: give a text, or a list of texts")
        if any(_HALF.search(text) for text in texts):
            raise UserError("texts: hold half of a surrogate pair, which stands for no letter; leave it out")
        if not texts:
            return self.head.weight.new_zeros(0, len(self.answers))
        assert self.model.tokenizer is not None
        rows = self.model.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        ids = [torch.tensor(row, dtype=torch.long, device=self.head.weight.device) for row in rows]
        mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
        return self.head(self.model.encode(pad_sequence(ids, batch_first=True), mask))

    def _save_pretrained(self, save_directory: Path) -> None:
        self.model.save_pretrained(save_directory)
        weights = {name: value.contiguous() for name, value in self.head.state_dict().items()}
        save_file(weights, save_directory / HEAD, metadata={"answers": json.dumps(self.answers)})

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> Self:
        """Open a model that was saved with its answers.

        Args:
            pretrained_model_name_or_path: a folder, or an id on the Hugging Face Hub.
            options: of `huggingface_hub.snapshot_download`: revision, token, cache_dir …

        Raises:
            UserError: if there is no such folder or id, or it holds no answers.
        """
        with opened(pretrained_model_name_or_path, **options) as folder:
            model: SegmentModel[Any] = SegmentModel.from_pretrained(folder)
            if not (folder / HEAD).exists():
                raise UserError(f"{folder}: holds a {type(model).__name__} that was not trained to choose answers")
            with safe_open(folder / HEAD, framework="pt") as file:
                answers = json.loads(file.metadata()["answers"])
                head = nn.Linear(model.width, len(answers))
                head.load_state_dict({name: file.get_tensor(name) for name in ("weight", "bias")})
            return cls(model, head, answers).eval()
