"""Text as tokens: tokenized once, kept on disk, read without end."""

from __future__ import annotations

import atexit
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import regex
from filelock import FileLock, Timeout
from transformers import PreTrainedTokenizerBase

from rmt_lightning.core.errors import UserError
from rmt_lightning.core.files import digest, removed
from rmt_lightning.core.quoting import one_line
from rmt_lightning.core.tokens import encode
from rmt_lightning.tasks.facts import Split
from rmt_lightning.tasks.noise import PIECE, SPLITS, Noise, counted, fingerprint_of, spaced

log = logging.getLogger(__name__)

# Where a word begins, in every script (Unicode, annex 29): in those without spaces, each character.
_WORD = regex.compile(r"(?w)\b(?=\w)")
_CHECKSUMS = "checksums.json"
# What people should know of the text, told by each run that reads it.
_REMARKS = "remarks.json"


class OnDisk:
    """A one-dimensional array in a file, of which nothing is read but what is asked for.

    It is no memory map: if somebody shortens the file, that ends in an error, not in the death of the process.

    Args:
        path: an npy file.
        limit: what all its values are below.
    """

    def __init__(self, path: Path, limit: int) -> None:
        header = np.load(path, mmap_mode="r")
        self.path, self.limit, self.dtype = path, limit, header.dtype
        self._offset, self._length = header.offset, len(header)
        self._file = path.open("rb")

    def __reduce__(self) -> tuple[type[OnDisk], tuple[Path, int]]:
        return OnDisk, (self.path, self.limit)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, span: slice) -> np.ndarray:
        """The values of a slice, which cannot be written.

        Raises:
            UserError: if the file is not what it was.
        """
        start, stop, _ = span.indices(len(self))
        size = max(0, stop - start) * self.dtype.itemsize
        content = os.pread(self._file.fileno(), size, self._offset + start * self.dtype.itemsize)
        values = np.frombuffer(content, self.dtype) if len(content) == size else None
        if values is None or values.max(initial=0) >= self.limit:
            raise UserError(f"{self.path}: was damaged while it was in use; go on with resume=, and it is built anew")
        return values


