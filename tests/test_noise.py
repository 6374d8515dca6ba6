"""Where noise comes from, how it is split, and the cache."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import pickle
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from conftest import ROOT
from filelock import FileLock
from huggingface_hub import constants
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rmt_lightning.core.errors import UserError
from rmt_lightning.core.tokens import encode, token_ids
from rmt_lightning.models.tiny import TinyBert
from rmt_lightning.tasks.corpus import Corpus, OnDisk, _checksums, tokenize
from rmt_lightning.tasks.facts import PEOPLE, PLACES, Detect, Split
from rmt_lightning.tasks.language import RunningText
from rmt_lightning.tasks.noise import SPLITS, Files, Hub, Prose, sentences, spaced
from rmt_lightning.tasks.placement import Placement
from rmt_lightning.tasks.text_files import TextFiles


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


def test_people_and_rooms_are_named_on_demand_and_nobody_is_moved() -> None:
    parts = {split: [s for d in Prose(100, mentions=0.2).documents(split) for s in d] for split in SPLITS}
    said = [sentence for part in parts.values() for sentence in part]
    named = [s for s in said if {*PEOPLE, *PLACES} & set(re.findall(r"\w+", s))]
    assert 0.15 < len(named) / len(said) < 0.25
    words = set(re.findall(r"\w+", " ".join(named)))
    assert {*PEOPLE, *PLACES} <= words
    facts = set(Detect().sentences()) - {f"Where is {person}?" for person in PEOPLE}
    assert not facts & set(said)
    # No sentence of the test can have been learned by heart.
    assert len(set.union(*map(set, parts.values()))) == sum(len(set(part)) for part in parts.values())
    assert [len(part) for part in parts.values()] == [6000, 600, 600]


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


@pytest.mark.fault("noise that is not English", "its sentences are told apart")
@pytest.mark.parametrize(
    "text",
    [
        "今天很好。|我们走！|“好吗？”|他说。|3．5元……不贵。|走吧!|好。",
        "彼は言った。|「元気？」|「はい。」|そうか！？|次へ。",
        "Он пришёл. |Потом ушёл… |Тогда А. С. Пушкин сказал: «Привет! |Как дела?» |Да. |— Нет. |«Ёлка.» |Он!",
        "Es war gut. |Äpfel sind rot. |„Ja!“ |Er ging. |»Nein.« |Überall 3.5 Grad.",
        "¿Qué tal? |¡Muy bien! |¿Y tú? |Él vino. |«Sí.» |Ella.",
        "« Bonjour. » |Il partit. |Était-ce vrai ? |Oui.",
        "नमस्ते दुनिया। |यह हिन्दी है। |ठीक? |१२ लोग आए।",
        "هل أنت بخير؟ |نعم. |أنا هنا! |حسنا۔ |اچھا",
        "שלום. |מה שלומך? |טוב.",
        "안녕하세요. |저는 학생입니다!",
        "გამარჯობა. |როგორ ხარ? |კარგად.",
        "ሰላም። |እንዴት ነህ።",
        "Բարեւ։ |Ինչպես ես։",
        "Žádný. |Škoda! |Łódź… |Žena.",
        "שלום.\u200f |מה שלומך?\u200f |\u2067טוב.\u2069 |\u202bיפה!\u202c",
    ],
)
def test_sentences_of_other_languages(text: str) -> None:
    found = sentences(text.replace("|", ""))
    assert found == text.replace(" |", "|").split("|")
    assert "".join(spaced(found)) == " " + text.replace("|", "")


@pytest.mark.fault("noise without stops, spaces or both", "it is cut into passages all the same")
@pytest.mark.parametrize(
    "text", ["word and another " * 3000, "天" * 9000, "x" * 300_000, "Title. Name. " + "a b " * 9000]
)
def test_text_without_stops_is_cut(text: str, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text(text)
    parts = [document for split in SPLITS for document in Files(str(tmp_path / "book.txt")).documents(split)]
    assert 3 <= len(parts) <= 21
    assert sorted("".join("".join(map("".join, parts)).split())) == sorted("".join(text.split()))
    if text.startswith("word"):
        assert all(sentence.startswith(("word", "and", "another")) for part in parts for sentence in part)


def trained(kind: str, *texts: str) -> PreTrainedTokenizerBase:
    """A tokenizer of the kind that some models have."""
    unknown = {"special_tokens": ["<unk>"], "show_progress": False}
    metaspace = pre_tokenizers.Metaspace(prepend_scheme="always")
    if kind in ("unigram", "xlm-roberta"):
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = metaspace
        if kind == "xlm-roberta":
            # Line breaks are spaces to it.
            tokenizer.normalizer = normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC()])
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), metaspace])
        trainer = trainers.UnigramTrainer(vocab_size=99, unk_token="<unk>", **unknown)
    elif kind == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
        tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=200, **unknown)
    elif kind == "byte level":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(
            vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        )
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
        tokenizer.pre_tokenizer = metaspace
        every_byte = [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=500, **unknown | {"special_tokens": ["<unk>", *every_byte]})
    tokenizer.train_from_iterator(texts, trainer)
    if kind == "llama":
        # As SentencePiece does it: one long word, with a space of its own before it.
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.pre_tokenizer = None
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=None if kind == "byte level" else "<unk>")


KINDS = ["llama", "metaspace", "unigram", "xlm-roberta", "byte level", "wordpiece"]


@pytest.mark.fault("a tokenizer puts a space before each text", "tokens are those of the whole text")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "text",
    [
        "The dog went home. \"Late!\" It's 3 o'clock. Who? (Mary.) She went… Über alles.",
        "今天很好。我们走！“好吗？”他说。Он ушёл. Да. كيف؟ نعم.",
    ],
)
def test_tokens_of_sentences_are_those_of_the_text(kind: str, text: str, tmp_path: Path) -> None:
    tokenizer = trained(kind, *sentences(text) * 9, "The dog went home. He was late. The day was long.")

    class Given(Prose):
        def documents(self, split: Split) -> Iterator[list[str]]:
            yield sentences(text)

    corpus = tokenize(Given(10), tokenizer, tmp_path)["test"]
    # Running text goes before it.
    plain = f" {text}" if kind == "byte level" else text
    assert corpus.tokens[:].tolist() == tokenizer(plain, add_special_tokens=False)["input_ids"]
    assert corpus.document_bytes.tolist() == [len(text.encode())]
    assert len(corpus.sentence_starts) == len(sentences(text)) + 1
    told = [token for ids in token_ids(tokenizer, ["The dog went home.", "Who?"]) for token in ids]
    plain = " The dog went home. Who?"[kind != "byte level" :]
    assert told == tokenizer(plain, add_special_tokens=False)["input_ids"]
    if kind == "wordpiece":
        assert corpus.words[:].sum() == (14 if text.startswith("The") else 16)


@pytest.mark.fault("a text is read in pieces that begin with line breaks", "tokens are those of the whole text")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("space", [" ", "\n", "\n\n", "\n  ", "\t"])
def test_tokens_of_pieces_are_those_of_the_text(kind: str, space: str) -> None:
    text = "The dog went home. He was late. The day was long."
    tokenizer = trained(kind, *[text, "The\n\ndog\nwent\n\n\thome."] * 9)
    ids = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in (text, text + space + text)]
    assert ids[0] + next(iter(encode(tokenizer, [space + text])))[0] == ids[1]


@pytest.mark.fault("the tokenizer does not know the noise", "one line says so, and names it")
@pytest.mark.parametrize("kind", ["wordpiece", "metaspace", "byte level", "nothing"])
def test_unknown_text_is_refused(kind: str, tmp_path: Path) -> None:
    tokenizer = trained("wordpiece", "今天很好")
    if kind == "metaspace":
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0}, "<unk>")))
        tokenizer.unk_token = "<unk>"
    elif kind == "byte level":
        empty = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=empty)
    elif kind == "nothing":
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    tokenizer.name_or_path = "models/empty"
    with pytest.raises(UserError, match=r"tokenizer \(models/empty\) knows \d+% of .* noise") as caught:
        tokenize(Prose(10), tokenizer, tmp_path)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("*.npy"))


@pytest.mark.fault("a word of 300,000 letters", "it is read within seconds")
def test_a_very_long_word(tmp_path: Path) -> None:
    letters = np.random.default_rng(0).choice(list("abcdefgh"), 300_000)
    began = time.perf_counter()
    tokenizer = TinyBert().tokenizer(["The dog went home.", "".join(letters)])
    assert sum(map(len, token_ids(tokenizer, ["".join(letters)]))) > 50_000
    assert time.perf_counter() - began < 30


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


def in_splits(noise: Files) -> list[set[str]]:
    return [{" ".join(document) for document in noise.documents(split)} for split in SPLITS]


LEAK = pytest.mark.fault("documents repeat", "each is read once, in one split, and their number is told")


@LEAK
@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_documents_that_repeat_are_read_once(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    changed = [
        str,
        lambda t: f"\n {t}\n",
        lambda t: t.replace(" ", "\r\n"),
        str.upper,
        lambda t: t.replace("o", "\u200bo\u00ad").replace("a", "\u2067a\u2069"),
        lambda t: t.replace("S", "\uff33"),
    ]
    noise = Files(str(write(tmp_path, kind, [change(text) for text in stories(12) for change in changed])))
    with caplog.at_level("INFO"):
        train, validation, test = in_splits(noise)
    assert (train, validation, test) == (set(stories(12)) - validation - test, {stories(12)[8]}, {stories(12)[9]})
    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == [
        "leaves out 60 of 72 documents, which repeat others"
    ]


@LEAK
def test_held_out_text_is_not_trained_on(tmp_path: Path) -> None:
    path = write(tmp_path, "txt", stories(6))
    train, validation, test = in_splits(Files(str(path), validation_path=str(path / "00[1-4].txt")))
    assert (train, validation | test) == ({stories(6)[0], stories(6)[5]}, set(stories(6)[1:5]))
    assert not validation & test
    with pytest.raises(UserError, match=r"noise\.path=.*holds nothing that is not in noise\.validation_path too"):
        list(Files(str(path / "*3.txt"), validation_path=str(path)).documents("train"))


@LEAK
def test_one_book_in_two_files_is_one_book(tmp_path: Path) -> None:
    path = write(tmp_path, "txt", [" ".join(stories(100))] * 2)
    train, validation, test = ({s for d in Files(str(path)).documents(split) for s in d} for split in SPLITS)
    assert len(train) + len(validation) + len(test) == 300
    assert not train & (validation | test)


def of_words(texts: list[str]) -> PreTrainedTokenizerFast:
    """A tokenizer that knows whole words, and no others."""
    words = sorted(set(re.findall(r"\w+|[^\w\s]", " ".join(texts))))
    known = {word: number for number, word in enumerate(["<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(known, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def test_what_is_known_of_a_text_is_told_by_each_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    book = " ".join(f"Of chapter {n % 10} there is a good deal to be said Анне." for n in range(40))
    noise = Files(str(write(tmp_path, "jsonl", [f"{book} Copy {n}." for n in range(20)])))
    tokenizer = of_words(["Of chapter there is a good deal to be said. Copy", *map(str, range(20))])
    for _ in range(2):
        caplog.clear()
        tokenize(noise, tokenizer, tmp_path / "cache")
        assert "noise: 100% of the sentences of test are trained on too; give other text" in caplog.messages
        assert "noise: the tokenizer knows 90% of the characters of train only" in caplog.messages


class Strange(Detect):
    """Tells of people in another alphabet."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def sentences(self) -> Iterator[str]:
        yield from (f"Where's {name}?" for name in self.names)


