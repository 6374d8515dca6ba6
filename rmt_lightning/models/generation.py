"""Writing text that goes on over the borders of segments.

Shapes: B batch, N tokens that are read, G tokens that are written, S text tokens of a segment, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from rmt_lightning.models import state as tree
from rmt_lightning.models.recurrence import Segment


class Writer(Protocol):
    """What a segment model offers that can write."""

    text_length: int

    def initial_state(self, batch_size: int) -> Any:
        """The state before the first segment."""

    def step(self, segment: Segment, state: Any) -> tuple[Tensor, Any]:
        """Hidden states of the text (B, S, D), each of which knows nothing of the tokens after it; the next state."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the word that comes next: (…, D) -> (…, V)."""


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
    state, before = stream
    assert before.attention_mask is not None
    ids = torch.cat([before.input_ids, input_ids], dim=1)
    mask = torch.cat([before.attention_mask, attention_mask], dim=1)
    order = mask.argsort(dim=1, descending=True, stable=True)
    size = model.text_length
    # Room after the text, so that every row has a last segment.
    ids, mask = (nn.functional.pad(x.gather(1, order), (0, size)) for x in (ids, mask))
    length = mask.sum(dim=1, keepdim=True)
    borders = ((length - 1) // size).clamp(min=0)
    for number in range(int(borders.max())):
        here = slice(number * size, (number + 1) * size)
        _, after = model.step(Segment(ids[:, here], mask[:, here]), state)
        state = tree.where(number < borders[:, 0], after, state)
    last = borders * size + torch.arange(int((length - borders * size).max()), device=ids.device)
    return Stream(state, Segment(ids.gather(1, last), mask.gather(1, last)))


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
    """
    choose = _chooser(temperature, top_k, top_p, generator)
    stop = torch.tensor(stop_tokens, dtype=torch.long, device=input_ids.device)
    stream = read(model, input_ids, attention_mask, stream)
    if max_new_tokens and not _holds_text(stream.segment).all():
        raise ValueError("generate: a row holds no token; give it at least one to go on from")
    going = torch.ones(len(input_ids), 1, dtype=torch.long, device=input_ids.device)
    ids, mask = [input_ids[:, :0]], [input_ids[:, :0]]
    while len(ids) <= max_new_tokens and going.any():
        hidden, _ = model.step(stream.segment, stream.state)
        token = choose(model.logits(stream.segment.last_token(hidden)).float())
        ids.append(token * going)
        mask.append(going)
        stream = read(model, token, going, stream)
        going = going * ~torch.isin(token, stop)
    return Generation(torch.cat(ids, dim=1), torch.cat(mask, dim=1), stream)


def _holds_text(segment: Segment) -> Tensor:
    """(B,) bool."""
    assert segment.attention_mask is not None
    return segment.attention_mask.any(dim=1)


def _chooser(
    temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> Callable[[Tensor], Tensor]:
    """How the next token is chosen: scores (B, V) -> ids (B, 1)."""
    if temperature == 0:
        return lambda scores: scores.argmax(dim=-1, keepdim=True)
    warpers: list[LogitsProcessor] = [TemperatureLogitsWarper(float(temperature))]
    if top_k is not None:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p is not None:
        warpers.append(TopPLogitsWarper(float(top_p)))

    def draw(scores: Tensor) -> Tensor:
        for warp in warpers:
            scores = warp(None, scores)
        return torch.multinomial(scores.softmax(dim=-1), 1, generator=generator)

    return draw
