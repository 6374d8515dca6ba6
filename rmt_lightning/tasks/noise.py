"""Where unrelated text comes from, and how it is kept: tokenized once, memory-mapped, split by document.

A noise source is any object with `documents(split)`, which yields documents as lists of sentences, and
`fingerprint()`, which names their content. To add one, write such a class and one yaml in conf/noise/.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Protocol

import numpy as np
from annotated_types import Ge
from filelock import FileLock
from transformers import PreTrainedTokenizerBase

from rmt_lightning.core.errors import UserError
from rmt_lightning.core.files import digest
from rmt_lightning.core.hub import out_of_reach
from rmt_lightning.tasks import prose
from rmt_lightning.tasks.facts import Split
from rmt_lightning.tasks.text_files import TextFiles

log = logging.getLogger(__name__)

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
# The space after a period, question or exclamation mark and perhaps a closing quote, before a capital or a quote;
# not after titles and initials.
_SENTENCE_END = re.compile(
    r"(?:(?<=[.!?])|(?<=[.!?][\"'”’)]))(?<!\bMr\.)(?<!\bMrs\.)(?<!\bDr\.)(?<!\bSt\.)(?<!\b[A-Z]\.)"
    r" (?=[\"'“‘(]?[A-Z0-9])"
)
# A text with fewer documents than there are splits is cut into this many passages, which then count as documents.
_PASSAGES = 20
_CHECKSUMS = "checksums.json"


class Noise(Protocol):
    """What every noise source offers."""

    def documents(self, split: Split) -> Iterator[list[str]]:
        """Yield the documents of one split, each a list of sentences. No document is in two splits."""

    def fingerprint(self) -> str:
        """A name for the content: it changes when the documents do."""


class Prose:
    """Narrative made by rules from a seed (see prose.py): nothing to download, nothing to read.

    Args:
        documents: how many training documents of 60 sentences; validation and test get a tenth each on top.
        seed: of the generator.
    """

    def __init__(self, documents: Annotated[int, Ge(10)] = 1000, seed: Annotated[int, Ge(0)] = 0) -> None:
        self.count = documents
        self.seed = seed

    def documents(self, split: Split) -> Iterator[list[str]]:
        count = self.count if split == "train" else self.count // 10
        # Philox keys that differ in one number give unrelated streams, so each split has its own seed.
        yield from prose.documents(3 * self.seed + SPLITS.index(split), count)

    def fingerprint(self) -> str:
        source = Path(prose.__file__).read_bytes()
        return f"prose-{self.count}-{self.seed}-{hashlib.sha256(source).hexdigest()}"


class Files:
    """Your own text: txt (a file is a document), jsonl or parquet (a row is a document). Each document is read once.

    Args:
        path: a file, a folder, or a pattern such as "books/*.txt".
        field: the column that holds the text of jsonl and parquet rows.
        validation_path: text for validation and test, which share its documents; without it, one document in ten of
            `path` goes to validation and one in ten to test. What stands in both is not trained on.
    """

    def __init__(self, path: str, field: str = "text", validation_path: str | None = None) -> None:
        self.field = field
        self._files = TextFiles("noise.path", path)
        self._held_out = TextFiles("noise.validation_path", validation_path) if validation_path else None

    def documents(self, split: Split) -> Iterator[list[str]]:
        yield from self._documents[split]

    def fingerprint(self) -> str:
        name = hashlib.sha256(f"each text once, {self.field}".encode())
        for content in [*self._files.digests(), b"|", *(self._held_out.digests() if self._held_out else ())]:
            name.update(content)
        return f"files-{name.hexdigest()}"

    @cached_property
    def _documents(self) -> dict[Split, list[list[str]]]:
        before = self.fingerprint()
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
        if self.fingerprint() != before:
            raise UserError(f"{self._files.setting}: has changed while it was read; start again")
        _warn_of_overlap(documents)
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
        yield from share(cut(self._texts(), len(SPLITS)), split)

    def fingerprint(self) -> str:
        return f"hub-{self.name}-{self.config}-{self.field}-{self.limit}-{self.begins}-each text once"

    def _texts(self) -> list[str]:
        hint = "or use noise=prose, or noise=files noise.path=…"
        setting = f"noise.name={self.name}"
        if not Path(self.name).is_dir() and (trouble := out_of_reach(setting)):
            raise UserError(
                f"{setting}: cannot be loaded from the Hugging Face Hub ({trouble}); connect to the network, {hint}"
            )
        try:
            rows = _datasets().load_dataset(self.name, self.config, split="train", streaming=True)
            texts = list(islice(distinct(join(self._column(rows), self.begins), set()), self.limit))
        except UserError:
            raise
        except Exception as error:  # the Hub's client raises a different class for each kind of trouble
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise UserError(
                f"{setting}: cannot be loaded from the Hugging Face Hub ({reason}); check noise.name and noise.config, "
                f"{hint}"
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


def distinct(texts: Iterable[str], seen: set[bytes]) -> Iterator[str]:
    """Each text once, however its lines are broken, its letters encoded, and written large or small.

    Args:
        texts: some texts.
        seen: stands for those that were seen before, which are left out too; grows by those that are yielded.
    """
    for text in texts:
        plain = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
        key = hashlib.blake2b(plain.encode(), digest_size=16).digest()
        if key not in seen:
            seen.add(key)
            yield text


def _warn_of_overlap(documents: dict[Split, list[list[str]]]) -> None:
    """Say so if much of the held-out text is trained on, in documents that differ a little."""
    training = [sentence for document in documents["train"] for sentence in document]
    for split in SPLITS[1:]:
        # Short sentences are common property.
        asked = {sentence for document in documents[split] for sentence in document if len(sentence) > 30}
        if asked and (known := len(asked.intersection(training)) / len(asked)) > 0.5:
            log.warning("noise: %.0f%% of the sentences of %s are trained on too; give other text", 100 * known, split)


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
    size = max(1, -(-len(everything) // _PASSAGES))
    return [everything[start : start + size] for start in range(0, len(everything), size)]


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
    """Split running text into sentences; line breaks inside them are only typography."""
    return _SENTENCE_END.sub("\n", " ".join(text.split())).splitlines()


def _datasets() -> Any:
    """The `datasets` library, imported when it is needed and told to keep its progress bars off the screen."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    return datasets


