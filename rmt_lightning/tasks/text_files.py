"""Text in files: which files a setting names, and the texts or the rows in them.

They are read here and not by a library that keeps copies, takes names for patterns or guesses types.
"""

from __future__ import annotations

import codecs
import glob
import json
import logging
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rmt_lightning.core.errors import UserError
from rmt_lightning.core.files import check_readable, digest

log = logging.getLogger(__name__)

# No text holds a zero or half of a surrogate pair.
NO_TEXT = re.compile("[\0\ud800-\udfff]")

# How the names of files end that hold texts, and of those that hold rows of several columns.
TEXTS = (".txt", ".jsonl", ".parquet")
ROWS = (".json", ".jsonl", ".parquet")


class TextFiles:
    """The files of one kind that a setting names.

    Args:
        key: the setting.
        given: a file, a folder, which stands for all files in it and below, or a pattern. What exists is no pattern.
        kinds: how the names of the files may end.
        there: which files it stands for, if that is known.
        mixed: whether they may be of several kinds.

    Raises:
        UserError: if there is no such file.
    """

    def __init__(
        self,
        key: str,
        given: str,
        kinds: Collection[str] = TEXTS,
        there: Sequence[Path] | None = None,
        mixed: bool = False,
    ) -> None:
        self.given = given
        self.setting = f"{key}={given}"
        found = self._names() if there is None else there
        names = sorted({Path(name) for name in found if not os.path.isdir(name)})
        self.files = [name for name in names if _kind(name) in kinds]
        told = ", ".join(kinds)
        if not self.files:
            what = f"no {told} file there" if names != [Path(given)] else f"is no {told} file"
            raise UserError(f"{self.setting}: {what}; give a file, a folder or a pattern")
        if absent := [file for file in self.files if not os.path.isfile(file)]:
            raise UserError(f"{self._at(absent[0])} is a link to nothing or no plain file; give another, or remove it")
        if len({_kind(file) for file in self.files}) > 1 and not mixed:
            choice = f"{given}/*{self.files[0].suffix}"
            raise UserError(f"{self.setting}: holds several kinds of files; choose one, such as '{choice}'")
        if others := [name for name in names if _kind(name) not in kinds]:
            log.info("%s: leaves out what is no %s file (%d, such as %s)", self.setting, told, len(others), others[0])

    @property
    def have_rows(self) -> bool:
        """Whether they hold rows of columns, one of which is the text."""
        return _kind(self.files[0]) != ".txt"

    def digests(self) -> list[bytes]:
        """What names the content of each file, at about a second for 2 GB.

        The time of its last change would be known at once, but rsync, cp -p and git keep it where content has changed.

        Raises:
            UserError: if one cannot be read.
        """
        try:
            with ThreadPoolExecutor() as pool:
                return list(pool.map(digest, self.files))
        except OSError as error:
            raise UserError(f"{self.setting}: {error.filename} cannot be read ({error.strerror})") from None

    def texts(self, field: str) -> Iterator[str]:
        """The texts of all files, in order: a txt file is one, and so is a row of the others.

        Those that are blank or missing are left out, and their number is told.

        Args:
            field: the column that holds the text of rows.

        Raises:
            UserError: naming file and place, if something cannot be read or is no text; or if there is none.
        """
        number = blank = 0
        for file in self.files:
            for text in self._read(file, field):
                number += 1
                if text and not text.isspace():
                    yield text
                else:
                    blank += 1
        if blank == number:
            raise UserError(f"{self.setting}: is empty; give text")
        if blank:
            log.info("%s: leaves out %d of %d documents, which hold no text", self.setting, blank, number)

    def rows(self, fields: Sequence[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """The rows of all files, in order, each with what a message about it begins with.

        Args:
            fields: the columns that are wanted, if there are such; of jsonl files all of them come.

        Raises:
            UserError: naming file and place, if something cannot be read.
        """
        for file in self.files:
            yield from ((self._at(file, place), row) for place, row in self._rows(file, fields))

    def _names(self) -> Iterator[str]:
        path = os.path.expanduser(self.given)
        if os.path.isdir(path):
            yield from self._below(path)
        elif os.path.lexists(path):
            yield path
        else:
            # Folders that exist are no patterns either.
            base = next((folder for folder in Path(path).parents if os.path.isdir(folder)), Path())
            pattern = str(Path(path).relative_to(base))
            yield from (os.path.join(base, name) for name in glob.glob(pattern, root_dir=base, recursive=True))

    def _below(self, folder: str) -> Iterator[str]:
        """All that stands in a folder and those below; links to folders are followed, each folder is read once."""
        seen = set()
        for place, folders, names in os.walk(folder, onerror=self._unreadable, followlinks=True):
            if os.path.realpath(place) in seen:
                folders.clear()
                continue
            seen.add(os.path.realpath(place))
            yield from (os.path.join(place, name) for name in names)

    def _unreadable(self, error: OSError) -> None:
        raise UserError(f"{self.setting}: {error.filename} cannot be read ({error.strerror})")

    def _read(self, file: Path, field: str) -> Iterator[str | None]:
        known, columns = False, dict[str, None]()
        for place, row in self._rows(file, [field]):
            known |= field in row
            columns |= dict.fromkeys(row)
            text = row.get(field)
            if not isinstance(text, str | None):
                kind = type(text).__name__
                raise UserError(f"noise.field={field}: is {kind}, not text, in {file}, {place}; choose another")
            if bad := NO_TEXT.search(text or ""):
                raise UserError(f"{self._at(file, place)} holds {bad[0]!a}: binary data, not text; give text")
            yield text
        if columns and not known:
            raise UserError(f"noise.field={field}: {file} has no such column; it has {', '.join(columns)}")

    def _rows(self, file: Path, fields: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
        check_readable(file)
        try:
            yield from _READERS[_kind(file)](file, fields)
        except Exception as error:  # each library has classes of its own for each kind of damage
            reason = (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split())[:200]
            raise UserError(f"{self._at(file)} is not {_kind(file)} text ({reason})") from None

    def _at(self, file: Path, place: str = "") -> str:
        """The beginning of a message about a file, which is named unless it is what has been given."""
        name = "" if str(file) == self.given else str(file)
        return " ".join(part for part in (f"{self.setting}:", name, place) if part)


# The rows of a file, each with the place where it stands.


def _txt(file: Path, fields: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    yield "", dict.fromkeys(fields, _decoded(file.read_bytes()))


def _jsonl(file: Path, fields: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            # An array may hold the rows, over several lines.
            whole = number == 1 and line.removeprefix(codecs.BOM_UTF8).startswith(b"[")
            text = _decoded(line + lines.read() if whole else line, number)
            if not text.strip():
                continue
            try:
                content = json.loads(text)
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number + error.lineno - 1}: {error.msg}") from None
            several = isinstance(content, list)
            for place, row in enumerate(content if several else [content], start=1):
                if not isinstance(row, dict):
                    raise ValueError(f"line {number}: holds {type(row).__name__}, and no object")
                yield f"row {place}" if several else f"line {number}", row


def _decoded(content: bytes, first: int = 1) -> str:
    """What stands from line `first` of a file on.

    Raises:
        ValueError: naming the first line that is no UTF-8. In UTF-16 each letter of English has a zero.
    """
    try:
        text = content.decode("utf-8-sig")
        place = text.find("\0")
    except UnicodeDecodeError as error:
        text, place = content[: error.start].decode(errors="replace"), error.start
    if place >= 0:
        line = first + text.count("\n", 0, place)
        raise ValueError(f"line {line} is not UTF-8; save it as UTF-8, if it is text")
    return text


def _parquet(file: Path, fields: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    # It takes half a second to import.
    from pyarrow.parquet import ParquetFile

    with ParquetFile(file) as content:
        names = content.schema_arrow.names
        if not (columns := [name for name in fields if name in names]):
            yield "", dict.fromkeys(names)
            return
        # A row may be as long as a book.
        batches = content.iter_batches(batch_size=100, columns=columns)
        rows = (row for batch in batches for row in batch.to_pylist())
        for number, row in enumerate(rows, start=1):
            yield f"row {number}", row


_READERS = {".txt": _txt, ".jsonl": _jsonl, ".json": _jsonl, ".parquet": _parquet}


def _kind(file: Path) -> str:
    return file.suffix.lower()
