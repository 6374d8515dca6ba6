"""An end-to-end memory network (MemN2N): Sukhbaatar et al. 2015, arXiv 1503.08895.

Shapes: B batch, S text tokens of a segment, I slots, K hops, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Annotated, NamedTuple

import torch
from annotated_types import Ge
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rmt_lightning.models.machine import check_weights
from rmt_lightning.models.recurrence import Segment
from rmt_lightning.models.segment_model import SegmentModel


class Sentences(NamedTuple):
    """The sentences that are remembered.

    Attributes:
        embedded: (B, I + 1, K + 1, D), each sentence under each of the K + 1 embeddings; the newest comes last.
        number: (B,) how many there are; the rows before them are empty.
    """

    embedded: Tensor
    number: Tensor


class MemoryNetwork(SegmentModel[Sentences]):
    """K soft reads of a memory of sentences, each deciding what the next one looks for.

    A slot holds a sentence: what ends in a token with ".", "!" or "?", or with its segment. The newest sentence is the
    question, those before it are the memory; beyond `slots` the oldest is forgotten (section 4 keeps 50). With
    embeddings E⁰ … Eᴷ, tied between hops as Aᵏ⁺¹ = Eᵏ, Cᵏ⁺¹ = Eᵏ⁺¹ and B = E⁰ ("adjacent", section 2.2):

    ```
    mᵢ = Σⱼ lⱼ · Eᵏ xᵢⱼ + Tᵏ(i)     cᵢ = Σⱼ lⱼ · Eᵏ⁺¹ xᵢⱼ + Tᵏ⁺¹(i)     lⱼ: position of a word, T(i): age of a sentence
    pᵢ = softmax(uᵏ · mᵢ)            uᵏ⁺¹ = uᵏ + Σᵢ pᵢ cᵢ                  u⁰ = Σⱼ lⱼ · E⁰ qⱼ for the question q
    ```

    The answer is read from uᴷ, by a matrix of its own instead of Eᴷ, for the answers are classes and no words. Training
    without softmax at first ("linear start") and empty memories ("random noise") are left out.

    Args:
        tokenizer: tells the vocabulary, and which of its tokens end a sentence.
        segment_length: S. There are no special tokens.
        width: D.
        hops: K.
        slots: I.
        bptt_depth: over how many borders between segments gradients flow back; -1 for all of them.
        gradient_checkpointing: compute activations again in the backward pass instead of keeping them.
    """

    ends: Tensor

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        segment_length: Annotated[int, Ge(1)],
        width: Annotated[int, Ge(1)] = 64,
        hops: Annotated[int, Ge(1)] = 3,
        slots: Annotated[int, Ge(1)] = 50,
        bptt_depth: Annotated[int, Ge(-1)] = -1,
        gradient_checkpointing: bool = False,
    ) -> None:
        check_weights("model", (hops + 1) * width * (len(tokenizer) + slots))
        super().__init__(segment_length, width, bptt_depth, gradient_checkpointing)
        self.tokenizer = tokenizer
        self.hops = hops
        self.slots = slots
        tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        self.register_buffer("ends", torch.tensor([not {".", "!", "?"}.isdisjoint(token) for token in tokens]))
        # All K + 1 embeddings of a word side by side, and of an age, 0 being the last sentence before the question.
        self.words = nn.Embedding(len(tokenizer), (hops + 1) * width)
        self.ages = nn.Parameter(torch.empty(slots, hops + 1, width))
        for weight in (self.words.weight, self.ages):
            nn.init.normal_(weight, std=0.1)  # section 4

    def initial_state(self, batch_size: int) -> Sentences:
        """No sentence."""
        empty = self.ages.new_zeros(batch_size, self.slots + 1, self.hops + 1, self.width)
        return Sentences(empty, self.ends.new_zeros(batch_size, dtype=torch.long))

    def read_segment(self, segment: Segment, state: Sentences) -> tuple[Tensor, Sentences]:
        """Remember the sentences of a segment; read the answer to its last one: uᴷ, (B, 1, D)."""
        new = self._embed(segment)
        embedded = torch.cat([state.embedded, new.embedded], dim=1)
        newest = new.number[:, None] + torch.arange(self.slots + 1, device=new.number.device)
        embedded = embedded.gather(1, newest[:, :, None, None].expand(-1, -1, *embedded.shape[2:]))
        state = Sentences(embedded, (state.number + new.number).clamp(max=self.slots + 1))
        return self._answer(state)[:, None], state

    def _embed(self, segment: Segment) -> Sentences:
        """The sentences of a segment, the first one first: Σⱼ lⱼ · E xⱼ, with section 4.1's weights l of positions."""
        ids, mask, _ = segment
        mask = torch.ones_like(ids) if mask is None else mask
        ends = self.ends[ids].long()
        sentence = ends.cumsum(dim=1) - ends  # (B, S), which sentence a token belongs to
        number = ((sentence + 1) * mask).amax(dim=1)
        member = nn.functional.one_hot(sentence).to(self.ages.dtype) * mask[:, :, None]  # (B, S, sentences)
        length = (member @ member.sum(dim=1)[:, :, None]).clamp(min=1)  # (B, S, 1), J of a token's sentence
        position = (member * member.cumsum(dim=1)).sum(dim=2, keepdim=True)  # (B, S, 1), j = 1 … J
        part = torch.arange(1, self.width + 1, device=ids.device) / self.width  # (D,), k/d
        weights = (1 - position / length) - part * (1 - 2 * position / length)  # (B, S, D)
        words = self.words(ids).unflatten(2, (self.hops + 1, self.width)) * weights[:, :, None]
        return Sentences(torch.einsum("bsi,bskd->bikd", member, words), number)

    def _answer(self, sentences: Sentences) -> Tensor:
        """Ask the memory for the newest sentence, K times: (B, D)."""
        memory = sentences.embedded[:, :-1] + self.ages.flip(0)
        u = sentences.embedded[:, -1, 0]
        age = torch.arange(self.slots, device=memory.device).flip(0)
        known = age < sentences.number[:, None] - 1
        for hop in range(self.hops):
            scores = torch.einsum("bd,bid->bi", u, memory[:, :, hop])
            # Softmax over no sentence at all must be no sentence, not NaN.
            p = scores.masked_fill(~known, torch.finfo(scores.dtype).min).softmax(dim=1) * known
            u = u + torch.einsum("bi,bid->bd", p, memory[:, :, hop + 1])
        return u

    def readout(self, hidden: Tensor, segment: Segment) -> Tensor:
        """uᴷ, what has been read last."""
        return hidden[:, 0]
