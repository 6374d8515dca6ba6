"""Sets facts into noise and cuts the text into segments.

A sample is a pure function of its key: counter-based random numbers, no generator that is shared, no state to save.
Resuming, sharding over ranks and loader workers are right by construction, and validation sets are fixed.

Shapes: T segments, S text tokens of a segment, Q questions about a sample, A tokens of the longest answer.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rmt_lightning.core.errors import UserError
from rmt_lightning.tasks.facts import Example, Split, Task
from rmt_lightning.tasks.noise import SPLITS, Corpus, Reader, token_ids

log = logging.getLogger(__name__)

# How often an example that needs more room than the sample has is drawn anew before giving up.
_ATTEMPTS = 200


class Key(NamedTuple):
    """Names a sample of a split.

    Attributes:
        num_segments: its length.
        number: its number.
        facts: whether anything is told and asked in all the noise.
        fragments: how many fragments of facts a segment of mere noise holds on average.
        easier: which of the task's easier forms it is a sample of, if it is not of the task itself.
        text_length: S, if segments are to be shorter than those of the placement.
    """

    num_segments: int
    number: int
    facts: bool = True
    fragments: float = 0.0
    easier: int | None = None
    text_length: int | None = None


class Piece(NamedTuple):
    """Neighboring tokens of a segment that come from one sentence or from the noise.

    Attributes:
        source: index of the fact, "noise" or "question".
        ids: (n,) token ids, perhaps none.
    """

    source: int | Literal["noise", "question"]
    ids: np.ndarray

    @property
    def told(self) -> np.ndarray:
        """(n,) the same where something is told or asked; -1 where it is noise."""
        return np.full_like(self.ids, -1) if self.source == "noise" else self.ids


@dataclass(frozen=True)
class Sample:
    """One input of T segments, not yet read.

    Attributes:
        example: what is stated, asked and answered; None if the sample is mere noise.
        homes: the segment in which each fact stands.
        distance: segments between the first fact that is needed and the question; 0 if they share one.
        pieces: yields what each of the T segments is woven of; can be read once.
    """

    example: Example | None
    homes: tuple[int, ...]
    distance: int
    pieces: Iterator[list[Piece]]

    @property
    def segments(self) -> Iterator[np.ndarray]:
        """Yields the pieces of each segment as one array (S,) of token ids; they can be read once."""
        return (np.concatenate([piece.ids for piece in pieces]) for pieces in self.pieces)


class Placement:
    """Draws an example, chooses places for its facts and fills the rest with noise.

    Every segment is full. Facts stand between two sentences of the noise, whole, never over the border of a segment;
    the question ends the last segment. The noise runs on over borders.

    Args:
        task: what is asked.
        corpora: the noise of each split.
        tokenizer: of the backbone.
        text_length: S.
        seed: two placements with the same seed give the same samples.
    """

    def __init__(
        self,
        task: Task,
        corpora: dict[Split, Corpus],
        tokenizer: PreTrainedTokenizerBase,
        text_length: int,
        seed: int,
    ) -> None:
        self.task = task
        self.corpora = corpora
        self.tokenizer = tokenizer
        self.text_length = text_length
        self.seed = seed
        self._token_ids: dict[str, np.ndarray] = {}
        without, segments = corpora["train"].segments_without_border(text_length)
        if without:
            log.info(
                "noise: in %s of %s training segments no sentence ends; facts may stand between words there",
                f"{without:,}", f"{segments:,}",
            )  # fmt: skip

    def sample(self, split: Split, key: Key) -> Sample:
        """The sample of this name.

        Raises:
            UserError: if a segment is too short for the question and the facts.
        """
        # The key of the generator names the stream, its counter's upper half the sample, its lower half counts.
        counter = [0, 0, key.num_segments, key.number]
        rng = np.random.Generator(np.random.Philox(key=[self.seed, SPLITS.index(split)], counter=counter))
        if not key.facts:
            noise = self._noise(Reader(self.corpora[split], rng), rng, split, key)
            return Sample(None, homes=(), distance=0, pieces=noise)
        task = self.task if key.easier is None else self.easier[key.easier]
        length = key.text_length or self.text_length
        for _ in range(_ATTEMPTS):
            example = task.draw(rng, split)
            facts = [self._ids(fact) for fact in example.facts]
            question = self._ids(example.question)
            homes = self._choose_segments(rng, facts, len(question), key.num_segments, length)
            if homes is not None:
                break
        else:
            raise UserError(
                f"data.segment_length: leaves room for {self.text_length} tokens of text, too small for the facts and "
                f"the question of task={self.task.name} ({self._size(example)} tokens); raise it"
            )
        pieces = self._fill(Reader(self.corpora[split], rng), rng, facts, homes, question, key.num_segments, length)
        first_needed = min(homes[fact] for fact in example.support)
        return Sample(example, tuple(homes), key.num_segments - 1 - first_needed, pieces)

    @property
    def easier(self) -> tuple[Task, ...]:
        """The task's easier forms, easiest first; most tasks have none."""
        return getattr(self.task, "easier", ())

    @property
    def repeated(self) -> int:
        """How many of the last of them later stages begin with."""
        return getattr(self.task, "repeated", 0)

    def endings(self, example: Example) -> tuple[np.ndarray, np.ndarray]:
        """Every question about an example, first the one that is asked, where it stands in the last segment.

        Returns:
            (Q, S) token ids, -1 where there is noise, and the answers (Q, A).
        """
        questions, answers = zip((example.question, example.answer), *example.also, strict=True)
        told = np.full((len(questions), self.text_length), -1)
        for row, question in zip(told, questions, strict=True):
            ids = self._ids(question)
            row[-len(ids) :] = ids
        return told, np.stack([self.answer_ids(answer) for answer in answers])

    def answer_ids(self, answer: str) -> np.ndarray:
        """An answer as (A,) token ids, as many as the task's longest one has, with -1 after its end.

        Raises:
            UserError: if the task has not named it among its answers.
        """
        if answer not in self.task.answers:
            raise UserError(f"task={self.task.name}: answers {answer!r}, which is not among its answers; name it there")
        ids = self._ids(answer)
        return np.pad(ids, (0, self._longest_answer - len(ids)), constant_values=-1)

    @cached_property
    def _longest_answer(self) -> int:
        return max(len(self._ids(answer)) for answer in self.task.answers)

    def stream(self, split: Split, num_segments: int, numbers: range) -> tuple[Iterator[Tensor], Tensor, Tensor]:
        """Samples side by side, one segment at a time, for inputs too long to be held at once.

        Returns:
            An iterator of T tensors (B, S), the answers (B, A) and the distances (B,).
        """
        samples = [self.sample(split, Key(num_segments, number)) for number in numbers]
        answers = [self.answer_ids(sample.example.answer) for sample in samples if sample.example]
        distances = [sample.distance for sample in samples]
        return _side_by_side(samples), torch.from_numpy(np.stack(answers)), torch.tensor(distances)

    def noise(self, split: Split, num_segments: int, numbers: range) -> Iterator[Tensor]:
        """Mere noise, side by side, one segment (B, S) at a time."""
        return _side_by_side([self.sample(split, Key(num_segments, number, facts=False)) for number in numbers])

    def _ids(self, sentence: str) -> np.ndarray:
        if sentence not in self._token_ids:
            self._token_ids[sentence] = np.array(token_ids(self.tokenizer, [sentence])[0], dtype=np.int64)
        return self._token_ids[sentence]

    @cached_property
    def tightest(self) -> tuple[int, ...]:
        """The smallest S at which one segment holds any example, the longest of a thousand, with hardly any noise.

        One for each of the easier forms and the last one for the task itself.
        """
        return tuple(map(self._longest, (*self.easier, self.task)))

    def _longest(self, task: Task) -> int:
        rng = np.random.default_rng(0)
        return min(self.text_length, max(self._size(task.draw(rng, "train")) for _ in range(1000)))

    def _size(self, example: Example) -> int:
        return sum(len(self._ids(sentence)) for sentence in (*example.facts, example.question))

    def _choose_segments(
        self,
        rng: np.random.Generator,
        facts: list[np.ndarray],
        question_length: int,
        num_segments: int,
        text_length: int,
    ) -> list[int] | None:
        """The segment of each fact, in order; None if they do not fit.

        Segments are drawn uniformly and sorted. Where facts crowd, a fact moves on to the next segment with room, but
        never past the last one from which those that follow still find theirs.
        """
        room = [text_length] * num_segments
        room[-1] -= question_length
        latest = [0] * len(facts)
        spare, segment = list(room), num_segments - 1
        for fact in reversed(range(len(facts))):
            while segment >= 0 and spare[segment] < len(facts[fact]):
                segment -= 1
            if segment < 0:
                return None
            spare[segment] -= len(facts[fact])
            latest[fact] = segment
        wanted = np.sort(rng.integers(num_segments, size=len(facts)))
        if self.task.where == "start":
            wanted[:] = 0
        homes: list[int] = []
        segment = 0
        for fact, ids in enumerate(facts):
            segment = max(segment, min(int(wanted[fact]), latest[fact]))
            while room[segment] < len(ids):
                segment += 1
            room[segment] -= len(ids)
            homes.append(segment)
        return homes

    def _noise(self, reader: Reader, rng: np.random.Generator, split: Split, key: Key) -> Iterator[list[Piece]]:
        """Yield segments of mere noise, perhaps with fragments of facts."""
        for _ in range(key.num_segments):
            ids = reader.tokens(reader.spans(self.text_length))
            yield [Piece("noise", self._scatter_fragments(ids, rng, split, key.fragments))]

    def _scatter_fragments(self, ids: np.ndarray, rng: np.random.Generator, split: Split, mean: float) -> np.ndarray:
        """Overwrite noise (S,) with pieces of facts, too short to tell anything: text that looks like a fact."""
        for _ in range(rng.poisson(mean)):
            facts = self.task.draw(rng, split).facts
            fact = self._ids(facts[rng.integers(len(facts))])
            start, stop = np.sort(rng.choice(len(fact) + 1, size=2, replace=False))
            piece = fact[start : min(stop, start + 2 * len(fact) // 3)]
            place = rng.integers(len(ids) - len(piece))
            ids[place : place + len(piece)] = piece
        return ids

    def _fill(
        self,
        reader: Reader,
        rng: np.random.Generator,
        facts: list[np.ndarray],
        homes: list[int],
        question: np.ndarray,
        num_segments: int,
        text_length: int,
    ) -> Iterator[list[Piece]]:
        """Yield what each of the T segments, S tokens long, is woven of; read no more noise than the next one needs."""
        for segment in range(num_segments):
            stated = zip(facts, homes, strict=True)
            here = [Piece(fact, ids) for fact, (ids, home) in enumerate(stated) if home == segment]
            end = [Piece("question", question)] if segment == num_segments - 1 else []
            length = text_length - sum(len(piece.ids) for piece in (*here, *end))
            if not here:
                yield [Piece("noise", reader.tokens(reader.spans(length))), *end]
                continue
            spans, gaps = reader.passage(length, self.text_length)
            if self.task.where == "start":
                gaps = np.zeros(1, np.int64)
            places = np.sort(rng.choice(gaps, size=len(here)))
            text = [Piece("noise", ids) for ids in np.split(reader.tokens(spans), places)]
            yield [*chain.from_iterable(zip(text, here, strict=False)), text[-1], *end]


def _side_by_side(samples: list[Sample]) -> Iterator[Tensor]:
    for rows in zip(*(sample.segments for sample in samples), strict=True):
        yield torch.from_numpy(np.stack(rows))
