"""Sets facts into noise and cuts the text into segments.

A sample is a pure function of its key: counter-based random numbers, no generator that is shared, no state to save.
Resuming, sharding over ranks and loader workers are right by construction, and validation sets are fixed.

Shapes: T segments, S text tokens of a segment, Q questions about a sample, A tokens of the longest answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Literal, NamedTuple

import numpy as np
import regex
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rmt_lightning.core.errors import UserError
from rmt_lightning.core.tokens import encode, token_ids
from rmt_lightning.tasks.corpus import Corpus, Reader
from rmt_lightning.tasks.facts import Example, Finite, Split, Task
from rmt_lightning.tasks.noise import SPLITS
from rmt_lightning.tasks.room import Needs, Room, choose_homes, room_in_segments, room_in_tokens, segments_needed

# How often an example that needs more room than the sample has is drawn anew before it is chosen among those that fit.
_ATTEMPTS = 200
# How many examples of a task that has no end of them tell which share of all fits; fewer, if they tell more facts.
_DRAWS = 1000
_TOLD = 2**14
# How many samples of such a task are asked, unless a number is given.
_SAMPLES = 256
# Of how many sentences the tokens are kept, for some tasks have new ones in every sample.
_KNOWN = 2**16
_NOTHING = np.zeros(0, np.int64)
# A word of any script (Unicode, annex 29).
_WORD = regex.compile(r"(?w)\b\w.*?\b")


class Key(NamedTuple):
    """Names a sample of a split.

    Attributes:
        num_segments: its length.
        number: its number.
        facts: whether anything is told and asked in all the noise.
        fragments: how many fragments of facts a segment holds on average in which nothing is told or asked.
        easier: which of the task's easier forms it is a sample of, if it is not of the task itself.
        text_length: S, if segments are to be shorter than those of the placement.
        tokens: its length in tokens, of all but the question; 0: the facts alone. `num_segments` is 0 then.
    """

    num_segments: int
    number: int
    facts: bool = True
    fragments: float = 0.0
    easier: int | None = None
    text_length: int | None = None
    tokens: int | None = None

    @property
    def told(self) -> str:
        """Its length in words."""
        if self.tokens is not None:
            return f"{self.tokens:,} tokens" if self.tokens else "the facts alone"
        return "one segment" if self.num_segments == 1 else f"{self.num_segments} segments"


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
        num_segments: T.
        tokens: of the whole input.
        pieces: yields what each of the T segments is woven of; can be read once.
    """

    example: Example | None
    homes: tuple[int, ...]
    distance: int
    num_segments: int
    tokens: int
    pieces: Iterator[list[Piece]]

    @property
    def segments(self) -> Iterator[np.ndarray]:
        """Yields the pieces of each segment as one array (S,) of token ids; they can be read once."""
        return (np.concatenate([piece.ids for piece in pieces]) for pieces in self.pieces)


