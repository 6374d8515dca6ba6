"""Where unrelated text comes from, cut into sentences and split by document.

A noise source is any object with `documents(split)`, which yields documents as lists of sentences, and
`fingerprint()`, which names their content. To add one, write such a class and one yaml in conf/noise/. Any may have
`remarks`, lines that are shown when a run begins, once its documents have been read.
"""

from __future__ import annotations

import hashlib
import logging
import re
import time
import unicodedata
import zlib
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Protocol

import regex
from annotated_types import Ge, Le

from rmt_lightning.core.errors import UserError
from rmt_lightning.core.hub import out_of_reach
from rmt_lightning.tasks import prose
from rmt_lightning.tasks.facts import Split
from rmt_lightning.tasks.text_files import TextFiles

log = logging.getLogger(__name__)

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
# Where a sentence ends. English is cut as it always was (first line): at the space after a period, question or
# exclamation mark and perhaps a closing quote, before a capital or a quote; not after titles and initials. Other
# languages have other capitals, letters without case, other quotes (« „ ¿), and marks without a space after them (。).
# Soft hyphens, joiners and marks of order, which may stand on both sides of it, are not seen.
_MARKS = "\u00ad\u200b-\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff"
_UNSEEN = re.compile(f"[{_MARKS}]")
_CLOSE, _OPEN = rf"[\p{{Pe}}\p{{Pf}}\"'{_MARKS}]", rf"[\p{{Ps}}\p{{Pi}}\"'¿¡{_MARKS}]"
_FOREIGN = r"(?![A-Za-z0-9])[\p{SB=Upper}\p{SB=OLetter}\p{Nd}]"
_EAST_ASIAN = r"[\p{Han}\p{Hiragana}\p{Katakana}\u3000-\u303f\uff00-\uffef]"
_NO_TITLE = r"(?<!\b(?:Mr|Mrs|Dr|St|\p{Lu}|(?!\p{Latin})\p{L})\.)"
_SENTENCE_END = regex.compile(
    rf"[.!?][\"'”’)]?{_NO_TITLE}\K (?=[\"'“‘(]?[A-Z0-9])"
    rf"|[.!?…]{_CLOSE}*{_NO_TITLE}\K (?=(?:{_OPEN}|\p{{Pd}} ?)*{_FOREIGN}|[¿¡«„‹]|»\S)"
    rf"|[.!?…](?: ?»|[“«›‹])\K (?={_OPEN}*[\p{{Lu}}\p{{Nd}}])"
    rf"|(?:(?![.!?])\p{{SB=STerm}}|．(?!\p{{Nd}})){_CLOSE}*+\K ?+(?!{_CLOSE}|[\s…\p{{SB=STerm}}\p{{SB=ATerm}}]|$)"
    rf"|{_EAST_ASIAN}[.!?]{_CLOSE}*\K(?={_OPEN}*{_EAST_ASIAN}(?<=\p{{L}}))"
)
# East Asian text has no space after the end of a sentence.
_UNSPACED = regex.compile(rf"{_EAST_ASIAN}[.!?…]*{_CLOSE}*$")
# A text with fewer documents than there are splits is cut into this many passages, which then count as documents.
_PASSAGES = 20
# No sentence has as many characters or tokens: a longer piece of text has no stops.
PIECE = 1000


class Noise(Protocol):
    """What every noise source offers."""

    def documents(self, split: Split) -> Iterator[list[str]]:
        """Yield the documents of one split, each a list of sentences. No document is in two splits."""

    def fingerprint(self) -> str:
        """A name for the content: it changes when the documents do."""


def fingerprint_of(noise: Noise) -> str:
    """The name of its content.

    Raises:
        UserError: if it has none, for all such would be taken for the same.
    """
    name: Any = noise.fingerprint()
    if not isinstance(name, str) or not name:
        kind = type(noise).__name__
        raise UserError(f"noise: the fingerprint of a {kind} is {name!r:.60}; let it be a text that names the content")
    return name


def counted(documents: Iterable[list[str]], split: Split) -> Iterator[list[str]]:
    """Documents as they come; of many, how many there have been is said from time to time.

    Raises:
        UserError: if one is no list of sentences.
    """
    said = time.monotonic()
    for number, document in enumerate(documents):
        if not isinstance(document, list | tuple) or not all(isinstance(sentence, str) for sentence in document):
            raise UserError(f"noise: its documents hold {document!r:.60}; let each be a list of sentences")
        if time.monotonic() > said + 20:
            said = time.monotonic()
            log.info("noise: %s documents read for %s so far", f"{number:,}", split)
        yield document


