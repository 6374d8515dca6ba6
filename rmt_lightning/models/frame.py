"""What a backbone reads of a segment: its text, the tokens that belong around it, and those of memory.

Shapes: B batch, S text tokens of a segment, M memory tokens, N tokens that the backbone sees, E width of the
embeddings, D width of the hidden states, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Generic

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from rmt_lightning.core.errors import UserError
from rmt_lightning.models.backbone import Transformer
from rmt_lightning.models.decoder import Decoder
from rmt_lightning.models.encoder import Encoder
from rmt_lightning.models.memory import Layout
from rmt_lightning.models.recurrence import Segment, State
from rmt_lightning.models.segment_model import WordModel, touch


class Frame(ABC):
    """Where text and memory stand, and what a backbone is told of it."""

    @abstractmethod
    def layout(self, length: int) -> Layout:
        """What a layer sees of a segment with so many tokens of text."""

    @abstractmethod
    def kept(self, length: int) -> slice:
        """Which of these tokens have hidden states that are read after the last layer."""

    @abstractmethod
    def tokens(self, segment: Segment) -> Tensor:
        """The ids of all that stands beside memory in a segment, (B, N)."""

    @abstractmethod
    def inputs(self, segment: Segment, words: Tensor, memory: Tensor) -> tuple[Any, ...]:
        """What the backbone's `forward` is given.

        Args:
            segment: what is read.
            words: (B, N, E), the embeddings of its `tokens`.
            memory: (B, M, E).
        """

    @abstractmethod
    def readout(self, hidden: Tensor, segment: Segment) -> Tensor:
        """What a classifier reads of the hidden states that are `kept`: (B, …, D) -> (B, D)."""


@dataclass(frozen=True)
class EncoderFrame(Frame):
    """`[CLS] mem … mem [SEP] text … text [SEP]`, all of which sees all (RMT-2023, section 3).

    Attributes:
        memory_size: M.
        cls, sep: ids of the special tokens.
    """

    memory_size: int
    cls: int
    sep: int

    def layout(self, length: int) -> Layout:
        blocks = (("[CLS]", 1), ("memory", self.memory_size), ("[SEP]", 1), ("text", length), ("[SEP]", 1))
        return Layout(blocks, written="memory")

    def kept(self, length: int) -> slice:
        return slice(self.layout(length).place("memory").stop)

    def tokens(self, segment: Segment) -> Tensor:
        """[CLS], [SEP], text and [SEP], with which padding follows: (B, 3 + S)."""
        ids, mask, _ = segment
        special = ids.new_tensor([self.cls, self.sep]).expand(len(ids), -1)
        if mask is None:
            text = nn.functional.pad(ids, (0, 1), value=self.sep)
        else:
            text = nn.functional.pad(ids, (0, 1)).scatter(1, mask.sum(dim=1, keepdim=True), self.sep)
        return torch.cat([special, text], dim=1)

    def inputs(self, segment: Segment, words: Tensor, memory: Tensor) -> tuple[Tensor, Tensor | None, slice]:
        layout, mask = self.layout(segment.input_ids.shape[1]), segment.attention_mask
        embeddings = torch.cat([words[:, :1], memory, words[:, 1:]], dim=1)
        if mask is not None:
            # All is seen up to the [SEP] after the text.
            mask = nn.functional.pad(mask, (layout.place("text").start + 1, 0), value=1)
        return embeddings, mask, layout.place("memory")

    def readout(self, hidden: Tensor, segment: Segment) -> Tensor:
        """The hidden state of [CLS]."""
        return hidden[:, 0]


@dataclass(frozen=True)
class DecoderFrame(Frame):
    """`mem … mem text … text mem … mem`: text is causal, and what follows sees all of it (RMT-2022, section 3.2).

    Attributes:
        read: how many memory tokens stand before the text; if any, as many as after it.
        written: M, how many stand after it.
        free: whether the tokens of a memory see each other freely, or only those before them.
    """

    read: int
    written: int
    free: bool

    def layout(self, length: int) -> Layout:
        blocks = (("read memory", self.read), ("text", length), ("write memory", self.written))
        return Layout(blocks if self.read == self.written else blocks[1:], written="write memory")

    def kept(self, length: int) -> slice:
        return self.layout(length).place("text")

    def tokens(self, segment: Segment) -> Tensor:
        return segment.input_ids

    def inputs(self, segment: Segment, words: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor, slice]:
        embeddings = torch.cat([memory[:, : self.read], words, memory], dim=1)
        text = slice(self.read, self.read + words.shape[1])
        return embeddings, self._visible(segment), self._positions(segment), text

    def _visible(self, segment: Segment) -> Tensor:
        """(B or 1, N, N) bool: what reads what, from 0 … N - 1 to 0 … N - 1."""
        ids, text_mask, _ = segment
        end_of_text = self.read + ids.shape[1]
        length = end_of_text + self.written
        visible = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
        if self.free:
            visible[: self.read, : self.read] = True
            visible[end_of_text:, end_of_text:] = True
        visible = visible[None]
        if text_mask is not None:
            seen = nn.functional.pad(text_mask, (self.read, self.written), value=1).bool()
            # Padding sees itself: a softmax over nothing would be no number.
            visible = visible & seen[:, None] | torch.eye(length, dtype=torch.bool, device=ids.device)
        return visible

    def _positions(self, segment: Segment) -> Tensor:
        """(B or 1, N): the write memory stands right after the text, wherever the padding is."""
        ids, text_mask, _ = segment
        before = torch.arange(self.read + ids.shape[1], device=ids.device)[None]
        length = before.new_tensor([[ids.shape[1]]]) if text_mask is None else text_mask.sum(dim=1, keepdim=True)
        after = self.read + length + torch.arange(self.written, device=ids.device)
        return torch.cat([before.expand(len(after), -1), after], dim=1)

    def memory_from(self, first: int, size: int, words: Tensor) -> tuple[Tensor, Tensor]:
        """Where so many memory tokens stand if the first one stands there, and how many tokens each of them sees.

        Args:
            words: (B, …) of the same texts.

        Returns:
            (B, size) both.
        """
        places = torch.arange(first, first + size, device=words.device).expand(len(words), -1)
        return places, torch.full_like(places, first + size) if self.free else places + 1

    def readout(self, hidden: Tensor, segment: Segment) -> Tensor:
        return segment.last_token(hidden)


def frame_for(backbone: Encoder | Decoder, causal: DecoderFrame) -> Frame:
    """The `causal` one, if the backbone is, or else that of an encoder with as many memory tokens."""
    if isinstance(backbone, Encoder):
        return EncoderFrame(causal.written, backbone.cls_token_id, backbone.sep_token_id)
    return causal


class FramedModel(WordModel[State], Generic[State]):
    """A segment model whose segments are read by a backbone, with memory tokens among their text.

    Args:
        backbone: what reads segments.
        frame: where text and memory stand in them.
        segment_length: how many tokens the backbone sees of each segment.
        bptt_depth: over how many borders between segments gradients flow back; -1 for all of them.
        gradient_checkpointing: compute activations again in the backward pass instead of keeping them.

    Raises:
        UserError: if segment_length exceeds the backbone's positions or leaves no room for text.
    """

    def __init__(
        self, backbone: Transformer, frame: Frame, segment_length: int, bptt_depth: int, gradient_checkpointing: bool
    ) -> None:
        if segment_length > backbone.max_positions:
            raise UserError(
                f"data.segment_length={segment_length}: the backbone sees at most {backbone.max_positions} tokens; "
                f"give {backbone.max_positions} or less"
            )
        beside_text: dict[str, int] = {}
        for name, size in sorted(frame.layout(0).blocks, key=lambda block: block[0].startswith("[")):
            kind = "special" if name.startswith("[") else name
            beside_text[kind] = beside_text.get(kind, 0) + size
        taken = sum(beside_text.values())
        if segment_length <= taken:
            what = " and ".join(f"{number} {kind}" for kind, number in beside_text.items() if kind != "text")
            raise UserError(
                f"data.segment_length={segment_length}: {what} tokens leave no room for text; give more than {taken}"
            )
        super().__init__(segment_length - taken, backbone.width, bptt_depth, gradient_checkpointing)
        self.tokenizer = backbone.tokenizer
        self.segment_length = segment_length
        self.frame = frame

    @property
    @abstractmethod
    def backbone(self) -> Transformer:
        """What reads segments."""

    @property
    def architecture(self) -> PretrainedConfig:
        return self.backbone.model.config

    @property
    def predicts(self) -> bool:
        return isinstance(self.backbone, Decoder)

    def layout(self, length: int) -> Layout:
        """What a layer sees of a segment with so many tokens of text."""
        return self.frame.layout(length)

    def embed(self, input_ids: Tensor) -> Tensor:
        return self.backbone.embed(input_ids)

    def tokens(self, segment: Segment) -> Tensor:
        return self.frame.tokens(segment)

    def readout(self, hidden: Tensor, segment: Segment) -> Tensor:
        # A classifier has no use for the weights that only words are read off with.
        return touch(self.frame.readout(hidden, segment), self.backbone.untied)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the word that comes next, also over the border of a segment: (…, D) -> (…, V)."""
        assert isinstance(self.backbone, Decoder), "an encoder does not predict words"
        return self.backbone.logits(hidden)
