"""Models transcribed from their papers row by row, to compare the package with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import BertModel, PreTrainedModel


def replace(written: Tensor, memory: Tensor) -> Tensor:
    """RMT: the next memory is what was written."""
    return written


def gated(weight: Tensor, bias: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """After Hutchins et al. (arXiv 2203.07852), section 3: number by number, g = σ(W [written ∘ memory] + b)."""

    def update(written: Tensor, memory: Tensor) -> Tensor:
        rows = []
        for new, old in zip(written, memory, strict=True):
            given = torch.cat([new, old])
            g = [1 / (1 + (-(weight[d] @ given + bias[d])).exp()) for d in range(len(bias))]
            rows.append(torch.stack([g[d] * old[d] + (1 - g[d]) * new[d] for d in range(len(bias))]))
        return torch.stack(rows)

    return update


def read_segment(bert: BertModel, cls: int, sep: int, text: list[int], memory: Tensor) -> tuple[Tensor, Tensor]:
    """RMT-2023 (arXiv 2304.11062), section 3.

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
    update: Callable[[Tensor, Tensor], Tensor] = replace,
) -> tuple[Tensor, Tensor]:
    """One row of any length. Segments are counted from the end; the graph is cut before segment `cut_before`."""
    first = len(text) % text_length or min(len(text), text_length)
    segments = [text[:first]] + [text[i : i + text_length] for i in range(first, len(text), text_length)]
    for number, segment in enumerate(segments):
        if number == cut_before:
            memory = memory.detach()
        output, written = read_segment(bert, cls, sep, segment, memory)
        memory = update(written, memory)
    return output, memory


def read_causal_segment(gpt: PreTrainedModel, text: list[int], memory: Tensor, free: bool) -> tuple[Tensor, Tensor]:
    """RMT-2022 (arXiv 2207.06881), section 3.2, one row.

    H⁰ = mem ∘ text ∘ mem; mem_{τ+1} = the last rows of Transformer(H⁰).
    """
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
    update: Callable[[Tensor, Tensor], Tensor] = replace,
) -> tuple[Tensor, Tensor]:
    """One row of any length, its segments counted from the beginning."""
    for number, start in enumerate(range(0, len(text), text_length)):
        if number == cut_before:
            memory = memory.detach()
        output, written = read_causal_segment(gpt, text[start : start + text_length], memory, free)
        memory = update(written, memory)
    return output, memory


def ask_memory(words: Tensor, ages: Tensor, sentences: list[list[int]], question: list[int]) -> Tensor:
    """MemN2N (arXiv 1503.08895), sections 2 and 4.1, adjacent: words (V, K + 1, D), ages (I, K + 1, D) -> u (D,)."""
    width = words.shape[2]

    def embed(sentence: list[int], k: int) -> Tensor:
        big_j, total = len(sentence), torch.zeros(width, dtype=words.dtype)
        for j, word in enumerate(sentence, start=1):
            for d in range(1, width + 1):
                total[d - 1] += ((1 - j / big_j) - d / width * (1 - 2 * j / big_j)) * words[word, k, d - 1]
        return total

    remembered = sentences[::-1][: len(ages)]  # the last sentence has age 0
    u = embed(question, 0)
    for k in range(words.shape[1] - 1):
        m = [embed(sentence, k) + ages[i, k] for i, sentence in enumerate(remembered)]
        c = [embed(sentence, k + 1) + ages[i, k + 1] for i, sentence in enumerate(remembered)]
        if remembered:
            p = torch.stack([u @ m_i for m_i in m]).softmax(dim=0)
            u = u + sum(p_i * c_i for p_i, c_i in zip(p, c, strict=True))
    return u


def turn_head(
    memory: list[Tensor], before: Sequence[Tensor], key: Tensor, beta: Tensor, g: Tensor, shift: Tensor, gamma: Tensor
) -> list[Tensor]:
    """NTM (arXiv 1410.5401), equations 5 to 9: weights of the slots; shift holds s(-1), s(0), s(1)."""
    n = len(memory)
    similarity = [key @ row / (key.norm() * row.norm()) for row in memory]  # 6
    content = [(beta * k).exp() / sum((beta * k).exp() for k in similarity) for k in similarity]  # 5
    gated = [g * content[i] + (1 - g) * before[i] for i in range(n)]  # 7
    shifted = [sum(gated[(i - by) % n] * shift[by + 1] for by in (-1, 0, 1)) for i in range(n)]  # 8
    return [w**gamma / sum(v**gamma for v in shifted) for w in shifted]  # 9


def write_memory(memory: list[Tensor], heads: list[tuple[list[Tensor], Tensor, Tensor]]) -> list[Tensor]:
    """NTM, equations 3 and 4, for several heads (weights, erase, add): all erase, then all add."""
    for w, erase, _ in heads:
        memory = [row * (1 - w[i] * erase) for i, row in enumerate(memory)]
    for w, _, add in heads:
        memory = [row + w[i] * add for i, row in enumerate(memory)]
    return memory
