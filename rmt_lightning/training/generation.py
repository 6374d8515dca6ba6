"""The fact tasks as generation: a language model says the answer.

Shapes: B batch, T segments, S text tokens of a segment, C answers, A tokens of the longest answer and its end, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from rmt_lightning.core.errors import UserError
from rmt_lightning.models.generation import Writer, generate, read
from rmt_lightning.models.recurrence import Segment
from rmt_lightning.models.segment_model import Reading, SegmentModel
from rmt_lightning.training.answering import FactModule, Judgment
from rmt_lightning.training.phases.phase import Phases


class FactGenerator(FactModule):
    """The question ends the last segment; the answer and the tokenizer's end token follow in a segment of their own.

    Trained on these words alone, and right if it writes exactly them, each time the likeliest one. The arguments are
    those of `FactModule`.

    Raises:
        UserError: if the model cannot write, or its tokenizer has no token to end an answer with.
    """

    words: Tensor

    def __init__(
        self,
        model: SegmentModel[Any],
        answers: Sequence[str],
        phases: Phases | None = None,
        metrics: Mapping[str, Metric] | None = None,
        all_questions: bool = False,
    ) -> None:
        tokenizer = model.tokenizer
        if tokenizer is None or not model.predicts:
            raise UserError(
                f"answer=generate: {type(model).__name__} cannot write; choose model=rmt_decoder, armt, prmt or "
                "rmt_retrieval with backbone=tiny_gpt or gpt2"
            )
        end = tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
        if end is None:
            raise UserError("answer=generate: the backbone's tokenizer has no end token; choose answer=classify")
        super().__init__(model, answers, phases, metrics, all_questions)
        self.end = int(end)
        self.register_buffer("words", self._ended(self.answer_ids)[0], persistent=False)

    @property
    def _writer(self) -> Writer:
        return cast(Writer, self.model)

    def _ended(self, answer: Tensor) -> tuple[Tensor, Tensor]:
        """An answer (B, A) with its end token, filled up with more of them, and which tokens count: (B, A + 1) both."""
        words = nn.functional.pad(answer, (0, 1), value=-1)
        length = (words >= 0).sum(dim=1, keepdim=True)
        is_word = torch.arange(words.shape[1], device=words.device) <= length
        return words.masked_fill(words < 0, self.end), is_word & (length > 0)

    def judge(self, end: Reading[Any], answer: Tensor) -> Judgment:
        words, is_word = self._ended(answer)
        told, _ = self.model.step(Segment(words[:, :-1], is_word[:, :-1].long()), end.state)
        # The last token of the question foretells the first word, and each word the next one.
        logits = self._writer.logits(torch.cat([end.hidden[:, -1:], told], dim=1))
        said = logits.argmax(dim=2)
        right = ((said == words) | ~is_word).all(dim=1) & is_word.any(dim=1)
        loss = nn.functional.cross_entropy(logits[is_word], words[is_word])
        scores = (said.masked_fill(~is_word, self.end)[:, None] == self.words).all(dim=2).float()
        return Judgment(loss, scores, right)

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