class Prose:
    """Narrative made by rules from a seed (see prose.py): nothing to download, nothing to read.

    Args:
        documents: how many training documents of 60 sentences; validation and test get a tenth each on top.
        seed: of the generator.
        mentions: which share of the sentences names people and rooms of the tasks, without telling where anybody is.
            With any, splits have no sentence in common.
    """

    def __init__(
        self,
        documents: Annotated[int, Ge(10), Le(10**6)] = 1000,
        seed: Annotated[int, Ge(0), Le(2**32 - 1)] = 0,
        mentions: Annotated[float, Ge(0), Le(1)] = 0.0,
    ) -> None:
        self.count = documents
        self.seed = seed
        self.mentions = mentions

    def documents(self, split: Split) -> Iterator[list[str]]:
        count = self.count if split == "train" else self.count // 10

        def allowed(sentence: str) -> bool:
            return not self.mentions or split_of(sentence) == split

        # Philox keys that differ in one number give unrelated streams, so each split has its own seed.
        seed = 3 * self.seed + SPLITS.index(split)
        yield from prose.documents(seed, count, mentions=self.mentions, allowed=allowed)

    def fingerprint(self) -> str:
        source = Path(prose.__file__).read_bytes()
        return f"prose-{self.count}-{self.seed}-{self.mentions}-{hashlib.sha256(source).hexdigest()}"


class Blank:
    """No noise: what facts leave of a segment is filled with one sign that says nothing, alike in all splits."""

    def documents(self, split: Split) -> Iterator[list[str]]:
        # Facts stand between sentences. A run asks for as many tokens as its longest inputs have.
        yield ["- - - -"] * 2**13

    def fingerprint(self) -> str:
        return "blank"


def split_of(sentence: str) -> Split:
    """A split for each sentence: one in ten is for validation, and one in ten for the test."""
    return SPLITS[max(0, zlib.crc32(sentence.encode()) % 10 - 7)]


class Files:
    """Your own text: txt (a file is a document), jsonl or parquet (a row is a document). Each document is read once.

    Args:
        path: a file, a folder, or a pattern such as "books/*.txt".
        field: the column that holds the text of jsonl and parquet rows.
        validation_path: text for validation and test, which share its documents; without it, one document in ten of
            `path` goes to validation and one in ten to test. What stands in both is not trained on.

    Attributes:
        remarks: what people should know of the documents that have been read.
    """

    remarks: tuple[str, ...] = ()

    def __init__(self, path: str, field: str = "text", validation_path: str | None = None) -> None:
        self.field = field
        self._files = TextFiles("noise.path", path)
        self._held_out = TextFiles("noise.validation_path", validation_path) if validation_path else None
        if field != "text" and not self._files.have_rows and not (self._held_out and self._held_out.have_rows):
            raise UserError(
                f"noise.field={field}: is for rows of jsonl and parquet, and a txt file has none; leave it out"
            )

    def documents(self, split: Split) -> Iterator[list[str]]:
        yield from self._documents[split]

    def fingerprint(self) -> str:
        return self._content

    @cached_property
    def _content(self) -> str:
        return self._digest()

    def _digest(self) -> str:
        name = hashlib.sha256(f"each text once, {self.field}".encode())
        for content in [*self._files.digests(), b"|", *(self._held_out.digests() if self._held_out else ())]:
            name.update(content)
        return f"files-{name.hexdigest()}"

    @cached_property
    def _documents(self) -> dict[Split, list[list[str]]]:
        named = self.fingerprint()
        seen: set[bytes] = set()
        if self._held_out:
            held_out = cut(self._distinct(self._held_out, seen), needed=2)
            training = cut(self._distinct(self._files, seen), needed=1)
            documents: dict[Split, list[list[str]]] = {
                "train": training, "validation": held_out[::2], "test": held_out[1::2]
            }  # fmt: skip
        else:
            everything = cut(self._distinct(self._files, seen), needed=len(SPLITS))
            documents = {split: share(everything, split) for split in SPLITS}
        # What is kept under that name has to be what it names.
        if self._digest() != named:
            raise UserError(f"{self._files.setting}: has changed while it was read; start again")
        self.remarks = tuple(_overlaps(documents))
        return documents

    def _distinct(self, files: TextFiles, seen: set[bytes]) -> list[str]:
        texts = list(files.texts(self.field))
        kept = list(distinct(texts, seen))
        if not kept:
            raise UserError(f"{files.setting}: holds nothing that is not in noise.validation_path too; give other text")
        if len(kept) < len(texts):
            log.info(
                "%s: leaves out %d of %d documents, which repeat others",
                files.setting, len(texts) - len(kept), len(texts),
            )  # fmt: skip
        return kept


