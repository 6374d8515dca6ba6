"""Writing text that goes on over the borders of segments.

Shapes: B batch, N tokens that are read, G tokens that are written, S text tokens of a segment, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from rmt_lightning.models import state as tree
from rmt_lightning.models.recurrence import Segment, text_mask


class Writer(Protocol):
    """What a segment model offers that can write."""

    text_length: int

    def initial_state(self, batch_size: int) -> Any:
        """The state before the first segment."""

    def step(self, segment: Segment, state: Any) -> tuple[Tensor, Any]:
        """Hidden states of the text (B, S, D), each of which knows nothing of the tokens after it; the next state."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the word that comes next: (…, D) -> (…, V)."""


@runtime_checkable
class TokenWriter(Writer, Protocol):
    """What a segment model offers beside that if it can read a segment token by token, with a cache of some kind."""

    def open_segment(self) -> Any:
        """An empty cache; None if it cannot, as it is now."""

    def continue_segment(self, input_ids: Tensor, start: Tensor, memory: Any, cache: Any) -> Tensor:
        """Hidden states (B, G, D) of tokens (B, G) that follow `start` (B, 1) others in the segments of their rows.

        Where a segment begins, the state that it begins with is given to all rows, otherwise None.
        """

    def close_segment(self, state: Any, cache: Any) -> Any:
        """The next state, in rows whose segments are full; the others do not count."""


class Stream(NamedTuple):
    """How far texts have been read.

    Segments are counted from the beginning. The last one, full or not, becomes memory when a token follows it; so a
    stream depends on the text alone, and not on the pieces in which it came.

    Attributes:
        state: that of the model, after all segments but the last.
        segment: the last one.
    """

    state: Any
    segment: Segment


class Generation(NamedTuple):
    """What has been written.

    Attributes:
        input_ids: (B, G) tokens.
        attention_mask: (B, G), 1 up to the token that ended a row, and 0 after it.
        stream: what has been read and written so far; `generate` goes on from there.
    """

    input_ids: Tensor
    attention_mask: Tensor
    stream: Stream


def read(
    model: Writer, input_ids: Tensor, attention_mask: Tensor | None = None, stream: Stream | None = None
) -> Stream:
    """Read texts, or read on.

    Args:
        input_ids: (B, N), of any length, padded anywhere.
        attention_mask: (B, N), 1 for text.
        stream: what has been read before.
    """
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    if stream is None:
        stream = Stream(model.initial_state(len(input_ids)), Segment(input_ids[:, :0], attention_mask[:, :0]))
    return _append(input_ids, attention_mask, stream, model.text_length, lambda *given: model.step(*given)[1])