class Placement:
    """Draws an example, chooses places for its facts and fills the rest with noise.

    Every segment is full; but for the first, where a number of tokens is asked for, or all, where facts stand alone.
    Facts stand between two sentences of the noise, whole, never over the border of a segment;
    the question ends the last segment. The noise runs on over borders.

    Args:
        task: what is asked.
        corpora: the noise of each split, as `tokenize` makes it.
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
        seed: int = 0,
    ) -> None:
        self.task = task
        self.corpora = corpora
        self.tokenizer = tokenizer
        self.text_length = text_length
        self.seed = seed
        self.finite = isinstance(task, Finite)
        self._token_ids: dict[str, np.ndarray] = {}
        self._examples: dict[tuple[Split, int | None, int], Examples] = {}
        self._fitting_examples: dict[tuple[Split, Key], tuple[Example, ...]] = {}

    def remarks(self) -> Iterator[str]:
        """What people should know of the text and of the questions."""
        without, segments = self.corpora["train"].segments_without_border(self.text_length)
        # One in a thousand is no matter, and generated prose has it.
        if without > segments / 1000:
            where = f"in {without:,} of {segments:,} training segments"
            yield f"noise: {where} no sentence ends; facts may stand between words there"
        for remark in getattr(self.task, "remarks", ()):
            yield f"task={self.task.name}: {remark}"
        words, unknown = self._words
        if unknown:
            yield (
                f"task={self.task.name}: {len(unknown)} of its {len(words)} words are unknown to the tokenizer, and "
                f"look alike to the model, such as {', '.join(unknown[:4])}; choose a backbone that knows them"
            )

    def check_words(self) -> None:
        """Raise UserError if the tokenizer knows next to none of the task's words."""
        words, unknown = self._words
        if len("".join(unknown)) > len("".join(words)) / 2:
            raise UserError(
                f"backbone: its tokenizer knows {len(words) - len(unknown)} of the {len(words)} words of "
                f"task={self.task.name}; choose a backbone that knows their language"
            )

    @cached_property
    def _words(self) -> tuple[list[str], list[str]]:
        """All words of the task, or characters of text without spaces, and those that the tokenizer does not know."""
        texts = {text for sentence in self.task.sentences() for text in sentence.split()}
        words = sorted({word for text in texts for word in _WORD.findall(text)})
        found = encode(self.tokenizer, [f" {word}" for word in words])
        known = [
            sum(end - start for token, (start, end) in zip(*row, strict=True) if token != self.tokenizer.unk_token_id)
            for row in found
        ]
        return words, [word for word, size in zip(words, known, strict=True) if size < len(word)]

    def sample(self, split: Split, key: Key) -> Sample:
        """The sample of this name.

        Raises:
            UserError: if there is no example that such a sample has room for.
        """
        rng = self._random(split, key)
        if not key.facts:
            noise = self._noise(Reader(self.corpora[split], rng), rng, split, key)
            return Sample(None, (), 0, key.num_segments, key.num_segments * self.text_length, noise)
        example, room = self._draw(rng, split, key)
        facts, question = [self._ids(fact) for fact in example.facts], self._ids(example.question)
        by_tokens = key.tokens is not None
        homes = choose_homes(rng, [len(fact) for fact in facts], room, self.task.where, by_tokens)
        pieces = self._fill(Reader(self.corpora[split], rng), rng, split, key, facts, homes, question, room)
        distance = room.num_segments - 1 - min(homes[fact] for fact in example.support)
        return Sample(example, tuple(homes), distance, room.num_segments, room.tokens, pieces)

    def example(self, split: Split, key: Key) -> Example:
        """What the sample of this name tells and asks."""
        return self._draw(self._random(split, key), split, key)[0]

    def _random(self, split: Split, key: Key) -> np.random.Generator:
        # The key of the generator names the stream, its counter's upper half the sample, its lower half counts.
        counter = [0, key.tokens or 0, key.num_segments, key.number]
        return np.random.Generator(np.random.Philox(key=[self.seed, SPLITS.index(split)], counter=counter))

    def _draw(self, rng: np.random.Generator, split: Split, key: Key) -> tuple[Example, Room]:
        """An example and the room that the sample has for it; of a finite set that is not trained on, the next one."""
        task = self.form(key.easier)
        drawn = (task.draw(rng, split) for _ in range(_ATTEMPTS))
        if self.finite and split != "train":
            fitting = self._fitting(split, key)
            drawn = (fitting[number] for number in [key.number % len(fitting)])
        for example in drawn:
            if (room := self._room(example, key)) is not None:
                return example, room
        fitting = self._fitting(split, key)
        example = fitting[int(rng.integers(len(fitting)))]
        room = self._room(example, key)
        assert room is not None, "it fits"
        return example, room

    def facts(self, easier: int | None = None) -> int:
        """How many facts an example has, of one of the easier forms or of the task itself, that has always as many."""
        return len(self.form(easier).draw(np.random.default_rng(0), "train").facts)

    def spread(self, num_segments: int, easier: int | None = None) -> int:
        """So many segments, but where facts stand apart, no more than there are facts."""
        return min(num_segments, self.facts(easier)) if self.task.where == "apart" else num_segments

    def fits(self, split: Split, like: Key) -> float:
        """Which share of all questions inputs of this length have room for, with their facts."""
        return float(self._have_room(split, like).mean())

    def longest(self, split: Split, like: Key) -> int:
        """How many segments such a sample has at most, as far as can be told; 0 if there is none."""
        if like.tokens is None:
            return like.num_segments
        rooms = (self._room(example, like) for example in self._all(split, like.easier, self.text_length).examples)
        return max((room.num_segments for room in rooms if room), default=0)

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
        name = key._replace(number=0, facts=True, fragments=0.0)
        if (split, name) not in self._fitting_examples:
            there = self._all(split, key.easier, length)
            fitting = tuple(there.examples[i] for i in np.flatnonzero(self._have_room(split, key)))
            if not fitting:
                raise UserError(
                    f"data.segment_length: leaves room for {length} tokens of text, too small for the facts and the "
                    f"question of task={self.task.name}: none of its questions fits into {key.told}, for they take "
                    f"{there.tokens.min()} tokens or more; raise it"
                )
            self._fitting_examples[split, name] = fitting
        return self._fitting_examples[split, name]

    def _have_room(self, split: Split, like: Key) -> np.ndarray:
        """(E,) which of the examples of a split samples of this length have room for."""
        there = self._all(split, like.easier, like.text_length or self.text_length)
        if like.tokens is None:
            return there.segments <= like.num_segments
        return np.array([self._room(example, like) is not None for example in there.examples])

    def _all(self, split: Split, easier: int | None, text_length: int) -> Examples:
        """All examples of a split, shuffled, or many where there is no end of them."""
        name = (split, easier, text_length)
        if name not in self._examples:
            task = self.form(easier)
            if isinstance(task, Finite):
                rng = np.random.Generator(np.random.Philox(key=[self.seed, 2**34 + SPLITS.index(split)]))
                questions = task.questions(split)
                examples = tuple(questions[i] for i in rng.permutation(len(questions)))
            else:
                rng = np.random.default_rng(0)
                drawn, told = list[Example](), 0
                while len(drawn) < 8 or (len(drawn) < _DRAWS and told < _TOLD):
                    drawn.append(task.draw(rng, split))
                    told += len(drawn[-1].facts)
                examples = tuple(drawn)
            needs = [self._needs(example) for example in examples]
            segments = np.array([segments_needed(each, text_length) for each in needs])
            self._examples[name] = Examples(examples, segments, np.array([each.tokens for each in needs]))
        return self._examples[name]

    def form(self, easier: int | None = None) -> Task:
        """One of the easier forms, or the task itself."""
        return self.task if easier is None else self.easier[easier]

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

        Where questions have an end, a question may have been given an answer that is none of the task's: nothing but
        -1, so that whatever is answered is wrong.

        Raises:
            UserError: if the task has not named it among its answers.
        """
        if answer not in self.task.answers and self.finite:
            return np.full(self.longest_answer, -1)
        if answer not in self.task.answers:
            raise UserError(f"task={self.task.name}: answers {answer!r}, which is not among its answers; name it there")
        ids, padded = self._ids(answer), np.full(self.longest_answer, -1)
        padded[: len(ids)] = ids
        return padded

    @cached_property
    def longest_answer(self) -> int:
        """A."""
        return max(len(self._ids(answer)) for answer in self.task.answers)

    def same(self, said: str | None, answer: str) -> bool:
        """Whether that is the answer, as far as the tokenizer can tell."""
        return said is not None and (said == answer or np.array_equal(self._ids(said), self._ids(answer)))

    def noise(self, split: Split, num_segments: int, numbers: range) -> Iterator[Tensor]:
        """Mere noise, side by side, one segment (B, S) at a time."""
        samples = (self.sample(split, Key(num_segments, number, facts=False)) for number in numbers)
        return (ids for ids, _ in side_by_side([(num_segments, sample.segments) for sample in samples]))

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
        return min(self.text_length, max(self._needs(task.draw(rng, "train")).tokens for _ in range(1000)))

    def _needs(self, example: Example) -> Needs:
        return Needs([len(self._ids(fact)) for fact in example.facts], len(self._ids(example.question)))

    def _room(self, example: Example, key: Key) -> Room | None:
        """How much text such a sample has room for; None if that is too little for the example."""
        length, needs = key.text_length or self.text_length, self._needs(example)
        if key.tokens is None:
            return room_in_segments(needs, key.num_segments, length)
        return room_in_tokens(needs, key.tokens, length)

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
        room: Room,
    ) -> Iterator[list[Piece]]:
        """Yield what each of the T segments is woven of; read no more noise than the next one needs."""
        for segment in range(room.num_segments):
            stated = zip(facts, homes, strict=True)
            here = [Piece(fact, ids) for fact, (ids, home) in enumerate(stated) if home == segment]
            end = [Piece("question", question)] if segment == room.num_segments - 1 else []
            length = room.left[segment] - sum(len(piece.ids) for piece in here)
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


def side_by_side(rows: Sequence[tuple[int, Iterator[np.ndarray]]]) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Texts side by side, one segment at a time, that end together.

    Args:
        rows: of each text the number of its segments, T or less, and the token ids of each.

    Yields:
        T times ids (B, S), text first, and what of them is text: (B, S), or None if all is.
    """
    longest = max(number for number, _ in rows)
    for segment in range(longest):
        pieces = [next(ids) if segment >= longest - number else _NOTHING for number, ids in rows]
        size = max(map(len, pieces))
        if all(len(ids) == size for ids in pieces):
            yield torch.from_numpy(np.stack(pieces)), None
            continue
        padded = np.stack([np.pad(ids, (0, size - len(ids))) for ids in pieces])
        mask = np.stack([np.arange(size) < len(ids) for ids in pieces]).astype(np.int64)
        yield torch.from_numpy(padded), torch.from_numpy(mask)
