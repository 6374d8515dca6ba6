"""Texts as tokens, as they stand in running text; numbers of tokens, as people write them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import TYPE_CHECKING

from rmt_lightning.core.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# How many characters are tokenized at once.
CHARACTERS = 2**16
_COUNT = re.compile(r"([0-9]{1,12})([kKM]?)")
_THOUSANDS = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6}
_MOST = 10**9


def token_count(key: str, given: int | str) -> int:
    """How many tokens are meant: 1000, or 1k, as published lengths are written; 64k; 10M.

    Raises:
        UserError: naming the setting `key`, if that is no such number.
    """
    match = _COUNT.fullmatch(str(given))
    if match is None or (count := int(match[1]) * _THOUSANDS[match[2]]) > _MOST:
        raise UserError(
            f"{key}: {given} is no number of tokens; give whole numbers up to 1000M, with k for thousands and M for "
            "millions, such as [0,1k,64k,1M]"
        )
    return count


def in_short(count: int) -> str:
    """A number of tokens as published lengths are written: 0k, 64k, 1M; any other one as it is."""
    if count % 10**6 == 0 and count:
        return f"{count // 10**6}M"
    return f"{count // 1000}k" if count % 1000 == 0 else str(count)


def token_ids(tokenizer: PreTrainedTokenizerBase, sentences: list[str]) -> list[list[int]]:
    """The tokens of sentences that stand in running text, behind a space, without special tokens."""
    return [ids for ids, _ in encode(tokenizer, [f" {sentence}" for sentence in sentences])]


def plain_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """The tokens of whole texts, without special tokens."""
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    return ids


def start_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that documents begin with.

    Raises:
        UserError: if the tokenizer has none.
    """
    # Models that have seen nothing but an end between documents, as Qwen's have, have seen them begin after it.
    tokens = (tokenizer.bos_token_id, tokenizer.cls_token_id, tokenizer.eos_token_id, tokenizer.sep_token_id)
    start = next((token for token in tokens if token is not None), None)
    if start is None:
        raise UserError(
            "backbone: its tokenizer has no token that begins or ends a text (bos, cls, eos, sep), to begin a document "
            "with; choose another"
        )
    return int(start)


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Iterator[tuple[list[int], list[tuple[int, int]]]]:
    """The tokens of texts that stand in running text, and where each of them begins and ends in its text.

    Some tokenizers take the space before a word for a part of it; the others do not see it. Some put one before
    whatever they are given, and line breaks that follow each other may be one token: something that stands before it is
    given too, so that the text itself is read as it is written.
    """
    if not texts:
        return
    if not tokenizer.is_fast:
        # It does not tell where in the text its tokens stand.
        plain = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        yield from ((ids, [(0, len(text))] * len(ids)) for text, ids in zip(texts, plain, strict=True))
        return
    # A word that no space is before must not go on with a letter.
    before = "x" if _breaks_are_spaces(tokenizer) else "\n"
    behind = [f"{'x' if text[:1].isspace() else before}{text}" for text in texts]
    found = tokenizer(behind, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    for ids, offsets in zip(found["input_ids"], found["offset_mapping"], strict=True):
        first = next((place for place, (_, end) in enumerate(offsets) if end > 1), len(ids))
        yield ids[first:], [(max(0, start - 1), end - 1) for start, end in offsets[first:]]


@lru_cache(maxsize=8)
def _breaks_are_spaces(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a line break before a word makes another token of it, as a space does. XLM-RoBERTa's is such a one."""
    spaced, broken, inside, apart = tokenizer([" x", "\nx", ",x", ", x"], add_special_tokens=False)["input_ids"]
    return bool(spaced == broken and inside != apart and len(inside) > 1)


def whole_words(pieces: Iterable[str]) -> Iterator[str]:
    """The same text in pieces of some length, each but the first of which begins with white space."""
    kept: list[str] = []
    length = 0
    for piece in pieces:
        kept.append(piece)
        length += len(piece)
        if length < CHARACTERS:
            continue
        whole = "".join(kept)
        # Behind the last word; of text without spaces, anywhere.
        stop = max((place for place, _ in enumerate(whole) if whole[place].isspace()), default=0) or len(whole)
        yield whole[:stop]
        kept, length = [whole[stop:]], len(whole) - stop
    if rest := "".join(kept):
        yield rest
