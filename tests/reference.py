"""The recurrence of RMT-2023 (arXiv 2304.11062, section 3), transcribed row by row, to compare the package with."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import BertModel


def read_segment(bert: BertModel, cls: int, sep: int, text: list[int], memory: Tensor) -> tuple[Tensor, Tensor]:
    """One row: H⁰ = [CLS] ∘ mem ∘ [SEP] text [SEP]; mem_{τ+1} = the memory's rows of Transformer(H⁰)."""
    words = bert.embeddings.word_embeddings.weight
    rows = [words[cls]]
    rows += [memory[i] for i in range(len(memory))]
    rows += [words[sep]]
    rows += [words[token] for token in text]
    rows += [words[sep]]
    output = bert(inputs_embeds=torch.stack(rows)[None]).last_hidden_state[0]
    return output, output[1 : 1 + len(memory)]


def read_text(
    bert: BertModel,
    cls: int,
    sep: int,
    text: list[int],
    memory: Tensor,
    text_length: int,
    cut_before: int | None = None,
) -> tuple[Tensor, Tensor]:
    """One row of any length. Segments are counted from the end; the graph is cut before segment `cut_before`."""
    first = len(text) % text_length or min(len(text), text_length)
    segments = [text[:first]] + [text[i : i + text_length] for i in range(first, len(text), text_length)]
    for number, segment in enumerate(segments):
        if number == cut_before:
            memory = memory.detach()
        output, memory = read_segment(bert, cls, sep, segment, memory)
    return output, memory
