"""Texts as tokens, as they stand in running text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def token_ids(tokenizer: PreTrainedTokenizerBase, sentences: list[str]) -> list[list[int]]:
    """The tokens of sentences that stand in running text, behind a space, without special tokens."""
    return [ids for ids, _ in encode(tokenizer, [f" {sentence}" for sentence in sentences])]


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Iterator[tuple[list[int], list[tuple[int, int]]]]:
    """The tokens of texts that stand in running text, and where each of them begins and ends in its text.

    Some tokenizers take the space before a word for a part of it; the others do not see it. Some put one before
    whatever they are given: they are given a line break before it, so that the text itself is read as it is written.
    """
    if not texts:
        return
    if not tokenizer.is_fast:
        # It does not tell where in the text its tokens stand.
        plain = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        yield from ((ids, [(0, len(text))] * len(ids)) for text, ids in zip(texts, plain, strict=True))
        return
    found = tokenizer(
        [f"\n{text}" for text in texts], add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    for ids, offsets in zip(found["input_ids"], found["offset_mapping"], strict=True):
        first = next((place for place, (_, end) in enumerate(offsets) if end > 1), len(ids))
        yield ids[first:], [(max(0, start - 1), end - 1) for start, end in offsets[first:]]
