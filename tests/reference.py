"""The recurrences of RMT-2023 and RMT-2022, transcribed row by row, to compare the package with."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import BertModel, PreTrainedModel


def read_segment(bert: BertModel, cls: int, sep: int, text: list[int], memory: Tensor) -> tuple[Tensor, Tensor]:
    """RMT-2023, section 3.

    One row: H⁰ = [CLS] ∘ mem ∘ [SEP] text [SEP]; mem_{τ+1} = the memory's rows of Transformer(H⁰).
    """
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


def read_causal_segment(gpt: PreTrainedModel, text: list[int], memory: Tensor, free: bool) -> tuple[Tensor, Tensor]:
    """RMT-2022, section 3.2. One row: H⁰ = mem ∘ text ∘ mem; mem_{τ+1} = the last rows of Transformer(H⁰)."""
    words = gpt.get_input_embeddings().weight
    rows = [memory[i] for i in range(len(memory))]
    rows += [words[token] for token in text]
    rows += [memory[i] for i in range(len(memory))]
    block = ["read"] * len(memory) + ["text"] * len(text) + ["write"] * len(memory)
    mask = torch.full((len(rows), len(rows)), torch.finfo(memory.dtype).min, dtype=memory.dtype)
    for query in range(len(rows)):
        for key in range(len(rows)):
            if key <= query or (free and block[query] == block[key] != "text"):
                mask[query, key] = 0.0
    # Without free attention the backbone's own causal mask is all there is.
    options = {"attention_mask": mask[None, None], "position_ids": torch.arange(len(rows))[None]} if free else {}
    output = gpt.base_model(inputs_embeds=torch.stack(rows)[None], **options).last_hidden_state[0]
    return output[len(memory) : len(memory) + len(text)], output[len(memory) + len(text) :]


def read_causal_text(
    gpt: PreTrainedModel,
    text: list[int],
    memory: Tensor,
    text_length: int,
    free: bool = True,
    cut_before: int | None = None,
) -> tuple[Tensor, Tensor]:
    """One row of any length, its segments counted from the beginning."""
    for number, start in enumerate(range(0, len(text), text_length)):
        if number == cut_before:
            memory = memory.detach()
        output, memory = read_causal_segment(gpt, text[start : start + text_length], memory, free)
    return output, memory