@dataclass(frozen=True)
class Corpus:
    """Tokenized sentences of one split. What is as long as the text stays on the disk.

    Attributes:
        tokens: (N,) token ids of all documents, one after the other, without special tokens.
        words: (N,) 1 where a word begins, or a character of text without spaces.
        sentence_starts: (K + 1,) positions in `tokens` at which a sentence begins, and N.
        document_starts: (D + 1,) indices into `sentence_starts` at which a document begins, and K.
        document_bytes: (D,) lengths of the documents in UTF-8.
    """

    tokens: OnDisk
    words: OnDisk
    sentence_starts: np.ndarray
    document_starts: np.ndarray
    document_bytes: np.ndarray

    @classmethod
    def open(cls, folder: Path, vocabulary_size: int) -> Corpus:
        whole = (np.load(folder / f"{name}.npy") for name in ("sentence_starts", "document_starts", "document_bytes"))
        return cls(OnDisk(folder / "tokens.npy", vocabulary_size), OnDisk(folder / "words.npy", 2), *whole)

    @property
    def num_documents(self) -> int:
        return len(self.document_starts) - 1

    def segments_without_border(self, length: int) -> tuple[int, int]:
        """How many of the segments of so many tokens hold no border between sentences, and how many there are."""
        segments = -(-len(self.tokens) // length)
        return segments - len(np.unique(self.sentence_starts[:-1] // length)), segments


def tokenize(
    noise: Noise, tokenizer: PreTrainedTokenizerBase, cache_dir: str | Path | None = None
) -> dict[Split, Corpus]:
    """Tokenize all splits of `noise`, or open what an earlier run has left in `cache_dir`.

    That is the folder RMT_LIGHTNING_CACHE if none is given, or ~/.cache/rmt_lightning.

    The cache is keyed by the content of the noise and of the tokenizer. It appears under its name only when it is
    complete, and several processes may ask for it at once: one builds, the others wait. Its checksums are compared each
    time, which takes about half a second per GB, and what does not match is built again. A cache that cannot be used
    is said, and a temporary folder stands in for it until the process ends.

    Raises:
        UserError: if a split holds no text, or the tokenizer does not know it.
    """
    if cache_dir is None:
        cache_dir = os.environ.get("RMT_LIGHTNING_CACHE", "~/.cache/rmt_lightning")
    key = hashlib.sha256(f"{fingerprint_of(noise)}|{_tokenizer_fingerprint(tokenizer)}|v6".encode()).hexdigest()[:32]
    size = len(tokenizer)
    with ExitStack() as held:
        try:
            folder = Path(cache_dir).expanduser() / "noise" / key
            if corpora := _open(folder, size):
                return _told(folder, corpora)
            held.enter_context(_locked(folder))
            if corpora := _open(folder, size):
                return _told(folder, corpora)
            partial = _emptied(folder)
        except (OSError, RuntimeError) as error:  # RuntimeError: where home is, or how to lock a file there, is unknown
            reason = getattr(error, "strerror", None) or error
            log.warning("cache_dir=%s: cannot be used (%s); tokenizing into a temporary folder", cache_dir, reason)
            folder = _temporary_folder() / key
            partial = _emptied(folder)
        try:
            known = {
                split: _write(split, counted(noise.documents(split), split), tokenizer, partial / split)
                for split in SPLITS
            }
            remarks = [*getattr(noise, "remarks", ()), *_partly_known(known)]
            (partial / _REMARKS).write_text(json.dumps(remarks))
            (partial / _CHECKSUMS).write_text(json.dumps(_checksums(partial)))
            os.rename(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return _told(folder, {split: Corpus.open(folder / split, size) for split in SPLITS})


def _told(folder: Path, corpora: dict[Split, Corpus]) -> dict[Split, Corpus]:
    """Say what people should know of a text that is about to be used. Earlier versions did not keep it."""
    with suppress(OSError, ValueError, TypeError, AttributeError, RecursionError):
        for remark in json.loads((folder / _REMARKS).read_text(encoding="utf-8")):
            log.info("%s", one_line(remark))
    return corpora


def _open(folder: Path, vocabulary_size: int) -> dict[Split, Corpus] | None:
    """What an entry of the cache holds, if it is there and whole.

    Raises:
        PermissionError: if it is somebody else's alone.
    """
    try:
        if not all(path.is_file() or path.is_dir() for path in folder.rglob("*")):
            # Reading a pipe or a device has no end.
            return None
        if json.loads((folder / _CHECKSUMS).read_text(encoding="utf-8")) != _checksums(folder):
            return None
        corpora: dict[Split, Corpus] = {split: Corpus.open(folder / split, vocabulary_size) for split in SPLITS}
        return corpora if all(_is_whole(folder / split, corpora[split]) for split in SPLITS) else None
    except PermissionError:
        raise
    except Exception:  # whatever numpy makes of what is no array
        return None


def _is_whole(folder: Path, corpus: Corpus) -> bool:
    """Whether the parts of a corpus belong together: checksums tell only that they are what somebody has written."""
    tokens, words = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("tokens", "words"))
    starts = (corpus.sentence_starts, len(tokens)), (corpus.document_starts, len(corpus.sentence_starts) - 1)
    return (
        tokens.ndim == 1
        and tokens.dtype.kind in "iu"
        and 0 <= tokens.min() <= tokens.max() < corpus.tokens.limit
        and words.shape == tokens.shape
        and corpus.document_bytes.shape == (corpus.num_documents,)
        and all(x.dtype == np.int64 and x[0] == 0 and x[-1] == end and (np.diff(x) > 0).all() for x, end in starts)
    )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep an entry of the cache to this process, and clear away what killed processes have begun."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Where cache_dir is a folder of the user's own, other things may stand in its noise/.
    for begun in folder.parent.glob("[0-9a-f]" * len(folder.name) + "-*"):
        with suppress(Timeout), FileLock(folder.with_name(f"{begun.name.partition('-')[0]}.lock"), timeout=0):
            removed(begun)
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        yield


def _emptied(folder: Path) -> Path:
    """Clear the place of an entry of the cache, and make the folder in which it is built."""
    if os.path.lexists(folder):
        log.warning("%s is damaged; tokenizing again", folder)
        # Whatever it is; and that it cannot be removed is told.
        shutil.rmtree(folder) if folder.is_dir() and not folder.is_symlink() else folder.unlink()
    partial = removed(folder.with_name(f"{folder.name}-partial"))
    partial.mkdir()
    return partial


def _temporary_folder() -> Path:
    try:
        folder = Path(tempfile.mkdtemp(prefix="rmt_lightning-"))
    except OSError as error:
        raise UserError(f"cache_dir: no temporary folder either ({error}); give one that can be written") from None
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def text_digest(corpora: Mapping[Split, Corpus]) -> str:
    """What names the text itself, as it is read: its tokens, and where sentences and documents begin in each split."""
    content = hashlib.sha256()
    for split in SPLITS:
        for part in (corpora[split].tokens, corpora[split].sentence_starts, corpora[split].document_starts):
            content.update(f"{split} {len(part)} {part.dtype}".encode())
            for start in range(0, len(part), 2**20):
                content.update(part[start : start + 2**20].tobytes())
    return content.hexdigest()


def _checksums(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): digest(file).hex() for file in sorted(folder.rglob("*.npy"))}


def _tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return hashlib.sha256(backend.to_str().encode()).hexdigest()
    return hashlib.sha256(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode()).hexdigest()


def _write(split: Split, documents: Iterable[list[str]], tokenizer: PreTrainedTokenizerBase, folder: Path) -> float:
    """Tokenize the documents of a split into a new folder. Returns which share of the characters is known.

    Raises:
        UserError: if there are none, or the tokenizer does not know what is written there.
    """
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.int32
    tokens: list[np.ndarray] = []
    words: list[np.ndarray] = []
    sentence_lengths: list[int] = []
    document_lengths: list[int] = []
    document_bytes: list[int] = []
    known = characters = 0
    for document in documents:
        texts = spaced(document)
        characters += sum(len(text) - text.count(" ") for text in texts)
        before = len(sentence_lengths)
        for text, (ids, places) in zip(texts, encode(tokenizer, texts), strict=True):
            known += sum(
                end - start for token, (start, end) in zip(ids, places, strict=True) if token != tokenizer.unk_token_id
            )
            if ids:
                tokens.append(np.array(ids, dtype))
                words.append(_word_starts(text, places))
                sentence_lengths.append(len(ids))
        if len(sentence_lengths) > before:
            document_lengths.append(len(sentence_lengths) - before)
            document_bytes.append(len("".join(texts).strip().encode()))
    if characters == 0:
        raise UserError(f"noise: no document is left for {split}; give more text")
    _check_known(tokenizer, split, known / characters)
    folder.mkdir()
    _save(folder / "tokens.npy", np.concatenate(tokens))
    _save(folder / "words.npy", np.concatenate(words))
    _save(folder / "sentence_starts.npy", np.cumsum([0, *sentence_lengths], dtype=np.int64))
    _save(folder / "document_starts.npy", np.cumsum([0, *document_lengths], dtype=np.int64))
    _save(folder / "document_bytes.npy", np.array(document_bytes, np.int64))
    return known / characters


def _word_starts(text: str, places: list[tuple[int, int]]) -> np.ndarray:
    """1 for each token, by its place in the text, with which a word begins; in text without spaces, a character."""
    words = {word.start() for word in _WORD.finditer(text)}
    starts = np.zeros(len(places), np.uint8)
    before = 0
    for token, (start, end) in enumerate(places):
        # The space before a word may be a part of its token; several tokens may share a character.
        first = start + (start < end and text[start].isspace())
        if first in words and start >= before:
            starts[token] = 1
            words.remove(first)
        before = end
    return starts


def _check_known(tokenizer: PreTrainedTokenizerBase, split: Split, known: float) -> None:
    if known < 0.5:
        raise UserError(
            f"backbone: its tokenizer ({tokenizer.name_or_path or type(tokenizer).__name__}) knows {known:.0%} of the "
            f"characters of the noise ({split}); choose a backbone that knows its language, and see that its "
            "tokenizer's files stand beside its weights"
        )


def _partly_known(known: Mapping[Split, float]) -> Iterator[str]:
    for split, share in known.items():
        if share < 0.95:
            yield f"noise: the tokenizer knows {share:.0%} of the characters of {split} only"


def _save(path: Path, array: np.ndarray) -> None:
    # np.save does not tell that the disk is full.
    try:
        with path.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
            file.write(array.data)
    except OSError as error:
        error.filename = str(path)
        raise


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
        self._position, end = map(int, corpus.sentence_starts[sentence : sentence + 2])
        if end - self._position > PIECE:
            # Text without stops: start anywhere in it.
            self._position = int(rng.integers(self._position, end))
        self._end = self._start_of(self._document + 1)

    def _start_of(self, document: int) -> int:
        return int(self._corpus.sentence_starts[self._corpus.document_starts[document]])

    def _open_next_document(self) -> None:
        if not self._to_come:
            self._to_come = [int(d) for d in self._rng.permutation(self._corpus.num_documents) if d != self._document]
        self._document = self._to_come.pop() if self._to_come else self._document
        self._position = self._start_of(self._document)
        self._end = self._start_of(self._document + 1)

    def passage(self, length: int, segment: int) -> tuple[list[slice], np.ndarray]:
        """Where in the corpus the next `length` tokens stand, and the offsets in them at which something may be set in.

        That is where a sentence begins or ends. A passage that lies inside a sentence is left out, with the rest of it,
        for the one that begins after it. But one of more than two segments may be broken between any two of its words,
        and so may all that are longer than the passage, where sentences have almost the length of a segment on average.
        """
        average = len(self._corpus.tokens) / (len(self._corpus.sentence_starts) - 1)
        longest = length if average > 0.9 * segment else 2 * segment
        spans = self.spans(length)
        gaps = self._gaps(spans)
        if len(gaps) == 0 and self._sentence_length(spans) <= longest:
            starts = self._corpus.sentence_starts
            self._position = int(starts[np.searchsorted(starts, self._position)])
            spans = self.spans(length)
            gaps = self._gaps(spans)
        if not gaps.any() and length and self._sentence_length(spans) > longest:
            words = np.flatnonzero(np.concatenate([self._corpus.words[span] for span in spans]))
            gaps = words if words.any() else np.arange(length)
        return spans, gaps

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

    def _gaps(self, spans: list[slice]) -> np.ndarray:
        """The offsets in `tokens(spans)` at which a sentence begins or ends, in order; both ends count."""
        starts = self._corpus.sentence_starts
        gaps: list[int] = []
        offset = 0
        for span in spans:
            first, last = np.searchsorted(starts, (span.start, span.stop + 1))
            gaps += [int(start) - span.start + offset for start in starts[first:last]]
            offset += span.stop - span.start
        return np.unique(gaps) if spans else np.zeros(1, np.int64)

    def _sentence_length(self, spans: list[slice]) -> int:
        """How long the sentence is in which some spans begin."""
        starts = self._corpus.sentence_starts
        after = np.searchsorted(starts, spans[0].start, side="right")
        return int(starts[after] - starts[after - 1])
