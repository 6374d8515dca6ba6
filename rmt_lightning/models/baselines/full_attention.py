"""The backbone over the whole input at once: what recurrence is compared with.

Longformer and BigBird are this model with a sparse backbone.

Shapes: B batch, S text tokens of a segment, N tokens of the text read so far, D width of the hidden states.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor, nn
from transformers import PretrainedConfig

from rmt_lightning.core.errors import UserError
from rmt_lightning.models.encoder import Encoder
from rmt_lightning.models.recurrence import Segment
from rmt_lightning.models.segment_model import SegmentModel


class FullAttention(SegmentModel[Segment]):
    """An encoder that sees all segments at once, after the last of them.

    ```
    [CLS] text … text text … text text … text [SEP]      what the backbone sees: all segments, once
    ```

    The state is the text read so far, (B, N) ids and mask, so it grows with the input. N ends at the backbone's
    positions; with an ordinary backbone, time grows with N². The answer is read at [CLS]. There is nothing to
    backpropagate from segment to segment.

    Args:
        encoder: the backbone.
        segment_length: S. [CLS] and [SEP] stand around the whole input, not around each segment.

    Raises:
        UserError: if the backbone has no positions for a single segment.
    """

    # [CLS] before the text, [SEP] after it.
    NUM_SPECIAL_TOKENS = 2

    def __init__(self, encoder: Encoder, segment_length: Annotated[int, Ge(1)]) -> None:
        self.max_tokens = encoder.max_positions - self.NUM_SPECIAL_TOKENS
        if segment_length > self.max_tokens:
            raise UserError(
                f"data.segment_length={segment_length}: too long for positions; the backbone sees at most "
                f"{self.max_tokens} tokens of text; give {self.max_tokens} or less"
            )
        super().__init__(segment_length, encoder.width)
        self.tokenizer = encoder.tokenizer
        self.encoder = encoder

    @property
    def architecture(self) -> PretrainedConfig:
        return self.encoder.model.config

    @property
    def max_segments(self) -> int:
        return self.max_tokens // self.text_length

    def initial_state(self, batch_size: int) -> Segment:
        """No text: (B, 0)."""
        device = next(self.parameters()).device
        return Segment(torch.empty(batch_size, 0, dtype=torch.long, device=device))

    def step(self, segment: Segment, text: Segment) -> tuple[Tensor, Segment]:
        # The state grows with every segment, in rows without text too: by padding.
        return self.read_segment(segment, text)

    def read_segment(self, segment: Segment, text: Segment) -> tuple[Tensor, Segment]:
        """Read one segment, and all that came before it again.

        Args:
            segment: of any length.
            text: what has been read so far.

        Returns:
            The hidden state (B, 1, D) of [CLS], and the text with the segment after it.

        Raises:
            UserError: if the text is longer than the backbone's positions.
        """
        text = joined([text, segment])
        ids, mask, _ = text
        if ids.shape[1] > self.max_tokens:
            raise UserError(
                f"input: {ids.shape[1]} tokens are too long for positions; the backbone sees at most {self.max_tokens} "
                f"tokens of text, {self.max_segments} segments; give a shorter one"
            )
        length = torch.full_like(ids[:, :1], ids.shape[1]) if mask is None else mask.sum(dim=1, keepdim=True)
        ids = nn.functional.pad(ids, (1, 1), value=self.encoder.cls_token_id)
        ids = ids.scatter(1, length + 1, self.encoder.sep_token_id)
        if mask is not None:
            mask = (torch.arange(ids.shape[1], device=ids.device) <= length + 1).long()
        return self.encoder(self.encoder.embed(ids), mask, rows=1), text

    def readout(self, hidden: Tensor, segment: Segment) -> Tensor:
        """The hidden state of [CLS]."""
        return hidden[:, 0]

    def _segments(
        self, input_ids: Tensor | Iterable[Tensor] | Iterable[Segment], attention_mask: Tensor | None
    ) -> tuple[int, list[Segment] | Iterator[Segment]]:
        # As one segment, so that the backbone reads the input once instead of after each of its segments.
        batch_size, segments = super()._segments(input_ids, attention_mask)
        return batch_size, [joined(list(segments))]

    def _segment(self, input_ids: Tensor | Segment) -> Segment:
        # Which may have been joined before.
        return input_ids if isinstance(input_ids, Segment) else Segment(input_ids)


def joined(segments: Sequence[Segment]) -> Segment:
    """Segments one after the other as one, (B, N): text first, then padding, no more of it than the rows need."""
    ids = torch.cat([segment.input_ids for segment in segments], dim=1)
    if all(segment.attention_mask is None for segment in segments):
        return Segment(ids)
    masks = [torch.ones_like(ids) if mask is None else mask for ids, mask, _ in segments]
    mask = torch.cat(masks, dim=1)
    order = mask.argsort(dim=1, descending=True, stable=True)[:, : int(mask.sum(dim=1).max())]
    return Segment(ids.gather(1, order), mask.gather(1, order))
