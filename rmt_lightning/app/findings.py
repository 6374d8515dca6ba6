"""What evaluations have found out about a checkpoint, as it stands in a folder of evaluations/."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

from rmt_lightning.analysis.extrapolation import LengthResult
from rmt_lightning.app.results import leaderboard, leaderboard_table, probe_table, rate_in_words
from rmt_lightning.core.errors import UserError
from rmt_lightning.core.files import write_atomically, write_csv, write_jsonl
from rmt_lightning.core.quoting import shown
from rmt_lightning.core.run_folder import EVALUATION, PREDICTIONS, PROBES, alone_in
from rmt_lightning.tasks.placement import Key
from rmt_lightning.tasks.published import Part

_SET, _LEADERBOARD = "set.csv", "leaderboard.csv"
_FILES = (
    EVALUATION, "distances.csv", "retention.csv", PROBES, _SET, _LEADERBOARD, PREDICTIONS, "evaluation.json",
)  # fmt: skip
# What earlier versions did not tell of a length.
_UNKNOWN = ("questions", "fits", "tokens")


class Findings:
    """What has been found with the same settings, by this evaluation and by those before it and beside it.

    evaluation.json holds all of it, and each table is made of that.

    Args:
        folder: where it is written.
        settings: all that it depends on and that is in no key.

    Attributes:
        lengths: a row for each number of segments, in their order, then for each "<number> tokens".
        retention: a row for each way in which memories were followed: "<segments> every <segments> of <memories>".
        probes: a row for each "<segments> <probe>", in the order of lengths.
        parts: a row for each "<task> <length>" of a published set.

    Raises:
        UserError: if the folder cannot be written to, or what stands there is damaged.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.path = folder / "evaluation.json"
        self.settings = settings
        self.lengths: dict[str, dict[str, Any]] = {}
        self.retention: dict[str, dict[str, Any]] = {}
        self.probes: dict[str, dict[str, Any]] = {}
        self.parts: dict[str, dict[str, Any]] = {}
        # An evaluation that was killed may have left the file without its tables.
        with alone_in(folder):
            if self.read().lengths or self.retention or self.probes or self.parts:
                self._write()

    def add(self, kind: Literal["lengths", "retention", "probes", "parts"], key: str, row: dict[str, Any]) -> None:
        """Add a row to what others may have found in the meantime."""
        with self._alone():
            getattr(self.read(), kind)[key] = row
            self._write()

    def predict(self, length: str, rows: list[dict[str, Any]]) -> None:
        """Add the answers that were given at a length to those at others."""
        path = self.path.with_name(PREDICTIONS)
        with self._alone():
            try:
                # A question may hold what some take for the end of a line.
                lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n") if path.exists() else []
                others = [row for row in map(json.loads, lines) if row["length"] != length]
            except (ValueError, TypeError, KeyError):
                raise UserError(f"{shown(path)}: is damaged; remove it, and go on without its answers") from None
            write_jsonl(path, [*others, *rows])

    def _alone(self) -> AbstractContextManager[None]:
        if not (folder := self.path.parent).is_dir():
            raise UserError(f"{shown(folder)}: was removed or renamed in the meantime; start it again")
        return alone_in(folder)

    @property
    def files(self) -> str:
        """Those that there are, in words."""
        return ", ".join(name for name in _FILES if self.path.with_name(name).exists())

    def read(self) -> Findings:
        """Take in what others have found in the meantime."""
        try:
            found = json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else {}
            # Earlier versions left the memories out of the key, and did not count different questions.
            unknown = {"questions": None}
            self.retention = {
                key if " of " in key else f"{key} of {row['streams']}": unknown | row
                for key, row in found.get("retention", {}).items()
            }
            rows = found.get("lengths", {}).items()
            self.lengths = {key: row | {k: None for k in _UNKNOWN if k not in row} for key, row in rows}
            self.probes = {key: dict(row) for key, row in found.get("probes", {}).items()}
            self.parts = {key: dict(row) for key, row in found.get("parts", {}).items()}
            # Whether all can be made of it that is.
            self._sort()
            _ = self._tables(), [one.row() for one in self.results().values()]
            _ = self.probes and probe_table([*self.probes.values()])
            _ = self.parts and leaderboard_table([*self.parts.values()])
            _ = [rate_in_words(row) for row in self.retention.values()]
        except (ValueError, ArithmeticError, AttributeError, TypeError, KeyError, RecursionError, IsADirectoryError):
            raise UserError(f"{shown(self.path)}: is damaged; remove it, and it is found out again") from None
        return self

    def results(self) -> dict[Key, LengthResult]:
        """Those at all lengths."""
        counts = ("right", "samples", "segments", "questions", "fits", "tokens", "text_tokens")
        return {
            Key(row["segments"] if row["tokens"] is None else 0, 0, tokens=row["tokens"]): LengthResult(
                **{key: row[key] for key in counts},
                finite=row.get("finite", False), exact=row.get("exact_match"), f1=row.get("f1"),
                pairs=row.get("pairs"), capacity=row.get("capacity"),
            )
            for row in self.lengths.values()
        }  # fmt: skip

    def _sort(self) -> None:
        order = {key: ("tokens" in key, int(key.split()[0])) for key in self.lengths}
        self.lengths = {key: self.lengths[key] for key in sorted(self.lengths, key=order.__getitem__)}
        self.probes = dict(sorted(self.probes.items(), key=lambda item: int(item[0].split()[0])))
        parts = {Part(row["task"], row["length"]): key for key, row in self.parts.items()}
        self.parts = {parts[part]: self.parts[parts[part]] for part in sorted(parts, key=lambda part: part.order)}

    def _write(self) -> None:
        self._sort()
        found = {"lengths": self.lengths, "retention": self.retention, "probes": self.probes, "parts": self.parts}
        content = {"settings": self.settings, **found}
        write_atomically(self.path, json.dumps(content, indent=2).encode())
        for name, rows in self._tables().items():
            # Another version may have measured less.
            columns = dict.fromkeys(column for row in rows for column in row)
            write_csv(self.path.with_name(name), [columns | row for row in rows])

    def _tables(self) -> dict[str, list[dict[str, Any]]]:
        lengths = [(int(key.split()[0]), row) for key, row in self.lengths.items()]
        columns = [{k: v for k, v in row.items() if k not in ("distances", "finite")} for _, row in lengths]
        return {
            "retention.csv": [
                dict(zip(("follow", "every"), key.split()[::2], strict=False))
                | {"streams": row["streams"], "questions": row["questions"], "age": age, "right": right}
                for key, row in self.retention.items()
                for age, right in row["right"].items()
            ],
            EVALUATION: columns,
            "distances.csv": [
                {"segments": row["segments"], "tokens": row["tokens"]}
                | {"from": 2 ** int(key) // 2, "to": 2 ** int(key) - 1, **part}
                for _, row in lengths
                for key, part in row["distances"].items()
            ],
            PROBES: [*self.probes.values()],
            _SET: [{k: v for k, v in row.items() if k != "files"} for row in self.parts.values()],
            _LEADERBOARD: leaderboard(self.settings.get("model_name", ""), [*self.parts.values()]),
        }
