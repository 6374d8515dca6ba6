"""How files are written and read: whole or not at all, and where they are said to stand; what names their content."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rmt_lightning.core.errors import UserError
from rmt_lightning.core.quoting import shown


def own_file(path: Path) -> Path:
    """Make sure that what is written to a path goes into a file right there, if a folder came from elsewhere.

    A link, a second name of another file, or a pipe is removed. Returns the path.

    Raises:
        UserError: if it is a folder.
    """
    with suppress(FileNotFoundError):
        found = path.lstat()
        if stat.S_ISDIR(found.st_mode):
            raise UserError(f"{shown(path)}: is a folder, where a file belongs; remove it")
        if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
            path.unlink()
    return path


def removed(path: Path) -> Path:
    """Remove whatever stands at a path; of a link, not what it leads to. Returns the path."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)
    return path


def beside(path: Path) -> Path:
    """A new name beside a path, for what is moved there once it is whole; no other process comes to the same one."""
    return path.with_name(f".{path.name:.40}.{secrets.token_hex(4)}.partial")


def forget_unfinished(folder: Path) -> None:
    """Remove the files that killed processes have begun in a folder, to which nobody else may be writing."""
    for path in folder.glob("*.partial"):
        if path.is_symlink() or not path.is_dir():
            path.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Write a file beside its place and move it there once it is on the disk.

    So nobody ever reads half a file, and what stood there before survives a kill or a full disk. Of several processes
    that write it at once, each writes it whole.

    Raises:
        OSError: that names the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = beside(path)
    try:
        with open(partial, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        # A write that fails does not say where, and the name beside is none of the user's.
        error.filename = str(path)
        raise
    finally:
        partial.unlink(missing_ok=True)


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows of equal keys, whole or not at all; no rows, no file."""
    if not rows:
        return
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue().encode())


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a line of JSON for each row, whole or not at all."""
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomically(path, "".join(lines).encode())


def append_csv(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Append rows to a csv file that has these columns, all of them or none; what a row lacks is left empty.

    Only a kill may leave a line without its end. A file that somebody has removed begins anew.

    Raises:
        OSError: that names the file.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    # Without a buffer, which would be written once more when the file is closed.
    with path.open("ab", buffering=0) as file:
        if not (end := file.tell()):
            writer.writeheader()
        writer.writerows(rows)
        content = text.getvalue().encode()
        try:
            while content:
                content = content[file.write(content) :]
        except OSError as error:
            os.truncate(path, end)
            error.filename = str(path)
            raise


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a csv file."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def check_readable(*paths: Path) -> None:
    """Raise a UserError that names the first path that is there and may not be read, which others take for missing."""
    for path in paths:
        if path.exists() and not os.access(path, os.R_OK | os.X_OK if path.is_dir() else os.R_OK):
            raise UserError(f"{shown(path)}: cannot be read (Permission denied); ask whose it is for that")


def digest(path: Path) -> bytes:
    """The SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