@dataclass(frozen=True)
class Corpus:
    """Tokenized sentences of one split, as memory-mapped arrays.

    Attributes:
        tokens: (N,) token ids of all documents, one after the other, without special tokens.
        sentence_starts: (K + 1,) positions in `tokens` at which a sentence begins, and N.
        document_starts: (D + 1,) indices into `sentence_starts` at which a document begins, and K.
        document_bytes: (D,) lengths of the documents in UTF-8, sentences joined by a space.
    """

    tokens: np.ndarray
    sentence_starts: np.ndarray
    document_starts: np.ndarray
    document_bytes: np.ndarray

    @classmethod
    def open(cls, folder: Path) -> Corpus:
        return cls(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in cls.__dataclass_fields__))

    @property
    def num_documents(self) -> int:
        return len(self.document_starts) - 1


def tokenize(noise: Noise, tokenizer: PreTrainedTokenizerBase, cache_dir: str | Path) -> dict[Split, Corpus]:
    """Tokenize all splits of `noise`, or open what an earlier run has left in `cache_dir`.

    The cache is keyed by the content of the noise and of the tokenizer. It appears under its name only when it is
    complete, and several processes may ask for it at once: one builds, the others wait. Its checksums are compared each
    time, which takes about half a second per GB, and what does not match is built again.

    Raises:
        UserError: if a split holds no text.
    """
    key = hashlib.sha256(f"{noise.fingerprint()}|{_tokenizer_fingerprint(tokenizer)}|v3".encode()).hexdigest()[:32]
    cache = Path(cache_dir).expanduser() / "noise"
    cache.mkdir(parents=True, exist_ok=True)
    folder = cache / key
    with FileLock(cache / f"{key}.lock"):
        if folder.is_dir() and not _is_intact(folder):
            log.warning("%s is damaged; tokenizing again", folder)
            shutil.rmtree(folder)
        if not folder.is_dir():
            partial = Path(tempfile.mkdtemp(prefix=f"{key}-", dir=cache))
            try:
                for split in SPLITS:
                    _write(noise.documents(split), tokenizer, partial / split)
                    if Corpus.open(partial / split).num_documents == 0:
                        raise UserError(
                            f"noise: no document is left for {split}; give at least {len(SPLITS)} sentences"
                        )
                (partial / _CHECKSUMS).write_text(json.dumps(_checksums(partial)))
                os.rename(partial, folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    return {split: Corpus.open(folder / split) for split in SPLITS}


def text_digest(corpora: Mapping[Split, Corpus]) -> str:
    """What names the text itself, as it is read: its tokens, and where sentences and documents begin in each split."""
    content = hashlib.sha256()
    for split in SPLITS:
        for part in (corpora[split].tokens, corpora[split].sentence_starts, corpora[split].document_starts):
            content.update(f"{split} {len(part)} {part.dtype}".encode())
            for start in range(0, len(part), 2**20):
                content.update(part[start : start + 2**20].tobytes())
    return content.hexdigest()


def token_ids(tokenizer: PreTrainedTokenizerBase, sentences: list[str]) -> list[list[int]]:
    """The tokens of sentences that stand in running text, without special tokens.

    Some tokenizers take the space before a word for a part of it; the others do not see it.
    """
    if not sentences:
        return []
    texts = [f" {sentence}" for sentence in sentences]
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _checksums(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): digest(file).hex() for file in sorted(folder.rglob("*.npy"))}


