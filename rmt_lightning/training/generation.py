"""The fact tasks as generation: a language model says the answer.

Shapes: B batch, T segments, S text tokens of a segment, C answers, A tokens of the longest answer and its end, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from rmt_lightning.core.errors import UserError
from rmt_lightning.models.generation import Writer, generate, read
from rmt_lightning.models.recurrence import Segment
from rmt_lightning.models.segment_model import Reading, SegmentModel
from rmt_lightning.training.classification import FactModule
from rmt_lightning.training.optimization import WarmupDecay


class FactGenerator(FactModule):
    """The question ends the last segment; the answer and the tokenizer's end token follow in a segment of their own.

    Trained on these words alone, and right if it writes exactly them, each time the likeliest one. The arguments are
    those of `FactModule`.

    Raises:
        UserError: if the model cannot write, or its tokenizer has no token to end an answer with.
    """

    words: Tensor
    is_word: Tensor

    def __init__(
        self,
        model: SegmentModel[Any],
        answers: Sequence[str],
        optimization: WarmupDecay,
        max_segments: int,
        seed: int = 0,
        all_questions: bool = False,
    ) -> None:
        tokenizer = model.tokenizer
        if tokenizer is None or type(model).logits is SegmentModel.logits:
            raise UserError(f"answer=generate: {type(model).__name__} cannot write; choose model=rmt_decoder")
        if tokenizer.eos_token_id is None:
            raise UserError("answer=generate: the backbone's tokenizer has no end token; choose answer=classify")
        super().__init__(model, answers, optimization, max_segments, seed, all_questions)
        self.end = int(tokenizer.eos_token_id)
        # With a space before it, an answer is the word that the text knows.
        rows = tokenizer([f" {answer}" for answer in answers], add_special_tokens=False)["input_ids"]
        words = [torch.tensor([*row, self.end]) for row in rows]
        # Both (C, A); behind its end an answer is filled up with more of the same token.
        self.register_buffer("words", pad_sequence(words, True, self.end), persistent=False)
        lengths = torch.tensor([len(row) for row in words])
        self.register_buffer("is_word", torch.arange(self.words.shape[1]) < lengths[:, None], persistent=False)

    @property
    def _writer(self) -> Writer:
        return cast(Writer, self.model)

    def answer(self, end: Reading[Any], label: Tensor) -> tuple[Tensor, Tensor]:
        words, is_word = self.words[label], self.is_word[label] & (label >= 0)[:, None]
        told, _ = self.model.step(Segment(words[:, :-1], is_word[:, :-1].long()), end.state)
        # The last token of the question foretells the first word, and each word the next one.
        scores = self._writer.logits(torch.cat([end.hidden[:, -1:], told], dim=1))
        said = (scores.argmax(dim=2) == words) | ~is_word
        return nn.functional.cross_entropy(scores[is_word], words[is_word]), said.all(dim=1) & (label >= 0)

    def forward(self, input_ids: Any, attention_mask: Tensor | None = None) -> Tensor:
        """(B, C + 1): 1 for the answer that is written, in the last column if it is none of them; 0 for the others."""
        pieces = input_ids.unbind(dim=1) if isinstance(input_ids, Tensor) and input_ids.dim() == 3 else input_ids
        stream = None
        for piece in [pieces] if isinstance(pieces, Tensor) else pieces:
            stream = read(self._writer, piece, attention_mask, stream)
        assert stream is not None
        nothing = stream.segment.input_ids[:, :0]
        longest = self.words.shape[1]
        said = generate(self._writer, nothing, longest, stream=stream, stop_tokens=[self.end])
        ids = said.input_ids.masked_fill(said.attention_mask == 0, self.end)
        ids = nn.functional.pad(ids, (0, longest - ids.shape[1]), value=self.end)
        same = (ids[:, None] == self.words).all(dim=2)
        return torch.cat([same, ~same.any(dim=1, keepdim=True)], dim=1).float()
