"""A neural Turing machine (NTM): Graves, Wayne and Danihelka 2014, arXiv 1410.5401.

Shapes: B batch, S text tokens of a segment, I slots, W width of a slot, H heads of a kind, D width of the controller.
"""

from __future__ import annotations

from typing import Annotated, NamedTuple

import torch
from annotated_types import Ge
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, softplus
from transformers import PreTrainedTokenizerBase

from rmt_lightning.models import state as tree
from rmt_lightning.models.machine import check_weights
from rmt_lightning.models.recurrence import Segment
from rmt_lightning.models.segment_model import SegmentModel


class Machine(NamedTuple):
    """Where a machine stands between two time steps.

    Attributes:
        memory: (B, I, W).
        writing: (B, H, I), where each write head stands: weights that sum to 1.
        reading: (B, H, I), where each read head stands.
        read: (B, H, W), what has been read last.
        hidden: (B, D) of the controller.
        cell: (B, D) of the controller.
    """

    memory: Tensor
    writing: Tensor
    reading: Tensor
    read: Tensor
    hidden: Tensor
    cell: Tensor


class NeuralTuringMachine(SegmentModel[Machine]):
    """An LSTM that writes to and reads from a memory by content and by location.

    In a time step the controller sees the next `window` tokens and what was read last; then the write heads change the
    memory, then the read heads read it. The answer is read from the controller and the read heads after the last token.

    Args:
        tokenizer: tells the size of the vocabulary.
        segment_length: S. There are no special tokens.
        width: D, also of word embeddings.
        slots: I.
        slot_width: W.
        heads: H, as many read as write.
        window: tokens of a time step. It counts from the start of a segment, whose last one may be short.
        bptt_depth: over how many borders between segments gradients flow back; -1 for all of them.
        gradient_checkpointing: compute activations again in the backward pass instead of keeping them.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        segment_length: Annotated[int, Ge(1)],
        width: Annotated[int, Ge(1)] = 128,
        slots: Annotated[int, Ge(3)] = 128,
        slot_width: Annotated[int, Ge(1)] = 20,
        heads: Annotated[int, Ge(1)] = 1,
        window: Annotated[int, Ge(1)] = 8,
        bptt_depth: Annotated[int, Ge(-1)] = -1,
        gradient_checkpointing: bool = False,
    ) -> None:
        check_weights("model", width * (4 * (window + 1) * width + 10 * heads * slot_width + len(tokenizer)))
        super().__init__(segment_length, width + heads * slot_width, bptt_depth, gradient_checkpointing)
        self.tokenizer = tokenizer
        self.slots = slots
        self.slot_width = slot_width
        self.heads = heads
        self.window = window
        self.words = nn.Embedding(len(tokenizer), width)
        self.controller = nn.LSTMCell(window * width + heads * slot_width, width)
        self.to_write = Addressing(width, heads, slot_width)
        self.to_read = Addressing(width, heads, slot_width)
        self.to_erase = nn.Linear(width, heads * slot_width)
        self.to_add = nn.Linear(width, heads * slot_width)

    def initial_state(self, batch_size: int) -> Machine:
        """An almost empty memory (Collier and Beel 2018, arXiv 1807.08518), with every head at its first slot."""
        zeros = self.words.weight.new_zeros
        head = zeros(batch_size, self.heads, self.slots)
        head[:, :, 0] = 1
        return Machine(
            memory=zeros(batch_size, self.slots, self.slot_width) + 1e-6,
            writing=head,
            reading=head,
            read=zeros(batch_size, self.heads, self.slot_width),
            hidden=zeros(batch_size, self.controller.hidden_size),
            cell=zeros(batch_size, self.controller.hidden_size),
        )

    def read_segment(self, segment: Segment, state: Machine) -> tuple[Tensor, Machine]:
        """Tick once for each window of tokens.

        Returns:
            Controller and read heads after each time step (B, S / window, D + H·W), and the machine after the last one.
        """
        ids, mask, _ = segment
        missing = -ids.shape[1] % self.window
        words = self.words(ids)
        if mask is not None:
            words = words * mask[:, :, None]
            mask = nn.functional.pad(mask, (0, missing)).unflatten(1, (-1, self.window)).any(dim=2)
        windows = nn.functional.pad(words, (0, 0, 0, missing)).unflatten(1, (-1, self.window)).flatten(2)
        outputs = []
        for time, window in enumerate(windows.unbind(dim=1)):
            after = self.tick(window, state)
            state = after if mask is None else tree.where(mask[:, time], after, state)
            outputs.append(torch.cat([state.hidden, state.read.flatten(1)], dim=1))
        return torch.stack(outputs, dim=1), state

    def tick(self, tokens: Tensor, before: Machine) -> Machine:
        """One time step (section 3): tokens (B, window · D)."""
        seen = torch.cat([tokens, before.read.flatten(1)], dim=1)
        hidden, cell = self.controller(seen, (before.hidden, before.cell))
        writing = self.to_write(hidden, before.memory, before.writing)
        erase = self.to_erase(hidden).sigmoid().unflatten(1, (self.heads, self.slot_width))
        add = self.to_add(hidden).unflatten(1, (self.heads, self.slot_width))
        kept = (1 - writing[:, :, :, None] * erase[:, :, None]).prod(dim=1)
        memory = before.memory * kept + writing.transpose(1, 2) @ add  # equations 3 and 4
        reading = self.to_read(hidden, memory, before.reading)
        return Machine(memory, writing, reading, reading @ memory, hidden, cell)  # equation 2

    def readout(self, hidden: Tensor, segment: Segment) -> Tensor:
        """The last output; time steps without text repeat the one before."""
        return hidden[:, -1]


class Addressing(nn.Module):
    """Where the heads of a kind turn to (section 3.3).

    Args:
        width: D.
        heads: H.
        slot_width: W.
    """

    # A head may move to the slot before, stay, or move to the slot after.
    SHIFTS = (-1, 0, 1)

    def __init__(self, width: int, heads: int, slot_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.sizes = [slot_width, 1, 1, len(self.SHIFTS), 1]
        self.parameters_of_heads = nn.Linear(width, heads * sum(self.sizes))

    def forward(self, hidden: Tensor, memory: Tensor, before: Tensor) -> Tensor:
        """(B, D), (B, I, W), weights before (B, H, I) -> weights (B, H, I), which sum to 1 over the slots."""
        given = self.parameters_of_heads(hidden).unflatten(1, (self.heads, -1))
        key, strength, gate, shift, sharpening = given.split(self.sizes, dim=2)
        similarity = cosine_similarity(key[:, :, None], memory[:, None], dim=3)  # equation 6
        content = (softplus(strength) * similarity).softmax(dim=2)  # equation 5
        gate = gate.sigmoid()
        gated = gate * content + (1 - gate) * before  # equation 7
        turned = torch.stack([gated.roll(shift, dims=2) for shift in self.SHIFTS], dim=3)
        shifted = (turned * shift.softmax(dim=2)[:, :, None]).sum(dim=3)  # equation 8
        # Equation 9. Rounding may leave zeros, whose powers have no gradient.
        sharpened = shifted.clamp(min=torch.finfo(shifted.dtype).tiny) ** (1 + softplus(sharpening))
        return sharpened / sharpened.sum(dim=2, keepdim=True)
