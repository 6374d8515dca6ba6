"""Models transcribed from their papers row by row, to compare the package with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
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


def dpfp3(x: Tensor) -> Tensor:
    """Schlag et al. (arXiv 2102.11174), section 3.3, of u = [relu(x), relu(-x)]: all u_i u_(i-j) for j = 1, 2, 3."""
    u = [value.clamp(min=0) for value in x] + [(-value).clamp(min=0) for value in x]
    return torch.stack([u[i] * u[(i - by) % len(u)] for by in (1, 2, 3) for i in range(len(u))])


class Associations:
    """One head of a layer of ARMT (arXiv 2407.04841), section 3: what stands in its A and z, for one row.

    With `z=False` keys have length 1, and the step of each is shared by those that are alike.
    """

    def __init__(self, w_q: Tensor, w_k: Tensor, w_v: Tensor, w_beta: Tensor, b_beta: Tensor, z: bool) -> None:
        self.w_q, self.w_k, self.w_v, self.w_beta, self.b_beta = w_q, w_k, w_v, w_beta, b_beta
        size = 6 * len(w_k)
        self.A = torch.zeros(size, len(w_v), dtype=w_v.dtype)
        self.z = torch.zeros(size, dtype=w_v.dtype) if z else None
        self.first = True

    def phi(self, x: Tensor) -> Tensor:
        return dpfp3(x) if self.z is not None else dpfp3(x) / dpfp3(x).norm()

    def find(self, key: Tensor) -> Tensor:
        return key @ self.A / (key @ self.z + 1e-5) if self.z is not None else key @ self.A

    def read(self, h: Tensor) -> Tensor:
        return torch.zeros(len(self.w_v), dtype=h.dtype) if self.first else self.find(self.phi(self.w_q @ h))

    def write(self, rows: list[Tensor]) -> None:
        keys = [self.phi(self.w_k @ o) for o in rows]
        A, z = self.A, self.z
        for k, o in zip(keys, rows, strict=True):
            beta = 1 / (1 + (-(self.w_beta @ o + self.b_beta)).exp())
            before = 0.0 if self.first else self.find(k)
            if self.z is None:
                beta = beta / (sum(k @ other for other in keys) + 1e-5)
            else:
                gamma = 1 - (k @ self.z + 1e-5) / (k @ k + 1e-5)
                z = z + (1.0 if self.first else gamma.clamp(0, 1).detach()) * k
            A = A + beta * torch.outer(k, self.w_v @ o - before)
        self.A, self.z, self.first = A, z, False

    def cut(self) -> None:
        self.A, self.z = self.A.detach(), None if self.z is None else self.z.detach()


def read_in_layers(
    model: PreTrainedModel, layers: Sequence[nn.Module], rows: list[Tensor], before: Callable, after: Callable
) -> Tensor:
    """Run a model on rows, each layer on what `before` makes of them; `after` is told what the layer makes of them."""

    def enter(number: int) -> Callable:
        return lambda _layer, given: (torch.stack(before(number, list(given[0][0])))[None], *given[1:])

    def leave(number: int) -> Callable:
        return lambda _layer, _given, made: after(number, list((made[0] if isinstance(made, tuple) else made)[0]))

    hooks = [layer.register_forward_pre_hook(enter(number)) for number, layer in enumerate(layers)]
    hooks += [layer.register_forward_hook(leave(number)) for number, layer in enumerate(layers)]
    output = model(inputs_embeds=torch.stack(rows)[None]).last_hidden_state[0]
    for hook in hooks:
        hook.remove()
    return output


def read_associative_segment(
    model: PreTrainedModel,
    layers: Sequence[nn.Module],
    rows: list[Tensor],
    memory: slice,
    heads: list[list[Associations]],
) -> Tensor:
    """ARMT, section 3, one row: all rows read, and what each layer makes of the memory's rows is written to it."""

    def read(number: int, rows: list[Tensor]) -> list[Tensor]:
        return [h + torch.cat([head.read(h) for head in heads[number]]) for h in rows]

    def write(number: int, rows: list[Tensor]) -> None:
        for head in heads[number]:
            head.write(rows[memory])

    return read_in_layers(model, layers, rows, read, write)


def read_parallel_segment(
    model: PreTrainedModel,
    layers: Sequence[nn.Module],
    rows: list[Tensor],
    memories: list[list[Tensor]],
    blocks: list[slice],
) -> Tensor:
    """PRMT (arXiv 2407.04841), section 3, one row: each layer is given its own memory; the last rows are the next."""
    size = len(memories[0])

    def read(number: int, rows: list[Tensor]) -> list[Tensor]:
        for block in blocks:
            rows[block] = memories[number]
        return rows

    def write(number: int, rows: list[Tensor]) -> None:
        memories[number] = rows[blocks[-1]]
        assert len(memories[number]) == size

    return read_in_layers(model, layers, rows, read, write)


def look_back(w_q: Tensor, w_k: Tensor, w_v: Tensor, w_o: Tensor, memory: Tensor, memories: Sequence[Tensor]) -> Tensor:
    """RMT-R (arXiv 2402.10790), section 4, one row: what is read is the memory, and what it finds in all there were."""
    tokens, read = [token for one in memories for token in one], []
    for m in memory:
        scores = torch.stack([(w_q @ m) @ (w_k @ token) / len(m) ** 0.5 for token in tokens])
        weights = scores.exp() / scores.exp().sum()
        read.append(m + w_o @ sum(weight * (w_v @ token) for weight, token in zip(weights, tokens, strict=True)))
    return torch.stack(read)


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