@pytest.mark.fault("a tokenizer that does not know the words of a task", "refused, or said which look alike")
def test_words_that_look_alike_to_a_model(tmp_path: Path) -> None:
    noise = Prose(10)
    tokenizer = of_words([*Detect().sentences(), "' s", *(s for d in noise.documents("train") for s in d)])
    corpora = tokenize(noise, tokenizer, tmp_path)

    def told(task: Detect) -> list[str]:
        placement = Placement(task, corpora, tokenizer, text_length=60, seed=7)
        placement.check_words()
        return list(placement.remarks())

    assert not told(Detect())
    assert told(Strange("Mary", "Sandra", "Иван", "林")) == [
        "task=detect: 2 of its 5 words are unknown to the tokenizer, and look alike to the model, such as Иван, 林; "
        "choose a backbone that knows them"
    ]
    with pytest.raises(UserError, match=r"^backbone: its tokenizer knows 1 of the 4 words of task=detect; choose a"):
        told(Strange("Мария", "Иван", "林"))


@pytest.mark.fault("a text file changes while it is read", "refused; nothing wrong is kept")
def test_text_that_changes_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "jsonl", stories(12))
    read = TextFiles.texts

    def changing(self: TextFiles, field: str) -> Iterator[str]:
        yield from read(self, field)
        path.write_text(path.read_text() + "\n" + json.dumps({"text": "One more."}))

    noise = Files(str(path))
    noise.fingerprint()
    path.write_text(path.read_text().replace("Story", "Novel"))
    with pytest.raises(UserError, match=r"has changed while it was read"):
        list(noise.documents("train"))
    monkeypatch.setattr(TextFiles, "texts", changing)
    with pytest.raises(UserError, match=r"has changed while it was read"):
        list(Files(str(path)).documents("train"))


