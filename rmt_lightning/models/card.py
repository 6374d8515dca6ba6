"""The model card of a saved model: the page that the Hugging Face Hub shows of it."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, ModelCardData

import rmt_lightning
from rmt_lightning.core.names import public_name

if TYPE_CHECKING:
    from rmt_lightning.models.segment_model import SegmentModel

_PAPER = re.compile(r"arXiv (\d{4}\.\d{4,5})")
# How many answers are named; of more the first ones.
_NAMED = 20


def card(
    model: SegmentModel[Any],
    answers: Sequence[str],
    title: str | None = None,
    question: str = "What does it say?",
    sections: Sequence[str] = (),
    **metadata: Any,
) -> ModelCard:
    """A card of what the model itself tells, and of what is told about it.

    Args:
        model: the model.
        answers: those that its head chooses between, if it has one.
        title: what the card is called; by default the class of the model.
        question: one of those that it answers, if it has a head.
        sections: more of it in markdown, each with its heading.
        metadata: of `huggingface_hub.ModelCardData`, such as license, language, base_model, eval_results.
    """
    kind = type(model)
    does, use = "", None
    if answers:
        does, use = " and answers the question at its end", "text-classification"
    elif model.predicts:
        does, use = " and predicts the next token", "text-generation"
    most = "any number of" if model.max_segments is None else f"at most {model.max_segments}"
    data = {
        "library_name": "rmt_lightning",
        "tags": ["recurrent-memory", "long-context", kind.__name__],
        "pipeline_tag": use,
    }
    if "eval_results" in metadata:
        data["model_name"] = title or kind.__name__
    parts = [
        f"# {title or kind.__name__}",
        f"Trained with rmt_lightning. It reads a text of {most} segments of {model.text_length} tokens{does}.",
        _use(model, question if answers else None),
        _settings(model),
        *([_answers(answers)] if answers else []),
        *sections,
        _citation(kind),
    ]
    header = ModelCardData(**data | metadata).to_yaml()
    return ModelCard(f"---\n{header}\n---\n\n" + "\n\n".join(parts) + "\n")


def _use(model: SegmentModel[Any], question: str | None) -> str:
    """How it is opened, and asked if it has a head, with this package and with transformers."""
    there = "# this folder, or its id on the Hugging Face Hub"
    if question is None:
        name, names = "SegmentModel", "AutoModel, AutoTokenizer"
        ours = f'model = SegmentModel.from_pretrained("…")  {there}'
        theirs = 'tokenizer, model = AutoTokenizer.from_pretrained("…"), AutoModel.from_pretrained("…")'
    else:
        text = json.dumps(f"A long text. … {question}", ensure_ascii=False)
        name, names = "Answerer", "pipeline"
        ours = f'answerer = Answerer.from_pretrained("…")  {there}\nprint(answerer({text}))'
        theirs = f'ask = pipeline("text-classification", model="…")\nprint(ask({text}))'
    module = type(model).__module__
    own = "" if module.startswith(f"{rmt_lightning.__name__}.") else f"import {module}  # the class of the model\n"
    return (
        f"## Use\n\n```python\n{own}from rmt_lightning import {name}\n\n{ours}\n```\n\nor through transformers:\n\n"
        f"```python\n{own}import rmt_lightning\nfrom transformers import {names}\n\n{theirs}\n```"
    )


def _settings(model: SegmentModel[Any]) -> str:
    rows = {"class": public_name(f"{type(model).__module__}.{type(model).__qualname__}")}
    rows |= {name: _plain(value) for name, value in sorted(model.arguments.items())}
    if (backbone := model.architecture) is not None:
        size = [getattr(backbone, name, None) for name in ("num_hidden_layers", "hidden_size")]
        rows["backbone"] = backbone.model_type + (f", layers × width {size[0]} × {size[1]}" if all(size) else "")
    rows["weights"] = f"{sum(weight.numel() for weight in model.parameters()):,}"
    return "## Model\n\n| | |\n| --- | --- |\n" + "\n".join(f"| {name} | {value} |" for name, value in rows.items())


def _plain(value: Any) -> str:
    if not isinstance(value, dict):
        return str(value)
    rest = ", ".join(f"{name}={part}" for name, part in value.items() if name != "class")
    return f"{value.get('class', '')} {rest}".strip()


def _answers(answers: Sequence[str]) -> str:
    named = ", ".join(answers[:_NAMED]) + (f" … ({len(answers)} in all)" if len(answers) > _NAMED else "")
    return f"It chooses between these answers: {named}. The text ends with its question."


def _citation(kind: type) -> str:
    said = f"{sys.modules[kind.__module__].__doc__} {kind.__doc__}"
    papers = dict.fromkeys(_PAPER.findall(said))
    links = " and ".join(f"[arXiv {paper}](https://arxiv.org/abs/{paper})" for paper in papers)
    cite = f" Please cite the work whose method it uses: {links}." if links else ""
    return f"## Citation\n\nMade with rmt_lightning {rmt_lightning.__version__}.{cite}"
