"""Reading texts and asking about them: from Python, and `python -m rmt_lightning.ask`."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from test_docs import BLOCKS
from torch import nn
from transformers import PreTrainedTokenizerBase

from rmt_lightning import Answerer, Memory, RMTEncoder
from rmt_lightning import ask as front_door
from rmt_lightning.core.errors import UserError
from rmt_lightning.models.baselines.full_attention import FullAttention
from rmt_lightning.models.baselines.lstm import LSTM
from rmt_lightning.models.recurrence import Segment
from rmt_lightning.models.segment_model import SegmentModel
from rmt_lightning.models.tiny import TinyBert

ANSWERS = ("garden", "kitchen", "office", "nowhere")
BOOK = "Mary went to the garden. The old house stood by the river, and nobody was there.\n\n" * 40


def make(kind: type[SegmentModel[Any]], tokenizer: PreTrainedTokenizerBase) -> SegmentModel[Any]:
    if kind is LSTM:
        return LSTM(tokenizer, segment_length=24, width=16, layers=1)
    encoder = TinyBert(width=16, layers=2, heads=2, max_positions=64).encoder(tokenizer)
    return FullAttention(encoder, 24) if kind is FullAttention else RMTEncoder(encoder, 24, memory_size=4)


@pytest.fixture(scope="module", params=[RMTEncoder, LSTM])
def answerer(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerBase) -> Answerer:
    torch.manual_seed(0)
    model: SegmentModel[Any] = make(request.param, tokenizer)
    return Answerer(model, nn.Linear(model.width, len(ANSWERS)), ANSWERS).eval()


def by_hand(answerer: Answerer, text: str, question: str) -> torch.Tensor:
    """Scores after all full segments but the last one, then what is left and the question, cut from its end."""
    model, length = answerer.model, answerer.model.text_length
    assert model.tokenizer is not None
    ids = torch.tensor(model.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.long)
    asked = torch.tensor(model.tokenizer(question, add_special_tokens=False)["input_ids"])
    state = model.initial_state(1)
    full = max(0, len(ids) // length - 1) * length
    for segment in ids[:full].split(length) if full else ():
        _, state = model.step(Segment(segment[None]), state)
    end = torch.cat([ids[full:], asked])
    first = len(end) % length
    for segment in filter(len, (end[:first], *end[first:].split(length))):
        hidden, state = model.step(Segment(segment[None]), state)
    return answerer.head(model.readout(hidden, Segment(segment[None])))


@pytest.mark.parametrize("length", [0, 30, 200, 1500, len(BOOK)])
def test_what_is_read_is_asked_as_by_hand(answerer: Answerer, length: int) -> None:
    text, questions = BOOK[:length], ["Where is Mary?", "Is anybody there at all?", "Who?"]
    memory = answerer.read(text)
    kept = [part.clone() for part in memory.state]
    found = answerer.ranked(memory, questions, top_k=9)
    with torch.no_grad():
        expected = torch.cat([by_hand(answerer, text, question) for question in questions]).softmax(dim=1)
    given = torch.tensor([[dict(row)[answer] for answer in ANSWERS] for row in found])
    torch.testing.assert_close(given, expected)
    assert [[answer.probability for answer in row] for row in found] == given.sort(descending=True).values.tolist()
    # Asking leaves no trace, and each question is answered as if it were the only one.
    assert all(torch.equal(*pair) for pair in zip(kept, memory.state, strict=True))
    assert answerer.ask(memory, questions) == [row[0].text for row in found]
    assert answerer.ask(memory, "Who?") == found[2][0].text == answerer(question="Who?", context=text)
    assert answerer.ask(memory, []) == [] == answerer.ranked(memory, [])
    assert memory.tokens == len(answerer.model.tokenizer(text, add_special_tokens=False)["input_ids"])  # type: ignore[misc]


def same(one: Memory, other: Memory) -> bool:
    return (one.tokens, one.model) == (other.tokens, other.model) and all(
        torch.equal(*pair) for pair in zip([*one.state, one.end], [*other.state, other.end], strict=True)
    )


def test_however_it_is_read_it_is_the_same(answerer: Answerer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = answerer.read(BOOK)
    (tmp_path / "book.txt").write_text(f"\ufeff{BOOK}", encoding="utf-8")
    assert same(answerer.read(tmp_path / "book.txt", progress=True), whole)
    (tmp_path / "book.txt").write_text(BOOK)
    with (tmp_path / "book.txt").open() as file:
        assert same(answerer.read(file), whole)
    # Pieces end within words, and a small buffer is filled many times.
    assert same(answerer.read([BOOK[start : start + 7] for start in range(0, len(BOOK), 7)]), whole)
    for place in ("models.answerer", "core.tokens"):
        monkeypatch.setattr(f"rmt_lightning.{place}.CHARACTERS", 100)
    for text in (BOOK, tmp_path / "book.txt", io.StringIO(BOOK)):
        assert same(answerer.read(text), whole)
    # In two goes, with a file between them.
    middle = BOOK.index(" ", 1234)
    answerer.read(BOOK[:middle]).save(tmp_path / "memory")
    assert same(answerer.read(BOOK[middle:], Memory.load(tmp_path / "memory")), whole)


def test_the_example_of_the_docs(
    answerer: Answerer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text(BOOK)
    (example,) = [block for kind, block in BLOCKS if kind == "python" and "memory.save" in block]
    exec(example, {"answerer": answerer, "Path": Path})
    assert (
        capsys.readouterr().out == f"{answerer.ask(Memory.load('book.memory'), ['Where is Mary?', 'Where is John?'])}\n"
    )


def test_a_text_without_spaces_takes_no_more_room_than_others(answerer: Answerer) -> None:
    pieces = (("x" * 1000) for _ in range(70))
    assert answerer.read(pieces).end.numel() < 2 * answerer.model.text_length


def test_precision_and_device_are_those_of_the_model(answerer: Answerer, tmp_path: Path) -> None:
    memory = answerer.read(BOOK)
    memory.save(tmp_path / "memory")
    half = Answerer(answerer.model, answerer.head, ANSWERS).to(torch.bfloat16)
    try:
        assert {part.dtype for part in half.read(BOOK).state} == {torch.bfloat16}
        # One that was read in another precision is taken too.
        for other in (memory, Memory.load(tmp_path / "memory")):
            assert half.ask(other, "Where is Mary?") in ANSWERS
    finally:
        answerer.to(torch.float32)


def test_what_cannot_be_read_or_asked(answerer: Answerer, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes("Mary ging nach Köln.".encode("latin-1"))
    memory = answerer.read(BOOK)
    for text, message in (
        (tmp_path / "absent", r"absent: cannot be read \(No such file or directory\); give the path of a text"),
        (tmp_path, r": cannot be read \(Is a directory\); give the path of a text"),
        (tmp_path / "latin", r"latin: is no text in UTF-8; convert it first"),
        ((tmp_path / "latin").open(encoding="utf-8"), r"text: is no text in UTF-8; convert it first"),
        (b"Mary", r"text: is a bytes; give a text, a Path, or pieces of a text"),
        (7, r"text: is a int; give a text, a Path, or pieces of a text"),
        (["Mary", 7], r"text: holds a int among its pieces; give texts"),
        ({"Mary": "John"}, r"text: is a dict; give a text, a Path, or pieces of a text"),
        ({"Mary", "John"}, r"text: is a set; give a text, a Path, or pieces of a text"),
        (np.array("Mary"), r"text: is a ndarray; give a text, a Path, or pieces of a text"),
    ):
        with pytest.raises(UserError, match=message):
            answerer.read(text)  # type: ignore[arg-type]
    for question in (7, ["Who?", 7], np.array("Who?")):
        with pytest.raises(UserError, match=r"question: give a text, or a list of texts"):
            answerer.ask(memory, question)  # type: ignore[arg-type]
    for blank in ("", ["Who?", " \n"]):
        for use in (answerer, answerer.scores, partial(answerer.ask, memory)):
            with pytest.raises(UserError, match=r"^(texts|question): one is blank, which asks nothing; leave it out$"):
                use(blank)
    for number in (0, 2.5, "2", None):
        with pytest.raises(UserError, match=rf"top_k={number}: asks for no answer"):
            answerer.ranked(memory, "Who?", top_k=number)  # type: ignore[arg-type]
    for given in ({"question": "Who?"}, {"context": BOOK}, {"texts": "Who?", "question": "Who?", "context": "x"}):
        with pytest.raises(UserError, match=r"give texts that end with their questions, or question= and context="):
            answerer(**given)
    # Other weights of the same shapes would make nonsense of it.
    torch.manual_seed(1)
    other = Answerer(make(type(answerer.model), tokenizer), answerer.head, ANSWERS).eval()
    for wrong in (lambda: other.ask(memory, "Who?"), lambda: other.read("x", memory)):
        with pytest.raises(UserError, match=r"memory: was read by another model, or one of the two is in float16; "):
            wrong()
    whole = make(FullAttention, tokenizer)
    with pytest.raises(UserError, match=r"FullAttention: keeps the whole text instead of a memory; call it with"):
        Answerer(whole, nn.Linear(whole.width, 4), ANSWERS).read("x")


def test_answers_differ_and_texts_are_no_letters(answerer: Answerer) -> None:
    with pytest.raises(UserError, match=r"^answers=a, b, a: hold one twice; give a different one for each score$"):
        Answerer(answerer.model, nn.Linear(answerer.model.width, 3), ["a", "b", "a"])
    with pytest.raises(UserError, match=r"^texts: is a single text, whose letters are no texts; give a list$"):
        TinyBert().tokenizer("Mary went to the garden.")


@pytest.mark.parametrize("content", [b"", b"text", None], ids=["empty", "text", "weights"])
def test_what_holds_no_memory(content: bytes | None, answerer: Answerer, tmp_path: Path) -> None:
    path = tmp_path / "memory"
    if content is None:
        answerer.save_pretrained(tmp_path / "model")
        path = tmp_path / "model" / "head.safetensors"
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"holds no memory; give what Memory\.save has written$"):
        Memory.load(path)
    with pytest.raises(UserError, match=r"absent: cannot be read \(.*\); give what Memory\.save has written$"):
        Memory.load(tmp_path / "absent")


@pytest.mark.fault("a file of a memory is damaged", "it is refused in one line")
@pytest.mark.parametrize(
    "change",
    [
        {"end": torch.tensor([99_999])}, {"end": torch.tensor([-1])}, {"end": torch.tensor([[1]])},
        {"end": torch.tensor([1.0])}, {"state": []}, {"state": [torch.ones(1, 2, 3)] * 2},
        {"state": [torch.full((1, 4, 16), torch.nan)]}, {"state": [torch.ones(1, 4, 16, dtype=torch.complex64)]},
        {"state": [torch.ones(1, 4, 16).long()]},
        {"state": [torch.full((1, 4, 16), torch.nan).to(torch.float8_e4m3fn)]},
    ],
    ids=str,
)  # fmt: skip
def test_what_is_no_memory_of_this_model(change: dict[str, Any], answerer: Answerer) -> None:
    damaged = replace(answerer.read(BOOK), **change)
    for use in (lambda: answerer.ask(damaged, "Who?"), lambda: answerer.read(BOOK, damaged)):
        with pytest.raises(UserError, match=r"^memory: is damaged; read the text again$"):
            use()


def test_what_is_no_memory_at_all(answerer: Answerer) -> None:
    with pytest.raises(UserError, match=r"^memory: is a str; give what read or Memory.load returns$"):
        answerer.ask("book.memory", "Who?")  # type: ignore[arg-type]


@pytest.mark.fault("a memory that may not be read is about to be overwritten", "one line says so, and it stays")
def test_a_memory_of_somebody_else(
    ask: Callable[..., list[str]], answerer: Answerer, monkeypatch: pytest.MonkeyPatch
) -> None:
    answerer.read(BOOK).save("kept")
    # Even the superuser may not, it seems.
    monkeypatch.setattr("rmt_lightning.core.files.os.access", lambda path, mode: str(path) != "kept")
    (line,) = ask("model=mary", "text=book.txt", "save=kept", code=2)
    assert line == "error: kept: cannot be read (Permission denied); ask whose it is for that"


@pytest.mark.parametrize("name", ["x" * 300, "a\nb"])
def test_names_that_no_folder_has(name: str) -> None:
    with pytest.raises(UserError, match=r"^(x{300}|a\\nb): no such folder, and cannot be loaded from"):
        Answerer.from_pretrained(name)


def test_a_head_without_bias_is_opened_again(answerer: Answerer, tmp_path: Path) -> None:
    plain = Answerer(answerer.model, nn.Linear(answerer.model.width, 2, bias=False), ["yes", "no"])
    plain.save_pretrained(tmp_path)
    assert torch.equal(Answerer.from_pretrained(tmp_path).head.weight, plain.head.weight)


def test_no_device_is_taken_for_a_memory(answerer: Answerer, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    memory = answerer.read("")
    for name in ("folder", "pipe"):
        for use in (memory.save, Memory.load):
            with pytest.raises(UserError, match=rf"{name}: is no plain file; give what Memory.save has written, or an"):
                use(tmp_path / name)


@pytest.mark.fault("a saved model is somebody else's, or holds a pipe", "it can be read; one line says so")
def test_a_saved_model_is_for_others_too(answerer: Answerer, tmp_path: Path) -> None:
    answerer.save_pretrained(tmp_path)
    modes = {path.stat().st_mode for path in tmp_path.iterdir() if path.is_file()}
    assert len(modes) == 1
    (tmp_path / "head.safetensors").unlink()
    os.mkfifo(tmp_path / "head.safetensors")
    with pytest.raises(UserError, match=r"head\.safetensors: is no plain file; remove it, or put the file back"):
        Answerer.from_pretrained(tmp_path)


@pytest.fixture
def ask(
    answerer: Answerer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., list[str]]]:
    def run(*words: str, code: int = 0) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["ask", *words])
        GlobalHydra.instance().clear()
        if code:
            with pytest.raises(SystemExit) as end:
                front_door.run()
            assert end.value.code == code
        else:
            front_door.run()
        told = capsys.readouterr()
        return (told.err if code else told.out).splitlines()

    answerer.save_pretrained(tmp_path / "mary")
    (tmp_path / "book.txt").write_text(BOOK)
    (tmp_path / "empty").touch()
    (tmp_path / "questions").write_text("\ufeffWhere is Mary?\r\n\n  Who?\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    yield run
    GlobalHydra.instance().clear()


def test_the_command_answers(
    ask: Callable[..., list[str]], answerer: Answerer, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = answerer.read(BOOK)
    told = [
        f"{question} → " + ", ".join(f"{text} ({share:.1%})" for text, share in answerer.ranked(memory, question, 2)[0])
        for question in ("Where is Mary?", "Who?")
    ]
    asked = ask("model=mary", "text=book.txt", "questions=questions", "top_k=2", "save=kept")
    assert asked == [
        f"kept holds what is remembered of {memory.tokens:,} tokens; memory=kept reads on, or asks it",
        *told,
    ]
    assert ask("folder=mary", "memory=kept", "question=[Where is Mary?,Who?]", "top_k=2") == told
    # A line is a question, whatever stands in it, and stays a line.
    Path("odd").write_text("Where\u2028is\x0cMary?\n\x1b[2JWho?")
    assert [line.partition(" → ")[0] for line in ask("model=mary", "memory=kept", "questions=odd")] == [
        r"Where\u2028is\x0cMary?", r"\x1b[2JWho?",
    ]  # fmt: skip
    # Nobody is asked for questions by a command that saves.
    assert len(ask("folder=mary", "text=book.txt", "save=again")) == 1 and Path("again").exists()
    (alone,) = ask("folder=mary", "text=book.txt", "question=Who?", "top_k=2")
    assert alone == told[1]
    # What is piped in is read on from there; questions are typed at a terminal.
    monkeypatch.setattr(sys, "stdin", io.StringIO("John went to the office."))
    more = answerer.read("John went to the office.", memory)
    (best,) = answerer.ranked(more, "Who?", 1)[0]
    assert ask("model=mary", "memory=kept", "text=-", "question=Who?") == [
        f"Who? → {best.text} ({best.probability:.1%})"
    ]
    typed = iter(["Who?", "", "Where is Mary?"])

    def prompt(_: str) -> str:
        for question in typed:
            return question
        raise EOFError

    monkeypatch.setattr("builtins.input", prompt)
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdin", terminal)
    assert ask("model=mary", "text=book.txt", "top_k=2") == [*reversed(told), ""]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("text=book.txt question=Who?", "folder: is missing; give folder=…"),
        ("model=absent text=book.txt question=Who?", "absent: no such folder, and cannot be loaded from the Hugging"),
        ("model=mary question=Who?", "text: is missing; give text=<file>, text=- for what is piped in, or memory="),
        ("model=mary text=book.txt", "question: is missing; give question=…, questions=<file>, or save=<file>"),
        ("model=mary text=book.txt question=Who? questions=questions", "questions: question= is given too; leave one"),
        ("model=mary text=book.txt questions=absent", "questions=absent: cannot be read (No such file or directory);"),
        ("model=mary text=absent question=Who?", "absent: cannot be read (No such file or directory); give the path"),
        ("model=mary memory=book.txt question=Who?", "book.txt: holds no memory; give what Memory.save has written"),
        ("model=mary text=book.txt save=no/kept question=Who?", "save=no/kept: there is no folder "),
        ("model=mary text=book.txt save=book.txt", "save=book.txt: is there already, and holds no memory; choose"),
        ("model=mary text=book.txt save=mary", "save=mary: is there already, and holds no memory; choose another"),
        ("model=mary text=book.txt question=[]", "question: asks nothing; give a question, or several as [one,anot"),
        ("model=mary text=book.txt question=", "question=: is empty; give a value, or leave it out"),
        ("model=mary text=book.txt question=Who? top_k=0", "top_k=0: must be greater than or equal to 1"),
        (f"model=mary text=book.txt question={'Who' * 99}? top_k=0", "top_k=0: must be greater than or equal to 1"),
        ("model=mary text=empty question=Who?", "text=empty: is empty; give text"),
        ("model=mary text=book.txt save=/proc/kept question=Who?", "save=/proc/kept: cannot be written"),
        ("model=mary text=book.txt question=7", "question=7: must be "),
        ("model=mary text=book.txt qestion=Who?", "qestion: no such setting; did you mean question"),
    ],
)
def test_mistakes_are_told_in_one_line(
    words: str, message: str, ask: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    (line,) = ask(*words.split(), code=2)
    assert line.startswith(f"error: {message}")