def test_one_long_text_is_cut_into_passages(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text(" ".join(stories(100)))
    parts = {split: [s for d in Files(str(path)).documents(split) for s in d] for split in SPLITS}
    assert sum(map(len, parts.values())) == 300
    assert not set(parts["train"]) & set(parts["validation"])
    assert len(parts["validation"]) == 30


@pytest.fixture
def reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rmt_lightning.tasks.noise.out_of_reach", lambda _: "")


@pytest.mark.fault("the Hub cannot be reached", "said before it is tried, and one line within seconds")
@pytest.mark.parametrize("offline", [True, False])
def test_hub_out_of_reach(offline: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    # Nobody listens there, and the client of the Hub would try again for a minute.
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    began = time.monotonic()
    with caplog.at_level("INFO"), pytest.raises(UserError) as caught:
        list(Hub("emozilla/quality", field="article").documents("train"))
    assert time.monotonic() - began < 10
    assert [record.getMessage() for record in caplog.records if record.name.startswith("rmt")] == [
        "noise.name=emozilla/quality: asking the Hugging Face Hub"
    ] * (not offline)
    message = str(caught.value)
    assert message.startswith("noise.name=emozilla/quality: cannot be loaded") and "\n" not in message
    assert "noise=prose" in message and ("HF_HUB_OFFLINE" if offline else "127.0.0.1:9") in message


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"story": "A."}], "noise.field=text: some/set has no such column; it has story"),
        ([{"text": ["A."]}], "noise.field=text: is list, not text, in some/set"),
        (OSError(13, "Permission denied"), "noise.name=some/set: cannot be loaded from the Hugging Face Hub (Permis"),
        (KeyError("train"), "noise.name=some/set: cannot be loaded from the Hugging Face Hub (KeyError: 'train')"),
    ],
)
def test_data_sets_of_no_use(rows: Any, message: str, reached: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> Any:
        if isinstance(rows, Exception):
            raise rows
        return rows

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(UserError) as caught:
        Hub("some/set", "text")._texts()
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_lines_of_the_hub_become_articles(reached: None, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_cache_stays_on_the_disk_and_is_keyed_by_content(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    first = tokenize(Prose(10), tokenizer, tmp_path)
    assert isinstance(first["train"].tokens, OnDisk)
    again = pickle.loads(pickle.dumps(first["train"].tokens))
    assert again[5:9].tolist() == first["train"].tokens[:][5:9].tolist()
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
    monkeypatch.setattr("rmt_lightning.tasks.corpus.log.warning", lambda text, *values: said.append(text % values))
    before = tokenize(Prose(10), tokenizer, tmp_path)["train"].tokens[:].tolist()
    assert said == []
    (path,) = tmp_path.rglob(name)
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)

    def pipe() -> None:
        path.unlink()
        os.mkfifo(path)

    def whole_pipe() -> None:
        (folder,) = (path for path in (tmp_path / "noise").iterdir() if path.is_dir())
        shutil.rmtree(folder)
        os.mkfifo(folder)
        os.mkfifo(f"{folder}-partial")

    def dangling() -> None:
        (folder,) = (path for path in (tmp_path / "noise").iterdir() if path.is_dir())
        shutil.rmtree(folder)
        folder.symlink_to("nowhere")

    def deep() -> None:
        next(tmp_path.rglob("checksums.json")).write_text("[" * 10**5)

    for damage in (None, path.unlink, lambda: os.truncate(path, 40), pipe, whole_pipe, dangling, deep):
        if damage:
            damage()
        assert tokenize(Prose(10), tokenizer, tmp_path)["train"].tokens[:].tolist() == before
        assert said == [f"{next((tmp_path / 'noise').glob('*/'))} is damaged; tokenizing again"]
        said.clear()
    assert len([path for path in (tmp_path / "noise").iterdir() if path.is_dir()]) == 1


@pytest.mark.fault("a tokenized text in the cache fits its checksums, but not itself", "it is built again")
@pytest.mark.parametrize(
    ("name", "forge"),
    [
        ("tokens", lambda x: x.astype(float)),
        ("tokens", lambda x: -x.astype(np.int32)),
        ("tokens", lambda x: x[:100]),
        ("words", lambda x: x[:100]),
        ("sentence_starts", lambda x: x[::-1]),
        ("sentence_starts", lambda x: x * 0),
        ("document_starts", lambda x: x[:1]),
        ("document_starts", lambda x: x > 0),
        ("document_bytes", lambda x: np.array("a")),
    ],
)
def test_a_forged_cache_is_built_again(
    name: str, forge: Any, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = tokenize(Prose(10), tokenizer, tmp_path)["train"].tokens[:].tolist()
    path = next(tmp_path.rglob(f"train/{name}.npy"))
    np.save(path, forge(np.load(path)))
    (path.parent.parent / "checksums.json").write_text(json.dumps(_checksums(path.parent.parent)))
    assert tokenize(Prose(10), tokenizer, tmp_path)["train"].tokens[:].tolist() == before
    assert [record.getMessage() for record in caplog.records] == [f"{path.parent.parent} is damaged; tokenizing again"]


@pytest.mark.fault("a text file has changed, and the time of its last change has not", "it is tokenized anew")
def test_a_changed_file_is_tokenized_anew(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = write(tmp_path, "jsonl", stories(20))
    before = tokenize(Files(str(path)), tokenizer, tmp_path / "cache")["train"].tokens[:8].tolist()
    told = path.stat()
    path.write_text(path.read_text().replace("Story", "Novel"))
    # What rsync -t, cp -p and git do.
    os.utime(path, ns=(told.st_atime_ns, told.st_mtime_ns))
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


@pytest.mark.fault("building a cache is killed", "the next run clears away what it has begun")
def test_what_killed_builders_leave_is_cleared_away(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    tokenize(Prose(10), tokenizer, tmp_path)
    (entry,) = (tmp_path / "noise").glob("*/")
    entry.rename(entry.with_name(f"{entry.name}-partial"))
    for name in ("0" * 32 + "-partial", "1" * 32 + "-x1y2z3"):
        (entry.with_name(name) / "train").mkdir(parents=True)
    # What the user has put there is none of our business.
    (yours := entry.with_name("street-noises")).mkdir()
    busy = entry.with_name("2" * 32 + "-partial")
    busy.mkdir()
    with FileLock(busy.with_name("2" * 32 + ".lock")):
        tokenize(Prose(10), tokenizer, tmp_path)
    assert {path.name for path in entry.parent.glob("*/")} == {entry.name, busy.name, yours.name}
    assert entry.stat().st_mode & 0o777 == (tmp_path / "noise").stat().st_mode & 0o777


@pytest.mark.fault("a tokenized text is shortened or overwritten while it is in use", "one line says so")
@pytest.mark.parametrize("damage", ["shortened", "emptied", "beyond the vocabulary"])
def test_damage_while_in_use(damage: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    corpora = tokenize(Prose(10), tokenizer, tmp_path)
    (path,) = tmp_path.rglob("train/tokens.npy")
    if damage == "beyond the vocabulary":
        path.write_bytes(path.read_bytes()[:128] + b"\xff" * 2 * len(corpora["train"].tokens))
    else:
        os.truncate(path, 0 if damage == "emptied" else path.stat().st_size - 2)
    read = RunningText(corpora["train"], tokenizer, 10**6, seed=0) if tokenizer.cls_token else None
    with pytest.raises(UserError, match=r"train/tokens\.npy: was damaged while it was in use") as caught:
        read.document(9)
    assert "\n" not in str(caught.value)
    # Whoever opens it next builds it again, even if its checksums are those of the damaged file.
    (sums,) = tmp_path.rglob("checksums.json")
    sums.write_text(
        json.dumps(json.loads(sums.read_text()) | {"train/tokens.npy": hashlib.sha256(path.read_bytes()).hexdigest()})
    )
    assert int(tokenize(Prose(10), tokenizer, tmp_path)["train"].tokens[:].max()) < len(tokenizer)


@pytest.mark.fault("a cache that cannot be used", "one line says so, and a temporary folder takes its place")
@pytest.mark.parametrize(
    "fault", ["a file", "in a file", "no home", "read-only", "another user's", "another user's entry"]
)
def test_a_cache_that_cannot_be_used(
    fault: str, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("rmt_lightning.tasks.corpus.log.warning", lambda text, *values: said.append(text % values))
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "cache"
        if fault in ("a file", "in a file"):
            cache.write_text("")
        elif fault == "no home":
            monkeypatch.delenv("HOME")
            monkeypatch.setattr(os.path, "expanduser", lambda path: path)
        else:
            tokenize(Prose(10, seed=int(fault == "read-only")), tokenizer, cache)
            os.chmod(folder, 0o755)
            closed = next((cache / "noise").glob("*/")) if fault == "another user's entry" else cache
            os.chmod(closed, 0o555 if fault == "read-only" else 0o700 if os.geteuid() == 0 else 0)
            os.chmod(cache / "noise", 0o555 if fault == "read-only" else 0o777)
        place = {"in a file": cache / "noise", "no home": "~/cache"}.get(fault, cache)
        root = os.geteuid() == 0
        try:
            if (root and "user" in fault) or fault == "read-only":
                os.seteuid(65534)
            corpora = tokenize(Prose(10), tokenizer, place)
        finally:
            if root:
                os.seteuid(0)
            else:
                os.chmod(cache, 0o755)
        assert len(said) == 1 and said[0].startswith(f"cache_dir={place}: cannot be used ("), said
        assert len(corpora["train"].tokens[:]) == len(corpora["train"].words[:])


def test_a_cache_of_another_user_is_read(tokenizer: PreTrainedTokenizerBase) -> None:
    if os.geteuid():
        pytest.skip("only root can be another user")
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        tokenize(Prose(10), tokenizer, Path(folder) / "cache")
        before = {path: path.stat().st_mtime_ns for path in Path(folder).rglob("*")}
        try:
            os.seteuid(65534)
            assert len(tokenize(Prose(10), tokenizer, Path(folder) / "cache")["train"].tokens[:])
        finally:
            os.seteuid(0)
        assert {path: path.stat().st_mtime_ns for path in Path(folder).rglob("*")} == before


def _build(arguments: tuple[PreTrainedTokenizerBase, Path]) -> tuple[int, int]:
    tokenizer, cache = arguments
    corpus = tokenize(Prose(60), tokenizer, cache)["train"]
    return os.getpid(), int(corpus.tokens[:].sum())


@pytest.mark.soak
def test_several_processes_build_one_cache(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        results = pool.map(_build, [(tokenizer, tmp_path)] * 3, chunksize=1)
    assert len({total for _, total in results}) == 1
    assert len([path for path in (tmp_path / "noise").iterdir() if path.is_dir()]) == 1


@pytest.mark.soak
def test_real_stories(shared_data: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    folder = shared_data / "squality"
    noise = Files(str(folder / "train.jsonl"), "document", str(folder / "dev.jsonl"))
    corpora = tokenize(noise, tokenizer, tmp_path)
    assert [corpora[split].num_documents for split in SPLITS] == [50, 13, 12]
    lengths = np.diff(corpora["train"].sentence_starts)
    assert 15 < lengths.mean() < 60