class Hub:
    """A data set of the Hugging Face Hub in parquet form.

    Args:
        name: its id, such as "emozilla/quality".
        config: its configuration, if it has several.
        field: the column that holds the text.
        limit: how many documents to take at most.
        begins: a regular expression that the first row of a document matches; None if every row is one.
    """

    def __init__(
        self,
        name: str,
        field: str,
        config: str | None = None,
        limit: Annotated[int, Ge(3)] = 2000,
        begins: str | None = None,
    ) -> None:
        self.name = name
        self.field = field
        self.config = config
        self.limit = limit
        self.begins = begins

    def documents(self, split: Split) -> Iterator[list[str]]:
        yield from share(self._documents, split)

    def fingerprint(self) -> str:
        return f"hub-{self.name}-{self.config}-{self.field}-{self.limit}-{self.begins}-each text once"

    @cached_property
    def _documents(self) -> list[list[str]]:
        return cut(self._texts(), len(SPLITS))

    def _texts(self) -> list[str]:
        hint = "or use noise=prose, or noise=files noise.path=…"
        setting = f"noise.name={self.name}"
        if not Path(self.name).is_dir() and (trouble := out_of_reach(setting)):
            raise UserError(
                f"{setting}: cannot be loaded from the Hugging Face Hub ({trouble}); connect to the network, {hint}"
            )
        log.info("%s: looking for its files", setting)
        try:
            rows = _datasets().load_dataset(self.name, self.config, split="train", streaming=True)
            texts = list(islice(distinct(join(self._column(rows), self.begins), set()), self.limit))
        except UserError:
            raise
        except Exception as error:  # the Hub's client raises a different class for each kind of trouble
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            local = isinstance(error, OSError) and error.filename
            what = "give a folder that can be written in HF_HOME" if local else "check noise.name and noise.config"
            raise UserError(
                f"{setting}: cannot be loaded from the Hugging Face Hub ({reason}); {what}, {hint}"
            ) from None
        return [text for text in texts if text and not text.isspace()]

    def _column(self, rows: Iterable[dict[str, Any]]) -> Iterator[str]:
        for row in rows:
            if self.field not in row:
                raise UserError(f"noise.field={self.field}: {self.name} has no such column; it has {', '.join(row)}")
            text = row[self.field] or ""
            if not isinstance(text, str):
                raise UserError(f"noise.field={self.field}: is {type(text).__name__}, not text, in {self.name}")
            yield text


def plain(text: str) -> str:
    """What texts have in common that differ in their lines, in how letters are encoded, or in large and small ones."""
    seen = text if text.isascii() else _UNSEEN.sub("", unicodedata.normalize("NFKC", text))
    return " ".join(seen.casefold().split())


def distinct(texts: Iterable[str], seen: set[bytes]) -> Iterator[str]:
    """Each text once, however its lines are broken, its letters encoded, and written large or small.

    Args:
        texts: some texts.
        seen: stands for those that were seen before, which are left out too; grows by those that are yielded.
    """
    for text in texts:
        key = hashlib.blake2b(plain(text).encode(), digest_size=16).digest()
        if key not in seen:
            seen.add(key)
            yield text


def _overlaps(documents: dict[Split, list[list[str]]]) -> Iterator[str]:
    """Where much of the held-out text is trained on, in documents that differ a little."""
    training = [sentence for document in documents["train"] for sentence in document]
    for split in SPLITS[1:]:
        # Short sentences are common property.
        asked = {sentence for document in documents[split] for sentence in document if len(sentence) > 30}
        if asked and (known := len(asked.intersection(training)) / len(asked)) > 0.5:
            yield f"noise: {known:.0%} of the sentences of {split} are trained on too; give other text"


def join(rows: Iterable[str], begins: str | None) -> Iterator[str]:
    """Put rows together to documents, each of which begins with a row that matches `begins`."""
    document: list[str] = []
    for row in rows:
        if document and (begins is None or re.match(begins, row)):
            yield "\n".join(document)
            document = []
        document.append(row)
    yield "\n".join(document)


def cut(texts: list[str], needed: int) -> list[list[str]]:
    """Split texts into sentences; a text that comes as fewer than `needed` documents is cut into passages."""
    documents = [sentences(text) for text in texts]
    if len(documents) >= needed:
        return documents
    everything = [sentence for document in documents for sentence in document]
    text = "".join(spaced(everything)).strip()
    length = max(PIECE, -(-len(text) // _PASSAGES))
    if max(map(len, everything), default=0) > length:
        # Where sentences do not end, passages end between words, and where there are no spaces, anywhere.
        pieces = regex.findall(rf"(?=\S).{{1,{length}}}(?:(?= )|$)|\S.{{{length - 1}}}", text)
        return [sentences(piece) for piece in pieces]
    size = max(1, -(-len(everything) // _PASSAGES))
    return [everything[start : start + size] for start in range(0, len(everything), size)]


def spaced(sentences: list[str]) -> list[str]:
    """Sentences as they stand in running text: behind a space, if their language has one between sentences."""
    return [
        sentence if before and _UNSPACED.search(before[-8:]) else f" {sentence}"
        for before, sentence in zip(["", *sentences[:-1]], sentences, strict=True)
    ]


def share(documents: list[list[str]], split: Split) -> list[list[str]]:
    """The documents of one split: of every ten the last but one is for validation, the last for test."""
    if len(documents) < 10:
        parts: dict[Split, list[list[str]]] = {
            "train": documents[:-2], "validation": documents[-2:-1], "test": documents[-1:]
        }  # fmt: skip
        return parts[split]
    kept = {"train": range(8), "validation": range(8, 9), "test": range(9, 10)}[split]
    return [document for number, document in enumerate(documents) if number % 10 in kept]


def sentences(text: str) -> list[str]:
    """Split running text, of any language, into sentences; line breaks inside them are only typography."""
    return _SENTENCE_END.sub("\n", " ".join(text.split())).splitlines()


def _datasets() -> Any:
    """The `datasets` library, imported when it is needed and told to keep its progress bars off the screen."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    return datasets
