"""Sets facts into noise and cuts the text into segments.

A sample is a pure function of its key: counter-based random numbers, no generator that is shared, no state to save.
Resuming, sharding over ranks and loader workers are right by construction, and validation sets are fixed.

Shapes: T segments, S text tokens of a segment, Q questions about a sample, A tokens of the longest answer.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rmt_lightning.core.errors import UserError
from rmt_lightning.core.tokens import token_ids
from rmt_lightning.tasks.corpus import Corpus, Reader
from rmt_lightning.tasks.facts import Example, Finite, Split, Task
from rmt_lightning.tasks.noise import SPLITS

# How often an example that needs more room than the sample has is drawn anew before it is chosen among those that fit.
_ATTEMPTS = 200
# How many examples of a task that has no end of them tell which share of all fits.
_DRAWS = 1000
# How many samples of such a task are asked, unless a number is given.
_SAMPLES = 256
# Of how many sentences the tokens are kept, for some tasks have new ones in every sample.
_KNOWN = 2**16


class Key(NamedTuple):
    """Names a sample of a split.

    Attributes:
        num_segments: its length.
        number: its number.
        facts: whether anything is told and asked in all the noise.
        fragments: how many fragments of facts a segment holds on average in which nothing is told or asked.
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


class Examples(NamedTuple):
    """Examples of a split, in the order in which they are asked if there is an end of them.

    Attributes:
        examples: all of them, or many.
        segments: (E,) how many segments each needs at least; infinite where a sentence is longer than one.
        tokens: (E,) of facts and question.
    """

    examples: tuple[Example, ...]
    segments: np.ndarray
    tokens: np.ndarray


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

    Attributes:
        finite: whether there is an end of the task's questions.
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
        self.finite = isinstance(task, Finite)
        self._token_ids: dict[str, np.ndarray] = {}
        self._examples: dict[tuple[Split, int | None, int], Examples] = {}
        self._fitting_examples: dict[tuple[Split, int | None, int, int], tuple[Example, ...]] = {}

    def remarks(self) -> Iterator[str]:
        """What people should know of the text and of the questions."""
        without, segments = self.corpora["train"].segments_without_border(self.text_length)
        # One in a thousand is no matter, and generated prose has it.
        if without > segments / 1000:
            where = f"in {without:,} of {segments:,} training segments"
            yield f"noise: {where} no sentence ends; facts may stand between words there"
        for remark in getattr(self.task, "remarks", ()):
            yield f"task={self.task.name}: {remark}"

    def sample(self, split: Split, key: Key) -> Sample:
        """The sample of this name.

        Raises:
            UserError: if there is no example that such a sample has room for.
        """
        rng = self._random(split, key)
        if not key.facts:
            noise = self._noise(Reader(self.corpora[split], rng), rng, split, key)
            return Sample(None, homes=(), distance=0, pieces=noise)
        example = self._draw(rng, split, key)
        facts, question = [self._ids(fact) for fact in example.facts], self._ids(example.question)
        length = key.text_length or self.text_length
        homes = self._choose_segments(rng, facts, len(question), key.num_segments, length)
        pieces = self._fill(Reader(self.corpora[split], rng), rng, split, key, facts, homes, question)
        first_needed = min(homes[fact] for fact in example.support)
        return Sample(example, tuple(homes), key.num_segments - 1 - first_needed, pieces)

    def example(self, split: Split, key: Key) -> Example:
        """What the sample of this name tells and asks."""
        return self._draw(self._random(split, key), split, key)

    def _random(self, split: Split, key: Key) -> np.random.Generator:
        # The key of the generator names the stream, its counter's upper half the sample, its lower half counts.
        counter = [0, 0, key.num_segments, key.number]
        return np.random.Generator(np.random.Philox(key=[self.seed, SPLITS.index(split)], counter=counter))

    def _draw(self, rng: np.random.Generator, split: Split, key: Key) -> Example:
        """An example that the sample has room for; of a finite set that is not trained on, the next one."""
        if self.finite and split != "train":
            fitting = self._fitting(split, key)
            return fitting[key.number % len(fitting)]
        task = self.task if key.easier is None else self.easier[key.easier]
        length = key.text_length or self.text_length
        for _ in range(_ATTEMPTS):
            example = task.draw(rng, split)
            if self._segments_needed(example, length) <= key.num_segments:
                return example
        fitting = self._fitting(split, key)
        return fitting[int(rng.integers(len(fitting)))]

    def facts(self, easier: int | None = None) -> int:
        """How many facts an example has, of one of the easier forms or of the task itself, that has always as many."""
        return len((self.task if easier is None else self.easier[easier]).draw(np.random.default_rng(0), "train").facts)

    def spread(self, num_segments: int, easier: int | None = None) -> int:
        """So many segments, but where facts stand apart, no more than there are facts."""
        return min(num_segments, self.facts(easier)) if self.task.where == "apart" else num_segments

    def fits(self, split: Split, num_segments: int, easier: int | None = None) -> float:
        """Which share of all questions inputs of this length have room for, with their facts."""
        return float(np.mean(self._all(split, easier, self.text_length).segments <= num_segments))

    def room_for(self, split: Split, share: float) -> int:
        """The smallest S at which one segment has room for that share of all questions."""
        return int(np.quantile(self._all(split, None, self.text_length).tokens, share, method="higher"))

    def asked(self, split: Split, samples: int | None, key: Key) -> int:
        """How many samples like this one a validation or a test asks: each question at most once.

        Args:
            split: which.
            samples: how many are wanted; None: all questions, or 256 where there is no end of them.
            key: their length; its number is of no meaning.
        """
        if not self.finite:
            return _SAMPLES if samples is None else samples
        there = len(self._fitting(split, key))
        return there if samples is None else min(samples, there)

    def different(self, split: Split, keys: Iterable[Key]) -> int:
        """How many different questions, with their facts, the samples of these names ask."""
        examples = (self.example(split, key) for key in keys)
        return len({(example.facts, example.question) for example in examples})

    def _fitting(self, split: Split, key: Key) -> tuple[Example, ...]:
        """The examples that samples like this one have room for.

        Raises:
            UserError: if there are none.
        """
        length = key.text_length or self.text_length
        name = (split, key.easier, length, key.num_segments)
        if name not in self._fitting_examples:
            there = self._all(split, key.easier, length)
            fitting = tuple(there.examples[i] for i in np.flatnonzero(there.segments <= key.num_segments))
            if not fitting:
                inputs = "one segment" if key.num_segments == 1 else f"{key.num_segments} segments"
                raise UserError(
                    f"data.segment_length: leaves room for {length} tokens of text, too small for the facts and the "
                    f"question of task={self.task.name}: none of its questions fits into {inputs}, for they take "
                    f"{there.tokens.min()} tokens or more; raise it"
                )
            self._fitting_examples[name] = fitting
        return self._fitting_examples[name]

    def _all(self, split: Split, easier: int | None, text_length: int) -> Examples:
        """All examples of a split, shuffled, or many where there is no end of them."""
        name = (split, easier, text_length)
        if name not in self._examples:
            task = self.task if easier is None else self.easier[easier]
            if isinstance(task, Finite):
                rng = np.random.Generator(np.random.Philox(key=[self.seed, 2**34 + SPLITS.index(split)]))
                questions = task.questions(split)
                examples = tuple(questions[i] for i in rng.permutation(len(questions)))
            else:
                rng = np.random.default_rng(0)
                examples = tuple(task.draw(rng, split) for _ in range(_DRAWS))
            segments = np.array([self._segments_needed(example, text_length) for example in examples])
            self._examples[name] = Examples(examples, segments, np.array([self._size(example) for example in examples]))
        return self._examples[name]

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
            row[len(row) - len(ids) :] = ids
        return told, np.stack([self.answer_ids(answer) for answer in answers])

    def answer_ids(self, answer: str) -> np.ndarray:
        """An answer as (A,) token ids, as many as the task's longest one has, with -1 after its end.

        Raises:
            UserError: if the task has not named it among its answers.
        """
        if answer not in self.task.answers:
            raise UserError(f"task={self.task.name}: answers {answer!r}, which is not among its answers; name it there")
        ids, padded = self._ids(answer), np.full(self.longest_answer, -1)
        padded[: len(ids)] = ids
        return padded

    @cached_property
    def longest_answer(self) -> int:
        """A."""
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
            if len(self._token_ids) >= _KNOWN:
                self._token_ids.clear()
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

    def _segments_needed(self, example: Example, text_length: int) -> float:
        """How many segments have room for an example, filled from the last one on; infinite if none have."""
        sizes = [len(self._ids(fact)) for fact in example.facts]
        spare, segments = text_length - len(self._ids(example.question)), 1
        if spare < 0 or max(sizes, default=0) > text_length:
            return math.inf
        for size in reversed(sizes):
            if size > spare:
                spare, segments = text_length, segments + 1
            spare -= size
        return segments

    def _choose_segments(
        self,
        rng: np.random.Generator,
        facts: list[np.ndarray],
        question_length: int,
        num_segments: int,
        text_length: int,
    ) -> list[int]:
        """The segment of each fact, in order, if they fit.

        Segments are drawn uniformly and sorted, those of facts that stand apart each only once while there are enough.
        Where facts crowd, a fact moves on to the next segment with room, but never past the last one from which those
        that follow still find theirs.
        """
        # Of the segments that are looked at: inputs may be of any length.
        room = defaultdict(lambda: text_length, {num_segments - 1: text_length - question_length})
        latest = [0] * len(facts)
        spare, segment = room.copy(), num_segments - 1
        for fact in reversed(range(len(facts))):
            while spare[segment] < len(facts[fact]):
                segment -= 1
            spare[segment] -= len(facts[fact])
            latest[fact] = segment
        wanted = np.sort(rng.integers(num_segments, size=len(facts)))
        if self.task.where == "start":
            wanted[:] = 0
        elif self.task.where == "apart":
            places = max(num_segments, len(facts))
            wanted = np.sort(rng.choice(places, size=len(facts), replace=False)) * num_segments // places
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
            piece = fact[start : min(stop, start + 2 * len(fact) // 3, start + len(ids) - 1)]
            place = rng.integers(len(ids) - len(piece))
            ids[place : place + len(piece)] = piece
        return ids

    def _fill(
        self,
        reader: Reader,
        rng: np.random.Generator,
        split: Split,
        key: Key,
        facts: list[np.ndarray],
        homes: list[int],
        question: np.ndarray,
    ) -> Iterator[list[Piece]]:
        """Yield what each of the T segments, S tokens long, is woven of; read no more noise than the next one needs."""
        for segment in range(key.num_segments):
            stated = zip(facts, homes, strict=True)
            here = [Piece(fact, ids) for fact, (ids, home) in enumerate(stated) if home == segment]
            end = [Piece("question", question)] if segment == key.num_segments - 1 else []
            length = (key.text_length or self.text_length) - sum(len(piece.ids) for piece in (*here, *end))
            if not here:
                ids = reader.tokens(reader.spans(length))
                noise = ids if end else self._scatter_fragments(ids, rng, split, key.fragments)
                yield [Piece("noise", noise), *end]
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