def _append(
    input_ids: Tensor, attention_mask: Tensor, stream: Stream, size: int, close: Callable[[Segment, Any], Any]
) -> Stream:
    """Put texts (B, N) after a stream whose segments hold `size` tokens; `close` tells the state after a full one."""
    state, before = stream
    assert before.attention_mask is not None
    ids = torch.cat([before.input_ids, input_ids], dim=1)
    mask = torch.cat([before.attention_mask, attention_mask], dim=1)
    order = mask.argsort(dim=1, descending=True, stable=True)
    # Room after the text, so that every row has a last segment.
    ids, mask = (nn.functional.pad(x.gather(1, order), (0, size)) for x in (ids, mask))
    length = mask.sum(dim=1, keepdim=True)
    borders = ((length - 1) // size).clamp(min=0)
    for number in range(int(borders.max())):
        here = slice(number * size, (number + 1) * size)
        after = close(Segment(ids[:, here], mask[:, here]), state)
        state = tree.where(number < borders[:, 0], after, state)
    last = borders * size + torch.arange(int((length - borders * size).max()), device=ids.device)
    return Stream(state, Segment(ids.gather(1, last), mask.gather(1, last)))


class _Pen:
    """Goes on with a stream, token by token. For each, the whole segment is read.

    Attributes:
        stream: all that has been read and written.
    """

    def __init__(self, model: Writer, stream: Stream) -> None:
        self.model = model
        self.stream = stream

    def scores(self) -> Tensor:
        """Those of the next token, (B, V)."""
        state, segment = self.stream
        hidden, _ = self.model.step(segment, state)
        return self.model.logits(segment.last_token(hidden)).float()

    def write(self, token: Tensor, going: Tensor) -> None:
        """Put down a token (B, 1), in the rows that go on, (B, 1)."""
        self.stream = read(self.model, token, going, self.stream)


class _CachedPen:
    """The same, but each token is read once, while those before it are in a cache."""

    def __init__(self, model: TokenWriter, stream: Stream, cache: Any) -> None:
        self.model = model
        self.cache = cache
        self._known = stream
        self._written: list[tuple[Tensor, Tensor]] = []
        # What `scores` reads next: tokens, and where in the segment they stand. All segments begin.
        self._state, (self._tokens, mask, _) = stream
        assert mask is not None
        self._length = mask.sum(dim=1, keepdim=True)
        self._start = torch.zeros_like(self._length)

    @property
    def stream(self) -> Stream:
        if self._written:
            ids, mask = (torch.cat(parts, dim=1) for parts in zip(*self._written, strict=True))
            self._written = []
            self._known = _append(ids, mask, self._known, self.model.text_length, self._close)
        return self._known

    def _close(self, _full: Segment, state: Any) -> Any:
        return self.model.close_segment(state, self.cache)

    def scores(self) -> Tensor:
        hidden = self.model.continue_segment(self._tokens, self._start, self._state, self.cache)
        last = hidden[torch.arange(len(hidden), device=hidden.device), (self._length - self._start)[:, 0] - 1]
        return self.model.logits(last).float()

    def write(self, token: Tensor, going: Tensor) -> None:
        self._written.append((token, going))
        # A row that has ended reads its last token again.
        self._tokens = token.where(going == 1, self._tokens[:, -1:])
        full = self._length * going == self.model.text_length
        self._state = None
        if full.any():
            self._state = self.stream.state
            self._length = self._length.masked_fill(full, 0)
        self._length = self._length + going
        self._start = self._length - 1


def _pen(model: Writer, stream: Stream) -> _Pen | _CachedPen:
    """The quickest way of writing that the model has."""
    if isinstance(model, TokenWriter) and (cache := model.open_segment()) is not None:
        return _CachedPen(model, stream, cache)
    return _Pen(model, stream)


@torch.no_grad()
def generate(
    model: Writer,
    input_ids: Tensor,
    max_new_tokens: int,
    attention_mask: Tensor | None = None,
    stream: Stream | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_tokens: Sequence[int] = (),
    generator: torch.Generator | None = None,
) -> Generation:
    """Read texts and go on writing them. What is written does not depend on the pieces in which a text is fed.

    When a segment is full, its memory is what the next one begins with, so texts of any length take constant memory.
    Dropout is as it is set: call `model.eval()` before.

    Args:
        model: any model with `step` and `logits`.
        input_ids: (B, N), of any length, padded anywhere; with `stream`, what follows, and N may be 0.
        max_new_tokens: G at most; 0 only reads.
        attention_mask: (B, N), 1 for text.
        stream: what has been read and written before.
        temperature: 0 takes the likeliest token; above, tokens are drawn from the scores divided by it.
        top_k: draw from the k likeliest tokens only.
        top_p: draw from the likeliest tokens only that together have this probability.
        stop_tokens: ids that end a row; they count as written.
        generator: of random numbers; on the device of the model.

    Raises:
        ValueError: if a row has no token to go on from, or a setting is out of range.
        UserError: if there are no such ids, or the mask is none of theirs.
    """
    choose = _chooser(temperature, top_k, top_p, generator)
    if max_new_tokens < 0:
        raise ValueError(f"generate: max_new_tokens={max_new_tokens}; give 0 or more")
    attention_mask = text_mask(input_ids, attention_mask)
    stop = torch.tensor(stop_tokens, dtype=torch.long, device=input_ids.device)
    stream = read(model, input_ids, attention_mask, stream)
    if max_new_tokens and not _holds_text(stream.segment).all():
        raise ValueError("generate: a row holds no token; give it at least one to go on from")
    going = torch.ones(len(input_ids), 1, dtype=torch.long, device=input_ids.device)
    ids, mask = [input_ids[:, :0]], [input_ids[:, :0]]
    pen = _pen(model, stream)
    while len(ids) <= max_new_tokens and going.any():
        token = choose(pen.scores())
        ids.append(token * going)
        mask.append(going)
        pen.write(token, going)
        going = going * ~torch.isin(token, stop)
    return Generation(torch.cat(ids, dim=1), torch.cat(mask, dim=1), pen.stream)


def _holds_text(segment: Segment) -> Tensor:
    """(B,) bool."""
    assert segment.attention_mask is not None
    return segment.attention_mask.any(dim=1)


def _chooser(
    temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> Callable[[Tensor], Tensor]:
    """How the next token is chosen: scores (B, V) -> ids (B, 1)."""
    warpers: list[LogitsProcessor] = [TemperatureLogitsWarper(float(temperature))] if temperature else []
    if top_k is not None:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p is not None:
        if not 0 <= top_p <= 1:
            raise ValueError(f"generate: top_p={top_p}; give a probability, > 0")
        warpers.append(TopPLogitsWarper(float(top_p)))
    if not temperature:
        return lambda scores: scores.argmax(dim=-1, keepdim=True)

    def draw(scores: Tensor) -> Tensor:
        for warp in warpers:
            scores = warp(None, scores)
        return torch.multinomial(scores.softmax(dim=-1), 1, generator=generator)

    return draw
