"""Where noise comes from, how it is split, and the cache."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import pytest
from conftest import ROOT
from transformers import PreTrainedTokenizerBase

from rmt_lightning.core.errors import UserError
from rmt_lightning.tasks.facts import PEOPLE, PLACES, Split
from rmt_lightning.tasks.noise import SPLITS, Corpus, Files, Hub, Prose, sentences, tokenize


def test_prose_is_varied_and_never_names_the_people_or_places_of_the_tasks() -> None:
    noise = Prose(100)
    said = [sentence for split in SPLITS for document in noise.documents(split) for sentence in document]
    assert len(set(said)) > 0.6 * len(said)
    words = set(re.findall(r"\w+", " ".join(said)))
    assert not words & {*PEOPLE, *PLACES}
    look_alikes = [s for s in said if re.search(r"(moved|went|went back|journeyed|travelled) to the \w+\.$", s)]
    assert 0.01 < len(look_alikes) / len(said) < 0.1
    assert all(s[0].isupper() or s[0] == '"' for s in said)
    assert not re.search(r"\b[Aa] [aeiou]", " ".join(said))


def test_prose_splits_share_no_document_and_depend_on_the_seed() -> None:
    def documents(noise: Prose) -> list[set[str]]:
        return [{" ".join(document) for document in noise.documents(split)} for split in SPLITS]

    first, again, other = documents(Prose(30)), documents(Prose(30)), documents(Prose(30, seed=1))
    assert first == again
    everything = first + other
    assert len(set.union(*everything)) == sum(map(len, everything))


def test_sentences() -> None:
    text = '"Who are\nyou?" he asked.  "I am Mr. Hale." J. R. Brown nodded! It cost 3.50 dollars. … Then'
    assert sentences(text) == [
        '"Who are you?" he asked.',
        '"I am Mr. Hale."',
        "J. R. Brown nodded!",
        "It cost 3.50 dollars. … Then",
    ]
    assert sentences("  \n ") == []


def stories(count: int) -> list[str]:
    return [f"Story {n} begins. It goes on for {n} days. Then story {n} ends." for n in range(count)]


def write(folder: Path, kind: str, texts: list[str]) -> Path:
    path = folder / f"noise.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(json.dumps({"text": text, "id": i}) for i, text in enumerate(texts)))
    elif kind == "parquet":
        datasets.Dataset.from_dict({"text": texts}).to_parquet(path)
    else:
        folder = folder / "txt"
        folder.mkdir()
        for number, text in enumerate(texts):
            (folder / f"{number:03}.txt").write_text(text)
        return folder
    return path


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_files_are_split_by_document(kind: str, tmp_path: Path) -> None:
    noise = Files(str(write(tmp_path, kind, stories(20))))
    numbers = {split: {re.search(r"\d+", d[0])[0] for d in noise.documents(split)} for split in SPLITS}
    assert [len(numbers[split]) for split in SPLITS] == [16, 2, 2]
    assert len(set.union(*numbers.values())) == 20
    assert all(len(document) == 3 for document in noise.documents("train"))


def test_validation_text_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "dev").mkdir()
    train = write(tmp_path, "jsonl", stories(4))
    dev = write(tmp_path / "dev", "jsonl", [text.replace("Story", "Tale") for text in stories(5)])
    noise = Files(str(train), validation_path=str(dev))
    assert len(list(noise.documents("train"))) == 4
    validation, test = (list(noise.documents(split)) for split in ("validation", "test"))
    assert len(validation) == 3 and len(test) == 2
    assert all(document[0].startswith("Tale") for document in validation + test)
    assert noise.fingerprint() != Files(str(train)).fingerprint()


def test_one_long_text_is_cut_into_passages(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text(" ".join(stories(100)))
    parts = {split: [s for d in Files(str(path)).documents(split) for s in d] for split in SPLITS}
    assert sum(map(len, parts.values())) == 300
    assert not set(parts["train"]) & set(parts["validation"])
    assert len(parts["validation"]) == 30


@pytest.mark.parametrize(
    ("name", "content", "field", "message"),
    [
        ("absent.txt", None, "text", r"noise\.path=.*absent\.txt: no .txt"),
        ("empty.txt", b"", "text", r"noise\.path=.*is empty"),
        ("blank.txt", b" \n\n ", "text", r"noise\.path=.*is empty"),
        ("picture.txt", b"\x89PNG\r\n\x1a\n\x00\xff\xfe" * 9, "text", r"noise\.path=.*not .*text"),
        ("zeros.txt", b"\0" * 900, "text", r"noise\.path=.*not .*text"),
        ("broken.jsonl", b"{not json", "text", r"noise\.path=.*not \.jsonl"),
        ("broken.parquet", b"PAR0", "text", r"noise\.path=.*not \.parquet"),
        ("rows.jsonl", b'{"document": "A. B. C."}\n', "text", r"noise\.field=text: .* it has document"),
        ("rows.jsonl", b'{"text": 3}\n', "text", r"noise\.field=text: is int64, not text"),
        ("notes.md", b"Hello.", "text", r"noise\.path=.*notes\.md: no .txt"),
    ],
)
def test_bad_files(name: str, content: bytes | None, field: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        list(Files(str(path), field).documents("train"))
    assert "\n" not in str(caught.value)


def test_a_folder_of_mixed_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("A.")
    (tmp_path / "b.jsonl").write_text("{}")
    with pytest.raises(UserError, match="several kinds"):
        Files(str(tmp_path))


def test_hub_without_network_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"noise\.name=emozilla/quality: cannot be loaded") as caught:
        list(Hub("emozilla/quality", field="article").documents("train"))
    assert "\n" not in str(caught.value) and "noise=prose" in str(caught.value)


def test_lines_of_the_hub_become_articles(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["", " = Lobster =", " A lobster lives.", " = = Food = =", " It eats.", " = Crab =", " So does it."]
    rows = [{"text": line} for line in lines]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    begins = re.search(r"begins: '(.*)'", (ROOT / "conf" / "noise" / "wikitext.yaml").read_text())[1]
    articles = Hub("some/wiki", "text", begins=begins)._texts()
    assert [article.split() for article in articles] == [
        ["=", "Lobster", "=", "A", "lobster", "lives.", "=", "=", "Food", "=", "=", "It", "eats."],
        ["=", "Crab", "=", "So", "does", "it."],
    ]
    assert Hub("some/wiki", "text")._texts() == [line for line in lines if line]


def test_cache_is_memory_mapped_and_keyed_by_content(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    first = tokenize(Prose(10), tokenizer, tmp_path)
    assert isinstance(first["train"].tokens, np.memmap)
    assert first["train"].num_documents == 10 and first["test"].num_documents == 1
    assert first["train"].sentence_starts[-1] == len(first["train"].tokens)
    text = " ".join(sentence.lower() for sentence in next(Prose(10).documents("train")))
    decoded = tokenizer.decode(first["train"].tokens[: first["train"].sentence_starts[60]])
    assert " ".join(decoded.split()) == text
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")}
    tokenize(Prose(10), tokenizer, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")} == stamps
    tokenize(Prose(10, seed=1), tokenizer, tmp_path)
    assert len(list(tmp_path.rglob("*.npy"))) == 2 * len(stamps)


@pytest.mark.fault("a tokenized text in the cache is damaged", "it is built again, and said so")
@pytest.mark.parametrize("name", ["train/tokens.npy", "test/document_bytes.npy", "checksums.json"])
def test_a_damaged_cache_is_built_again(
    name: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("rmt_lightning.tasks.noise.log.warning", lambda text, *values: said.append(text % values))
    before = tokenize(Prose(10), tokenizer, tmp_path)["train"].tokens.tolist()
    assert said == []
    (path,) = tmp_path.rglob(name)
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    for damage in (None, path.unlink, lambda: os.truncate(path, 40)):
        if damage:
            damage()
        assert tokenize(Prose(10), tokenizer, tmp_path)["train"].tokens.tolist() == before
        assert said == [f"{next((tmp_path / 'noise').glob('*/'))} is damaged; tokenizing again"]
        said.clear()
    assert len([path for path in (tmp_path / "noise").iterdir() if path.is_dir()]) == 1


def test_a_changed_file_is_tokenized_anew(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = write(tmp_path, "jsonl", stories(20))
    before = tokenize(Files(str(path)), tokenizer, tmp_path / "cache")["train"].tokens[:8].tolist()
    path.write_text(path.read_text().replace("Story", "Novel"))
    assert tokenize(Files(str(path)), tokenizer, tmp_path / "cache")["train"].tokens[:8].tolist() != before


class Failing(Prose):
    """A source that breaks off in its second split."""

    def documents(self, split: Split) -> Iterator[list[str]]:
        if split == "validation":
            raise OSError(28, "No space left on device")
        return super().documents(split)


def test_a_build_that_breaks_off_leaves_nothing(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space"):
        tokenize(Failing(10), tokenizer, tmp_path)
    assert [path for path in (tmp_path / "noise").iterdir() if path.suffix != ".lock"] == []
    assert isinstance(tokenize(Prose(10), tokenizer, tmp_path)["train"], Corpus)


def _build(arguments: tuple[PreTrainedTokenizerBase, Path]) -> tuple[int, int]:
    tokenizer, cache = arguments
    corpus = tokenize(Prose(60), tokenizer, cache)["train"]
    return os.getpid(), int(corpus.tokens.sum())


def test_several_processes_build_one_cache(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        results = pool.map(_build, [(tokenizer, tmp_path)] * 3, chunksize=1)
    assert len({total for _, total in results}) == 1
    assert len([path for path in (tmp_path / "noise").iterdir() if path.is_dir()]) == 1


def test_real_stories(shared_data: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    folder = shared_data / "squality"
    noise = Files(str(folder / "train.jsonl"), "document", str(folder / "dev.jsonl"))
    corpora = tokenize(noise, tokenizer, tmp_path)
    assert [corpora[split].num_documents for split in SPLITS] == [50, 13, 12]
    lengths = np.diff(corpora["train"].sentence_starts)
    assert 15 < lengths.mean() < 60
