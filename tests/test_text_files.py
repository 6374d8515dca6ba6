"""Which files a setting names, and what is told of those that are of no use."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from rmt_lightning.core.errors import UserError
from rmt_lightning.tasks.text_files import TextFiles


def read(given: object, field: str = "text") -> list[str]:
    return list(TextFiles("noise.path", str(given)).texts(field))


# Names that mean something to patterns, to fsspec, to shells and to Hydra.
NAMES = [
    "story 1", "story [1]", "story [1][2]", "a[!b]", "[", "a*", "a*b", "what?", "{a,b}", "a::b", "a:b", "a#b", "a%20b",
    "a,b", "a=b", "$HOME", "${x}", "-x", "книга", "本", "a\\b", "a'b", "a\nb", ".hidden", "~", "train", "x" * 240,
]  # fmt: skip


@pytest.mark.fault("file names hold brackets, stars, colons …", "each file is read, once, and no other")
def test_every_name_is_the_name_of_a_file(tmp_path: Path) -> None:
    for name in NAMES:
        (tmp_path / f"{name}.txt").write_text(name)
    assert sorted(read(tmp_path)) == sorted(NAMES)
    for name in NAMES:
        assert read(tmp_path / f"{name}.txt") == [name]


@pytest.mark.parametrize("folder", ["plain", "book [1]", "a*", "x.txt", "a::b", "what?", "日本"])
def test_folders_and_patterns_below_them(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "book 1").mkdir()
    (tmp_path / "book 1" / "1.txt").write_text("Another.")
    place = tmp_path / folder
    (place / "deep.txt").mkdir(parents=True)
    for name in ("1.txt", "2.TXT", "deep.txt/3.txt"):
        (place / name).write_text(name)
    (place / "notes.md").write_text("Not this.")
    assert read(place) == ["1.txt", "2.TXT", "deep.txt/3.txt"]
    assert read(place / "*.txt") == ["1.txt"]
    assert read(place / "**/*.txt") == ["1.txt", "deep.txt/3.txt"]
    assert read(place / "[12].*") == ["1.txt", "2.TXT"]
    monkeypatch.chdir(tmp_path)
    assert read(f"{folder}/?.txt") == ["1.txt"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read(f"~/{folder}/?.txt") == ["1.txt"]


def test_links(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "1.txt").write_text("One.")
    (tmp_path / "a" / "to b").symlink_to(tmp_path / "b")
    (tmp_path / "a" / "round").symlink_to(tmp_path / "a")
    assert read(tmp_path / "a") == ["One."]
    (tmp_path / "a" / "x[1].txt").symlink_to(tmp_path / "nothing")
    for given in (tmp_path / "a", tmp_path / "a" / "x[1].txt", tmp_path / "a" / "*.txt"):
        with pytest.raises(UserError, match=r"noise\.path=.*x\[1\]\.txt.* is a link to nothing or no plain file"):
            read(given)


def test_rows(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"text": "One."},
        {"text": None},
        {"id": 3},
        {"text": " \n"},
        {"text": "Zwei \u2028.", "id": []},
    ]
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    for content in (
        "\n".join(lines),
        "\ufeff" + "\r\n\n".join(lines) + "\n\n",
        f"[{','.join(lines)}]",
        json.dumps(rows, indent=1),
    ):
        path.write_bytes(content.encode())
        assert read(path) == ["One.", "Zwei \u2028."]
    for name, texts in (("a", ["One.", None]), ("b", ["Zwei."])):
        kind = pyarrow.dictionary(pyarrow.int32(), pyarrow.string()) if name == "b" else pyarrow.large_string()
        parquet.write_table(
            pyarrow.table({"text": pyarrow.array(texts, kind), "x": texts}), tmp_path / f"{name}.parquet"
        )
    assert read(tmp_path / "*.parquet") == ["One.", "Zwei."]


TXT, JSONL = (rf"noise\.path=HERE: is not \.{kind} text \(line " for kind in ("txt", "jsonl"))
OTHER = r" is not UTF-8; save it as UTF-8, if it is text\)$"


def _parquet(path: Path, values: list[Any], name: str = "text") -> None:
    parquet.write_table(pyarrow.table({name: pyarrow.array(values)}), path)


def _truncated(path: Path) -> None:
    _parquet(path, ["One."] * 1000)
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.fault("text files that are damaged, or no text", "one line that names the file and the place in it")
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.txt", None, r"noise\.path=HERE: no \.txt"),
        ("x" * 300 + ".txt", None, r"noise\.path=HERE: no \.txt"),
        ("notes.md", b"Hello.", r"noise\.path=HERE: is no \.txt"),
        ("stories.txt.gz", b"\x1f\x8b", r"noise\.path=HERE: is no \.txt"),
        ("fifo.txt", os.mkfifo, r"noise\.path=HERE: is a link to nothing or no plain file"),
        ("empty.txt", b"", r"noise\.path=HERE: is empty"),
        ("empty.jsonl", b"", r"noise\.path=HERE: is empty"),
        ("blank.txt", b" \n\n ", r"noise\.path=HERE: is empty"),
        ("blank.jsonl", b"\n\n", r"noise\.path=HERE: is empty"),
        ("nothing.jsonl", b'{"text": null}\n{"text": ""}', r"noise\.path=HERE: is empty"),
        ("nothing.parquet", lambda path: _parquet(path, [None, ""]), r"noise\.path=HERE: is empty"),
        ("picture.txt", b"\x89PNG\r\n\x1a\n\x00\xff\xfe" * 9, rf"{TXT}1{OTHER}"),
        ("utf16.txt", "Hello.".encode("utf-16"), rf"{TXT}1{OTHER}"),
        ("utf16le.txt", "Grün.\nHello.".encode("utf-16-le"), rf"{TXT}1{OTHER}"),
        ("utf32.txt", "Hello.".encode("utf-32"), rf"{TXT}1{OTHER}"),
        ("latin.txt", "Hello.\r\n\r\nGrün.\nGrün.".encode("latin-1"), rf"{TXT}3{OTHER}"),
        ("end.txt", "Hello.\nGrün".encode()[:-2], rf"{TXT}2{OTHER}"),
        ("latin.jsonl", '{"text": "Blue."}\n{"text": "Grün."}'.encode("latin-1"), rf"{JSONL}2{OTHER}"),
        ("array_latin.jsonl", '[{"text": "A."},\n\n{"text": "Grün."}]'.encode("cp1252"), rf"{JSONL}3{OTHER}"),
        ("utf16.jsonl", '{"text": "A."}\n'.encode("utf-16"), rf"{JSONL}1{OTHER}"),
        ("utf16be.jsonl", '{"text": "A."}\n'.encode("utf-16-be"), rf"{JSONL}1{OTHER}"),
        ("zeros.txt", b"A.\n" + b"\0" * 900, rf"{TXT}2{OTHER}"),
        ("zero.jsonl", b'{"text": "A."}\n{"text": "A\\u0000"}', r"noise\.path=HERE: line 2 holds '\\x00'"),
        ("half.jsonl", b'{"text": "\\ud83d"}', r"noise\.path=HERE: line 1 holds '\\ud83d'"),
        ("broken.jsonl", b"{not json", r"noise\.path=HERE: is not \.jsonl text \(line 1: Expecting"),
        ("cut.jsonl", b'{"text": "A."}\n{"text": "B', r"noise\.path=HERE: is not \.jsonl text \(line 2: Unterminated"),
        ("array.jsonl", b'[{"text": "A."},\n\n{"text"}]', r"noise\.path=HERE: is not \.jsonl text \(line 3: Exp"),
        ("deep.jsonl", b"[" * 100_000, r"noise\.path=HERE: is not \.jsonl text \(.*recursion"),
        ("numbers.jsonl", b"1\n2\n", r"noise\.path=HERE: is not \.jsonl text \(line 1: holds int, and no object"),
        ("rows.jsonl", b'{"document": "A. B. C."}\n', r"noise\.field=text: HERE has no such column; it has document"),
        ("rows.jsonl", b'{"meta": {"text": "A."}, "id": 1}', r"noise\.field=text: HERE has no .* it has meta, id"),
        ("rows.parquet", lambda path: _parquet(path, ["A."], "story"), r"noise\.field=text: HERE has .* it has story"),
        ("int.jsonl", b'{"text": 3}\n', r"noise\.field=text: is int, not text, in HERE, line 1"),
        ("list.jsonl", b'{"text": "A."}\n{"text": ["A."]}\n', r"noise\.field=text: is list, not text, in HERE, line 2"),
        ("dict.jsonl", b'{"text": {"a": "A."}}\n', r"noise\.field=text: is dict, not text, in HERE, line 1"),
        ("false.jsonl", b'{"text": false}\n', r"noise\.field=text: is bool, not text, in HERE, line 1"),
        ("ints.parquet", lambda path: _parquet(path, [1]), r"noise\.field=text: is int, not text, in HERE, row 1"),
        ("lists.parquet", lambda path: _parquet(path, [["A"]]), r"noise\.field=text: is list, not text, in HERE"),
        ("bytes.parquet", lambda path: _parquet(path, [b"A"]), r"noise\.field=text: is bytes, not text, in HERE"),
        ("structs.parquet", lambda path: _parquet(path, [{"a": 1}]), r"noise\.field=text: is dict, not text, in HERE"),
        ("broken.parquet", b"PAR0", r"noise\.path=HERE: is not \.parquet text"),
        ("empty.parquet", b"", r"noise\.path=HERE: is not \.parquet text"),
        ("cut.parquet", _truncated, r"noise\.path=HERE: is not \.parquet text"),
    ],
)  # fmt: skip
def test_files_of_no_use(
    name: str, content: bytes | Callable[[Path], None] | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    if callable(content):
        content(path)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match="^" + message.replace("HERE", str(path))) as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_one_of_many_files_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "A."}')
    (tmp_path / "b.jsonl").write_text('{"story": "B."}')
    (tmp_path / "c.jsonl").write_text("{")
    with pytest.raises(UserError, match=r"noise\.field=text: \S*b\.jsonl has no such column; it has story"):
        read(tmp_path)
    with pytest.raises(UserError, match=r"noise\.path=\S*: \S*c\.jsonl is not \.jsonl text"):
        read(tmp_path / "[ac].jsonl")
    (tmp_path / "d.txt").write_text("D.")
    with pytest.raises(UserError, match=r"several kinds of files"):
        read(tmp_path)


def test_what_is_left_out_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, text in (("a.txt", "A."), ("b.txt", ""), ("c.txt.gz", "x"), ("README.md", "x")):
        (tmp_path / name).write_text(text)
    with caplog.at_level("INFO"):
        assert read(tmp_path) == ["A."]
    told = [record.getMessage().removeprefix(f"noise.path={tmp_path}: ") for record in caplog.records]
    assert told == [
        f"leaves out what is no .txt, .jsonl, .parquet file (2, such as {tmp_path / 'README.md'})",
        "leaves out 1 of 2 documents, which hold no text",
    ]
