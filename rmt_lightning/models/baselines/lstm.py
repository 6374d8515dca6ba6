"""A long short-term memory, the recurrent network that transformers replaced.

Shapes: B batch, S text tokens of a segment, L layers, D width.
"""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple

import torch
from annotated_types import Ge, Le
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from transformers import PreTrainedTokenizerBase

from rmt_lightning.models.machine import check_weights
from rmt_lightning.models.recurrence import Segment
from rmt_lightning.models.segment_model import SegmentModel


class LSTMState(NamedTuple):
    """What an LSTM carries on.

    Attributes:
        hidden: (B, L, D).
        cell: (B, L, D).
    """

    hidden: Tensor
    cell: Tensor


class LSTM(SegmentModel[LSTMState]):
    """An LSTM over word embeddings (Hochreiter and Schmidhuber 1997; Gers et al. 2000).

    It reads token by token; segments are only where its gradients may be cut. The answer is read at the last token.
    Its layers have no schedule (see `LayeredModel`): torch runs all of them over a segment in one call, within which
    cuDNN already runs a diagonal of tokens and layers (Appleyard et al. 2016, arXiv 1604.01946).

    Args:
        tokenizer: tells the size of the vocabulary.
        segment_length: S. There are no special tokens.
        width: D, of word embeddings and hidden states.
        layers: L.
        bptt_depth: over how many borders between segments gradients flow back; -1 for all of them.
        gradient_checkpointing: compute activations again in the backward pass instead of keeping them.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        segment_length: Annotated[int, Ge(1)],
        width: Annotated[int, Ge(1)] = 128,
        layers: Annotated[int, Ge(1), Le(1000)] = 2,
        bptt_depth: Annotated[int, Ge(-1)] = -1,
        gradient_checkpointing: bool = False,
    ) -> None:
        check_weights("model", width * (8 * width * layers + len(tokenizer)))
        super().__init__(segment_length, width, bptt_depth, gradient_checkpointing)
        self.tokenizer = tokenizer
        self.words = nn.Embedding(len(tokenizer), width)
        self.lstm = nn.LSTM(width, width, layers, batch_first=True)

    def initial_state(self, batch_size: int) -> LSTMState:
        """Zeros."""
        zeros = self.words.weight.new_zeros(batch_size, self.lstm.num_layers, self.width)
        return LSTMState(zeros, zeros)

    def _run(self, words: Any, before: tuple[Tensor, Tensor]) -> Any:
        # Not every processor has an LSTM in bf16.
        with torch.autocast("cpu", enabled=False):
            return self.lstm(words, before)

    def read_segment(self, segment: Segment, state: LSTMState) -> tuple[Tensor, LSTMState]:
        """Hidden states of the last layer (B, S, D) and the state after it."""
        ids, mask, _ = segment
        # torch puts layers before the batch.
        before = (state.hidden.transpose(0, 1).contiguous(), state.cell.transpose(0, 1).contiguous())
        if mask is None:
            hidden, after = self._run(self.words(ids), before)
            return hidden, LSTMState(*(part.transpose(0, 1) for part in after))
        # A packed row needs a token; what an empty one reads is dropped.
        lengths = mask.sum(dim=1)
        packed = pack_padded_sequence(
            self.words(ids), lengths.clamp(min=1).cpu(), batch_first=True, enforce_sorted=False
        )
        packed_hidden, after = self._run(packed, before)
        hidden, _ = pad_packed_sequence(packed_hidden, batch_first=True, total_length=ids.shape[1])
        return hidden * (lengths > 0)[:, None, None], LSTMState(*(part.transpose(0, 1) for part in after))
