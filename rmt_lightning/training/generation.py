"""The fact tasks as generation: a language model says the answer.

Shapes: B batch, T segments, S text tokens of a segment, C answers, A tokens of the longest answer and its end, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from rmt_lightning.core.errors import UserError
from rmt_lightning.models.generation import Stream, Writer, generate, read
from rmt_lightning.models.recurrence import Segment
from rmt_lightning.models.segment_model import Reading, SegmentModel
from rmt_lightning.training.answering import FactModule, Judgment
from rmt_lightning.training.optimization import WarmupDecay
from rmt_lightning.training.phases.phase import Phases

# How many tokens are written where none ends an answer, as BABILong allows (Kuratov et al. 2024).
_WRITTEN = 20


class FactGenerator(FactModule):
    """The question ends the last segment; the answer and the tokenizer's end token follow in a segment of their own.

    Trained on these words alone, and right if it writes exactly them, each time the likeliest one. The arguments are
    those of `FactModule`.

    Raises:
        UserError: if the model cannot write, or its tokenizer has no token to end an answer with.
    """

    WRITES = True
    words: Tensor

    def __init__(
        self,
        model: SegmentModel[Any],
        answers: Sequence[str],
        phases: Phases | None = None,
        metrics: Mapping[str, Metric] | None = None,
        all_questions: bool = False,
        optimization: WarmupDecay | None = None,
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
        super().__init__(model, answers, phases, metrics, all_questions, optimization)
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
        logits = self._writer.logits(torch.cat([end.segment.last_token(end.hidden)[:, None], told], dim=1))
        said = logits.argmax(dim=2)
        right = ((said == words) | ~is_word).all(dim=1) & is_word.any(dim=1)
        loss = nn.functional.cross_entropy(logits[is_word], words[is_word])
        scores = (said.masked_fill(~is_word, self.end)[:, None] == self.words).all(dim=2).float()
        return Judgment(loss, scores, right)

    def forward(self, input_ids: Any, attention_mask: Tensor | None = None) -> Tensor:
        """(B, C + 1): 1 for the answer that is written, in the last column if it is none of them; 0 for the others."""
        return self._known(self._write(input_ids, attention_mask, self.words.shape[1]))

    def say(self, segments: Iterable[Segment]) -> list[str | None]:
        """What is written after inputs that come segment by segment, up to its end, or so far."""
        tokenizer = self.model.tokenizer
        assert tokenizer is not None
        ids = self._write(segments, None, max(_WRITTEN, self.words.shape[1]))
        known = dict(enumerate(self.answers))
        best = self._known(ids).argmax(dim=1).tolist()
        lengths = (ids != self.end).cumprod(dim=1).sum(dim=1).tolist()
        texts = (
            str(tokenizer.decode(row[:length], skip_special_tokens=True)).strip()
            for row, length in zip(ids, lengths, strict=True)
        )
        return [known.get(number, text) for number, text in zip(best, texts, strict=True)]

    def _write(self, input_ids: Any, attention_mask: Tensor | None, length: int) -> Tensor:
        """What is written after inputs, given as to the model: (B, `length`), filled up with the end token."""
        for reading in self.model.read(input_ids, attention_mask):  # noqa: B007
            pass
        first = self._writer.logits(reading.segment.last_token(reading.hidden)).argmax(dim=-1, keepdim=True)
        # As in training, what comes after the first word stands in a segment of its own.
        stream = read(self._writer, first, stream=Stream(reading.state, Segment(first[:, :0], first[:, :0])))
        rest = generate(self._writer, first[:, :0], length - 1, stream=stream, stop_tokens=[self.end])
        ids = torch.cat([first, rest.input_ids.masked_fill(rest.attention_mask == 0, self.end)], dim=1)
        ids = nn.functional.pad(ids, (0, length - ids.shape[1]), value=self.end)
        # What follows an end is none of the answer.
        return ids.masked_fill((ids == self.end).cumsum(dim=1) > 0, self.end)

    def _known(self, ids: Tensor) -> Tensor:
        """(B, C + 1) which of the answers is written (B, G), or none of them."""
        longest = max(ids.shape[1], self.words.shape[1])
        given, known = (nn.functional.pad(x, (0, longest - x.shape[1]), value=self.end) for x in (ids, self.words))
        same = (given[:, None] == known).all(dim=2)
        return torch.cat([same, ~same.any(dim=1, keepdim=True)], dim=1).float()
