"""Keys and values of symbols that mean nothing: what tells memories apart by how much they hold.

A fact is a pair, a question a key, the answer its value. Keys and values are drawn anew for each sample, so nothing can
be learnt by heart. Splits have no set of pairs in common, in whatever order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice, product
from typing import Annotated

import numpy as np
from annotated_types import Ge, Le

from rmt_lightning.core.errors import UserError
from rmt_lightning.tasks.facts import Example, Split, Where

# No word of these letters alone is English, so noise has none of the symbols.
_LETTERS = "bcdfghjklmnpqrstvwxz"
# How often a tokenizer that is trained on the spot is told each symbol, so that it makes one token of it.
_TOLD = 200


class KeyValue:
    """All pairs at the very start, in one segment if there is room (the associative retrieval of GradMem).

    ```
    b d: f. g h: k. c d: m.   noise noise … noise   g h?   -> k
    ```

    With two segments or more, all of them are read before the key is known. `Remember` has a pair in each segment.

    Args:
        pairs: n.
        symbols: how many there are: single letters up to 20, of two letters up to 400.
        key_size: symbols of a key.
        values: how many different values there are, v. Each has as few symbols as will do.

    Raises:
        UserError: if there are too few keys, or too few samples for three splits.
    """

    name = "key_value"
    where: Where = "start"

    def __init__(
        self,
        pairs: Annotated[int, Ge(1), Le(4096)] = 4,
        symbols: Annotated[int, Ge(2), Le(8000)] = 16,
        key_size: Annotated[int, Ge(1), Le(4)] = 2,
        values: Annotated[int, Ge(2), Le(4096)] = 16,
    ) -> None:
        self.pairs = pairs
        self.symbols = symbols
        self.key_size = key_size
        self.values = values
        self._key_symbols, value_symbols = self._alphabets(spelled(symbols))
        self.keys = len(self._key_symbols) ** key_size
        self.answers = _words(value_symbols, values)
        if self.different > self.keys:
            raise UserError(
                f"task.pairs={pairs}: needs {self.different} keys, and {len(self._key_symbols)} symbols make "
                f"{self.keys} keys of {key_size}; raise task.symbols or task.key_size"
            )
        # With these, sums of choices leave every rest (see `_split`), however many pairs there are.
        if self.keys + values < 11:
            raise UserError(
                f"task: {self.keys} keys and {values} values are too few for three splits that have nothing in common; "
                "raise task.symbols, task.key_size or task.values"
            )

    def _alphabets(self, symbols: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
        """The symbols of keys and those of values."""
        return symbols, symbols

    @property
    def different(self) -> int:
        """How many different keys a sample has."""
        return self.pairs

    def capacity(self, accuracy: float) -> float:
        """n (v α - 1) / (v - 1) pairs are held, for of the others a v-th is guessed (arXiv 2407.04841, section 4).

        A little less than 0 where guesses were unlucky, so that means over seeds are right.
        """
        return self.pairs * (self.values * accuracy - 1) / (self.values - 1)

    @property
    def easier(self) -> tuple[KeyValue, ...]:
        """What to begin with (see `SegmentCurriculum`): one pair, then twice as many each time."""
        return tuple(
            type(self)(2**power, self.symbols, self.key_size, self.values)
            for power in range((self.pairs - 1).bit_length())
        )

    @property
    def repeated(self) -> int:
        """With how many of these later stages begin too: with all, for a memory of one pair is learnt first."""
        return len(self.easier)

    def draw(self, rng: np.random.Generator, split: Split) -> Example:
        while True:
            keys, values = self._choose_keys(rng), rng.integers(self.values, size=self.pairs)
            if _split(keys, values) == split:
                break
        # Of each key the latest pair.
        latest = {int(key): number for number, key in enumerate(keys)}
        (asked, answer, told), *also = (
            (f"{self._key(key)}?", self.answers[values[latest[key]]], latest[key])
            for key in rng.permutation(list(latest)).tolist()
        )
        facts = (f"{self._key(key)}: {self.answers[value]}." for key, value in zip(keys, values, strict=True))
        return Example(tuple(facts), asked, answer, (told,), tuple((key, value) for key, value, _ in also))

    def _choose_keys(self, rng: np.random.Generator) -> np.ndarray:
        return rng.choice(self.keys, size=self.pairs, replace=False)

    def _key(self, number: int) -> str:
        places = np.unravel_index(number, (len(self._key_symbols),) * self.key_size)
        return " ".join(self._key_symbols[int(place)] for place in places)

    def sentences(self) -> Iterator[str]:
        yield from (" ".join([symbol] * _TOLD) for symbol in spelled(self.symbols))
        yield f"{self._key(0)}: {self.answers[0]}."
        yield f"{self._key(0)}?"


class Remember(KeyValue):
    """A pair in each segment, asked at the end (Rodkin et al. 2024, arXiv 2407.04841).

    ```
    b d: f.   g h: k.   c d: m.   g h?   -> k
    ```

    Where there are more segments than pairs, some have none; where there are fewer, all have as many as can be. The
    arguments are those of `KeyValue`.
    """

    name = "remember"
    where = "apart"


class Rewrite(Remember):
    """The same, with keys that come again with other values: the latest counts.

    ```
    b d: f.   g h: k.   b d: m.   b d?   -> m
    ```

    Half of the pairs, rounded down, have a key that an earlier or a later one has too. The arguments are those of
    `KeyValue`.
    """

    name = "rewrite"

    @property
    def different(self) -> int:
        return self.pairs - self.pairs // 2

    def _choose_keys(self, rng: np.random.Generator) -> np.ndarray:
        keys = rng.choice(self.keys, size=self.different, replace=False)
        return rng.permutation(np.concatenate([keys, rng.choice(keys, size=self.pairs - self.different)]))


class MQAR(KeyValue):
    """Pairs anywhere, a key asked again after all of them (multi-query associative recall, Arora et al. 2023).

    ```
    noise b: q. noise d: w. noise c: q. noise d?   -> w
    ```

    Keys are of the first half of the symbols, values of the second.

    The published task (Zoology, arXiv 2312.04927) has its pairs at the start and asks for every key within the text
    that follows, the sooner the likelier; a value is foretold where its key is asked. Here, as in every task, the
    question ends the text: a sample asks for one key, drawn at random, after all else; `answer.all_questions=true`
    trains on all keys, each asked there in turn. Accuracy counts answered keys there as here, but here memory has had
    to hold all pairs to the end.

    Args:
        pairs, symbols, key_size, values: as in `KeyValue`.
    """

    name = "mqar"
    where = "anywhere"

    def __init__(
        self,
        pairs: Annotated[int, Ge(1), Le(4096)] = 4,
        symbols: Annotated[int, Ge(4), Le(8000)] = 32,
        key_size: Annotated[int, Ge(1), Le(4)] = 1,
        values: Annotated[int, Ge(2), Le(4096)] = 16,
    ) -> None:
        super().__init__(pairs, symbols, key_size, values)

    def _alphabets(self, symbols: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
        half = len(symbols) // 2
        return symbols[:half], symbols[half:]


def spelled(count: int) -> tuple[str, ...]:
    """So many symbols, each of as many letters as all of them need."""
    return _words(_LETTERS, count, joint="")


def _words(letters: Sequence[str], count: int, joint: str = " ") -> tuple[str, ...]:
    """The first words of as many letters as it takes to have so many of them."""
    size = 1
    while len(letters) ** size < count:
        size += 1
    return tuple(joint.join(word) for word in islice(product(letters, repeat=size), count))


def _split(keys: np.ndarray, values: np.ndarray) -> Split:
    """Which split a set of pairs belongs to: one in ten is for validation, and one in ten for the test."""
    rest = int(keys.sum() + values.sum()) % 10
    return "validation" if rest == 0 else "test" if rest == 1 else "train"
