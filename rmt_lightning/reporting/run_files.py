"""Tables, json files and pictures of a run folder. What cannot be read is named, never fatal."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from functools import lru_cache
from io import StringIO
from itertools import chain, repeat
from math import isfinite, isnan, nan
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import TypeAdapter

from rmt_lightning.core.errors import UserError
from rmt_lightning.reporting.redaction import public_text
from rmt_lightning.reporting.runs import Row

Content = TypeVar("Content")


def read_table(path: Path, problems: list[str]) -> tuple[list[str], list[dict[str, str]]]:
    """The columns and rows of a csv file; without a file, or if it is no table, there are none."""
    try:
        text = path.read_text(encoding="utf-8")
        # Its last line is half written, or still being written, if it does not end.
        whole = text[: text.rfind("\n") + 1]
        reader = csv.reader(StringIO(whole))
        columns = next(reader)
        # A row with more cells than there are columns loses those; what a row lacks is empty.
        rows = [dict(zip(columns, chain(row, repeat("")), strict=False)) for row in reader if row]
    except FileNotFoundError:
        return [], []
    except (OSError, ValueError, csv.Error, StopIteration) as error:
        problems.append(f"{path}: {reason(error)}")
        return [], []
    if whole != text:
        problems.append(f"{path}: is incomplete; {len(rows)} rows could be read")
    return columns, rows


def read_numbers(path: Path, problems: list[str], *choices: Sequence[str]) -> list[Row]:
    """The rows of a csv file that hold a number in all columns of one of `choices`; what is none elsewhere is NaN."""
    return [numbers for _, numbers in read_good_rows(path, problems, *choices)]


def read_good_rows(path: Path, problems: list[str], *choices: Sequence[str]) -> list[tuple[dict[str, str], Row]]:
    """The same, each as it stands there and as numbers."""
    columns, table = read_table(path, problems)
    needed = next((some for some in choices if some[0] in columns), choices[0])
    if missing := [name for name in needed if name not in columns]:
        if columns:
            problems.append(f"{path}: has no column {missing[0]}")
        return []
    rows = [(row, {name: _number(cell) for name, cell in row.items()}) for row in table]
    good = [
        (row, numbers) for row, numbers in rows
        if not any(isnan(numbers[name]) for name in needed)
        and all(numbers.get(name, 1) >= 1 for name in ("segments", "samples"))
    ]  # fmt: skip
    if len(good) < len(table):
        problems.append(f"{path}: is incomplete; {len(good)} rows could be read")
    return good


def _number(cell: str) -> float:
    """A cell as a number, NaN if it is none; a loss that is infinite has no place in a plot."""
    if not cell:
        # Most cells of what is logged.
        return nan
    try:
        number = _TRUTHS[cell] if cell in _TRUTHS else float(cell)
    except ValueError:
        return nan
    return number if isfinite(number) else nan


_TRUTHS = {"True": 1.0, "False": 0.0}


def read_rows(path: Path, problems: list[str], *choices: Sequence[str]) -> list[Row]:
    """The same without what is no number."""
    rows = read_numbers(path, problems, *choices)
    return [{name: value for name, value in row.items() if not isnan(value)} for row in rows]


def read_json(path: Path, kind: type[Content], problems: list[str]) -> Content | None:
    """What a json file holds; None without it, or if it is of another kind."""
    try:
        content: Content = _adapter(cast(Any, kind)).validate_json(path.read_bytes())
        return content
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        problems.append(f"{path}: {reason(error)}")
        return None


# Making one takes longer than reading a file.
@lru_cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def read_pictures(folder: Path, problems: list[str]) -> Iterator[tuple[str, bytes]]:
    for path in sorted(folder.rglob("*.png")):
        name = str(path.relative_to(folder).with_suffix(""))
        try:
            content = path.read_bytes()
        except OSError as error:
            problems.append(f"{path}: {reason(error)}")
            continue
        if content.startswith(b"\x89PNG\r\n"):
            yield public_text(name), content
        else:
            problems.append(f"{path}: is no picture")


def reason(error: Exception) -> str:
    """Why something could not be read, in a few words."""
    if isinstance(error, FileNotFoundError):
        return f"{Path(error.filename).name} is missing"
    if isinstance(error, NotADirectoryError):
        return "is not a folder"
    if isinstance(error, OSError):
        return (error.strerror or type(error).__name__).lower()
    return str(error) if isinstance(error, UserError) else "is damaged"
