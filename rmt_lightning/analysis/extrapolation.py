"""Accuracy on inputs longer than those of training.

Shapes: B batch, S text tokens of a segment.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, Protocol

import numpy as np
import torch
from annotated_types import Ge, Le

from rmt_lightning.core.errors import UserError
from rmt_lightning.core.statistics import Proportion
from rmt_lightning.core.tokens import CHARACTERS, encode, in_short, token_count, token_ids, whole_words
from rmt_lightning.models.recurrence import Segment
from rmt_lightning.models.segment_model import SegmentModel
from rmt_lightning.tasks.facts import Counted, Example
from rmt_lightning.tasks.placement import Key, Placement, side_by_side
from rmt_lightning.tasks.published import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# How many predictions are kept of each length.
_KEPT = 10_000


@dataclass(frozen=True)
class LengthTest:
    """What to test at the end of a run.

    Attributes:
        segments: lengths of the inputs, in segments.
        samples: how many of each; None: all questions, or 256 where there is no end of them.
        tokens: lengths in tokens, beside those: 1000 or 1k, 10M; 0: the facts alone.
    """

    segments: list[Annotated[int, Ge(1)]]
    samples: Annotated[int, Ge(1), Le(10**6)] | None = None
    tokens: list[Annotated[int, Ge(0)] | str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.lengths:
            raise UserError("test.segments=[]: names no length; give some, such as [1,2,4], or test.tokens=[0,1k]")

    @property
    def lengths(self) -> list[Key]:
        """What samples of each length are like."""
        return lengths("test.tokens", self.segments, self.tokens)


def lengths(key: str, segments: Sequence[int], tokens: Sequence[int | str]) -> list[Key]:
    """What samples of some lengths are like, each once; their numbers are of no meaning.

    Raises:
        UserError: naming the setting `key`, if some of `tokens` are no numbers of tokens.
    """
    counts = (token_count(key, given) for given in tokens)
    return list(dict.fromkeys([*(Key(n, 0) for n in segments), *(Key(0, 0, tokens=count) for count in counts)]))


def noted(found: Iterable[Reply], rows: list[dict[str, Any]]) -> Iterator[Reply]:
    """The same replies, of each length the first ones of which become rows of predictions.jsonl."""
    for number, reply in enumerate(found):
        if number < _KEPT:
            rows.append(reply.row())
        yield reply


def name_of(like: Key) -> str:
    """What results on samples of this length are filed under."""
    return f"{like.num_segments} segments" if like.tokens is None else f"{like.tokens} tokens"


def in_words(lengths: Sequence[Key]) -> str:
    """Lengths as people say them: 1, 2, 4 segments and 0k, 64k tokens."""
    segments = ", ".join(str(like.num_segments) for like in lengths if like.tokens is None)
    tokens = ", ".join(in_short(like.tokens) for like in lengths if like.tokens is not None)
    return " and ".join(
        [f"{segments} segment{'s' * (segments != '1')}"] * bool(segments) + [f"{tokens} tokens"] * bool(tokens)
    )


@dataclass(frozen=True)
class LengthResult(Proportion):
    """Accuracy on inputs of one length.

    Attributes:
        segments: their length; of those whose length is one in tokens, that of the longest.
        distances: accuracy by distance from fact to question; key k holds distances 2^(k-1) … 2^k - 1, key 0 holds 0.
        fits: the share of all questions that inputs of this length have room for, with their facts; the others are not
            asked. None if that is not known.
        tokens: what their length in tokens was to be, without the question; None if it was one in segments.
        text_tokens: how long they are on average, with the question. None if that is not known.
        exact: of answers that were written, the share that are right but for case, punctuation and articles; f1 the
            mean share of words in common (Rajpurkar et al. 2016). None of answers that were chosen.
        pairs: how many pairs each sample tells. None of tasks whose facts are no pairs.
        capacity: how many of them are held (see `Counted`).
    """

    segments: int
    distances: dict[int, Proportion] = field(default_factory=dict)
    fits: float | None = None
    tokens: int | None = None
    text_tokens: int | None = None
    exact: float | None = None
    f1: float | None = None
    pairs: int | None = None
    capacity: float | None = None

    @property
    def length(self) -> dict[str, Any]:
        """The columns of a csv file that tell the length."""
        return {"segments": self.segments, "tokens": self.tokens, "text_tokens": self.text_tokens}

    def row(self) -> dict[str, Any]:
        written = {} if self.exact is None else {"exact_match": self.exact, "f1": self.f1}
        held = {} if self.pairs is None else {"pairs": self.pairs, "capacity": self.capacity}
        return super().row() | {"fits": self.fits} | written | held


class Answering(Protocol):
    """What can be asked."""

    def say(self, segments: Iterable[Segment]) -> list[str | None]:
        """What is answered to B inputs that come segment by segment (B, S); None if that is no answer."""


class Reply(NamedTuple):
    """How a sample was answered.

    Attributes:
        key: of the sample.
        example: what is told and asked.
        distance: segments from the first fact that is needed to the question.
        segments: how long the sample is.
        tokens: the same in tokens.
        said: what was answered; None if that is no answer.
        right: whether that is the answer.
    """

    key: Key
    example: Example
    distance: int
    segments: int
    tokens: int
    said: str | None
    right: bool

    def row(self) -> dict[str, Any]:
        """A line of predictions.jsonl."""
        return {
            "length": name_of(self.key),
            "question": self.example.question,
            "target": self.example.answer,
            "answer": self.said,
            "right": self.right,
            "distance": self.distance,
            "segments": self.segments,
            "tokens": self.tokens,
        }


@torch.inference_mode()
def replies(
    module: Answering,
    placement: Placement,
    like: Key,
    samples: int | None,
    batch_size: int,
    device: torch.device,
    on_segment: Callable[[], object] = lambda: None,
) -> Iterator[Reply]:
    """The answers to test samples of one length, read one segment at a time in constant memory.

    Args:
        module: what answers, on `device` and in evaluation mode.
        placement: where the samples come from.
        like: their length.
        samples: how many, as `Placement.asked` takes it.
        batch_size: B.
        device: where segments are wanted.
        on_segment: called after each segment of each batch.

    Raises:
        UserError: if there is no question that such inputs have room for.
    """
    asked = placement.asked("test", samples, like)
    for start in range(0, asked, batch_size):
        keys = [like._replace(number=number) for number in range(start, min(start + batch_size, asked))]
        made = [placement.sample("test", key) for key in keys]
        read = fed([(sample.num_segments, sample.segments) for sample in made], device, on_segment)
        for key, sample, said in zip(keys, made, module.say(read), strict=True):
            assert sample.example is not None, "only mere noise has none"
            right = placement.same(said, sample.example.answer)
            yield Reply(key, sample.example, sample.distance, sample.num_segments, sample.tokens, said, right)


def fed(
    rows: Sequence[tuple[int, Iterator[np.ndarray]]], device: torch.device, on_segment: Callable[[], object]
) -> Iterator[Segment]:
    """Texts side by side as a model reads them; arguments as of `side_by_side` and `replies`."""
    for ids, mask in side_by_side(rows):
        yield Segment(ids.to(device), None if mask is None else mask.to(device))
        on_segment()


class TooLong(UserError):
    """A text has more segments than a model can read."""


@torch.inference_mode()
def answers_to(
    module: Answering,
    model: SegmentModel[Any],
    rows: Iterable[Row],
    batch_size: int,
    device: torch.device,
    on_segment: Callable[[], object] = lambda: None,
) -> Iterator[tuple[Row, int, str | None]]:
    """The answers to published questions, each after how many tokens have been read.

    Args:
        module: what answers, on `device` and in evaluation mode.
        model: that of `module`.
        rows: the questions, each of which ends its text.
        batch_size: B.
        device: where segments are wanted.
        on_segment: called after each segment of each batch.

    Raises:
        TooLong: if the model cannot read a text to its end.
    """
    rows = iter(rows)
    assert model.tokenizer is not None
    while batch := list(islice(rows, batch_size)):
        read = [_cut(model.tokenizer, row, model.text_length) for row in batch]
        if model.max_segments is not None and max(map(len, read)) > model.max_segments:
            raise TooLong(f"longer than {model.max_segments} segments of {model.text_length} tokens")
        said = module.say(fed([(len(pieces), iter(pieces)) for pieces in read], device, on_segment))
        for row, pieces, answer in zip(batch, read, said, strict=True):
            yield row, sum(map(len, pieces)), answer


def _cut(tokenizer: PreTrainedTokenizerBase, row: Row, text_length: int) -> list[np.ndarray]:
    """A text with its question, cut into segments of which only the first may be short."""
    text = f" {row.input}"
    parts = whole_words(text[at : at + CHARACTERS] for at in range(0, len(text), CHARACTERS))
    pieces = (ids for part in parts for ids, _ in encode(tokenizer, [part]))
    ids = np.concatenate([np.array(part, np.int64) for part in chain(pieces, token_ids(tokenizer, [row.question]))])
    return np.split(ids, range(len(ids) % text_length or text_length, len(ids), text_length))


def score_length(found: Iterable[Reply], placement: Placement, like: Key, written: bool = False) -> LengthResult:
    """Accuracy on samples of one length that `placement` has made, by the replies to them.

    Args:
        found: the replies.
        placement: what has made the samples.
        like: their length.
        written: whether the answers were written, not chosen.
    """
    # Whether each answer was right, and what was asked, by distance.
    seen: dict[int, list[bool]] = defaultdict(list)
    told: dict[int, set[tuple[tuple[str, ...], str]]] = defaultdict(set)
    sizes: list[tuple[int, int]] = []
    said: list[tuple[str, str]] = []
    for reply in found:
        seen[reply.distance.bit_length()].append(reply.right)
        told[reply.distance.bit_length()].add((reply.example.facts, reply.example.question))
        sizes.append((reply.segments, reply.tokens))
        said.append((reply.said or "", reply.example.answer))

    def proportion(answers: Sequence[bool], questions: Collection[object]) -> dict[str, Any]:
        return {"right": sum(answers), "samples": len(answers), "questions": len(questions), "finite": placement.finite}

    by_distance = {key: Proportion(**proportion(seen[key], told[key])) for key in sorted(seen)}
    whole = proportion([*chain.from_iterable(seen.values())], set().union(*told.values()))
    segments, tokens = zip(*sizes, strict=True)
    exact, f1 = overlap(said) if written else (None, None)
    task, accuracy = placement.task, whole["right"] / whole["samples"]
    held = (task.pairs, task.capacity(accuracy)) if isinstance(task, Counted) else (None, None)
    return LengthResult(
        **whole, segments=max(segments), distances=by_distance, fits=placement.fits("test", like),
        tokens=like.tokens, text_tokens=round(sum(tokens) / len(tokens)), exact=exact, f1=f1,
        pairs=held[0], capacity=held[1],
    )  # fmt: skip


def overlap(said: Sequence[tuple[str, str]]) -> tuple[float, float]:
    """Exact match and F1 of answers (said, wanted) as SQuAD measures them (Rajpurkar et al. 2016), from 0 to 1."""
    # Imported here, for few runs need it.
    from torchmetrics.functional.text import squad

    given = [{"prediction_text": text, "id": str(number)} for number, (text, _) in enumerate(said)]
    wanted: list[Any] = [
        {"answers": {"answer_start": [0], "text": [text]}, "id": str(number)} for number, (_, text) in enumerate(said)
    ]
    found = squad(given, wanted)
    return float(found["exact_match"]) / 100, float(found["f1"]) / 100