def _is_intact(folder: Path) -> bool:
    try:
        return bool(json.loads((folder / _CHECKSUMS).read_text()) == _checksums(folder))
    except (OSError, ValueError):
        return False


def _tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return hashlib.sha256(backend.to_str().encode()).hexdigest()
    return hashlib.sha256(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode()).hexdigest()


def _write(documents: Iterable[list[str]], tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.int32
    pieces: list[np.ndarray] = []
    sentence_lengths: list[int] = []
    document_lengths: list[int] = []
    document_bytes: list[int] = []
    for document in documents:
        ids = [i for i in token_ids(tokenizer, document) if i]
        if ids:
            pieces.append(np.fromiter((token for sentence in ids for token in sentence), dtype=dtype))
            sentence_lengths += map(len, ids)
            document_lengths.append(len(ids))
            document_bytes.append(len(" ".join(document).encode()))
    folder.mkdir()
    np.save(folder / "tokens.npy", np.concatenate(pieces) if pieces else np.zeros(0, dtype))
    np.save(folder / "sentence_starts.npy", np.cumsum([0, *sentence_lengths], dtype=np.int64))
    np.save(folder / "document_starts.npy", np.cumsum([0, *document_lengths], dtype=np.int64))
    np.save(folder / "document_bytes.npy", np.array(document_bytes, np.int64))


class Reader:
    """Reads noise in order, from a random sentence on, without end and in constant memory.

    After a document comes another one; none is read twice before all have been read.

    Args:
        corpus: what to read.
        rng: decides where to start and which document follows.
    """

    def __init__(self, corpus: Corpus, rng: np.random.Generator) -> None:
        self._corpus = corpus
        self._rng = rng
        self._to_come: list[int] = []
        sentence = int(rng.integers(len(corpus.sentence_starts) - 1))
        self._document = int(np.searchsorted(corpus.document_starts, sentence, side="right")) - 1
        self._position = int(corpus.sentence_starts[sentence])
        self._end = self._start_of(self._document + 1)

    def _start_of(self, document: int) -> int:
        return int(self._corpus.sentence_starts[self._corpus.document_starts[document]])

    def _open_next_document(self) -> None:
        if not self._to_come:
            self._to_come = [int(d) for d in self._rng.permutation(self._corpus.num_documents) if d != self._document]
        self._document = self._to_come.pop() if self._to_come else self._document
        self._position = self._start_of(self._document)
        self._end = self._start_of(self._document + 1)

    def finish_sentence(self) -> None:
        """Leave out what is left of a sentence that has been begun."""
        starts = self._corpus.sentence_starts
        self._position = int(starts[np.searchsorted(starts, self._position)])

    def spans(self, length: int) -> list[slice]:
        """Where in the corpus the next `length` tokens stand: one span unless a document ends. Moves on after them."""
        spans = []
        while length > 0:
            if self._position == self._end:
                self._open_next_document()
            stop = min(self._position + length, self._end)
            spans.append(slice(self._position, stop))
            length -= stop - self._position
            self._position = stop
        return spans

    def tokens(self, spans: list[slice]) -> np.ndarray:
        """The token ids of some spans, one after the other."""
        return np.concatenate([np.zeros(0, np.int64), *(self._corpus.tokens[span] for span in spans)])

    def gaps(self, spans: list[slice]) -> np.ndarray:
        """The offsets in `tokens(spans)` at which a sentence begins or ends, in order; both ends count."""
        starts = self._corpus.sentence_starts
        gaps: list[int] = []
        offset = 0
        for span in spans:
            first, last = np.searchsorted(starts, (span.start, span.stop + 1))
            gaps += [int(start) - span.start + offset for start in starts[first:last]]
            offset += span.stop - span.start
        return np.unique(gaps) if spans else np.zeros(1, np.int64)
