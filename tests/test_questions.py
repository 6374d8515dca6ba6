"""Questions of one's own files, and open answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pyarrow import Table, parquet
from transformers import PreTrainedTokenizerBase

from rmt_lightning.analysis.extrapolation import replies, score_length
from rmt_lightning.core.errors import UserError
from rmt_lightning.models.generation import generate
from rmt_lightning.models.recurrence import Segment
from rmt_lightning.models.rmt import RMTDecoder
from rmt_lightning.models.tiny import TinyGPT
from rmt_lightning.tasks.corpus import Corpus, tokenize
from rmt_lightning.tasks.datamodule import FactDataset
from rmt_lightning.tasks.facts import Split
from rmt_lightning.tasks.noise import Blank
from rmt_lightning.tasks.placement import Key, Placement
from rmt_lightning.tasks.questions import QA
from rmt_lightning.training.generation import FactGenerator

ROW: dict[str, Any] = {"facts": ["Ada has the key."], "question": "Who has it?", "answer": "Ada"}
NAMES = ("Ada", "Bo", "Cem")
ROWS = [ROW | {"facts": [f"{NAMES[n % 3]} has key {n}."], "answer": NAMES[n % 3]} for n in range(30)]


def write(path: Path, rows: list[Any]) -> str:
    if path.suffix == ".parquet":
        parquet.write_table(Table.from_pylist(rows), path)
    else:
        path.write_text(json.dumps(rows) if path.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def sizes(task: QA) -> list[int]:
    return [len(task.questions(split)) for split in ("train", "validation", "test")]


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_questions_of_ones_own(kind: str, tmp_path: Path) -> None:
    task = QA(write(tmp_path / f"my.{kind}", ROWS))
    assert sizes(task) == [24, 3, 3] and task.answers == NAMES
    told = "24 questions for training; 3 for validation, a tenth of task.path; 3 for test, a tenth of task.path"
    assert task.remarks == (told,)
    example = task.questions("train")[0]
    assert (example.facts, example.question, example.answer) == (("Ada has key 0.",), "Who has it?", "Ada")
    assert {*NAMES, "Who has it?", "Ada has key 0."} <= set(task.sentences())


def test_a_context_is_cut_into_sentences(tmp_path: Path) -> None:
    rows = [
        {"context": f"Ada has key {n}. It\nrained.  Bo left!", "question": " Who ? ", "answer": "a b"}
        for n in range(12)
    ]
    example = QA(write(tmp_path / "my.jsonl", rows)).questions("train")[0]
    assert example.facts == ("Ada has key 0.", "It rained.", "Bo left!") and example.support == (0, 1, 2)
    assert (example.question, example.answer) == ("Who ?", "a b")


@pytest.mark.fault("several rows are about the same text", "all of them are on one side")
def test_rows_that_tell_the_same_stay_together(tmp_path: Path) -> None:
    rows = [row | {"question": f"Who is {n}?"} for row in ROWS[:15] for n in range(4)]
    task = QA(write(tmp_path / "my.jsonl", rows))
    sides = [{example.facts for example in task.questions(split)} for split in ("train", "validation", "test")]
    assert sizes(task) == [52, 4, 4] and len(set.union(*sides)) == sum(map(len, sides)) == 15


def test_rows_and_files_that_name_their_split(tmp_path: Path) -> None:
    marked = [row | {"split": ["train", "dev", "test"][n // 10]} for n, row in enumerate(ROWS)]
    task = QA(write(tmp_path / "my.jsonl", marked))
    assert sizes(task) == [10, 10, 10] and task.questions("test")[0].facts == ("Cem has key 20.",)
    assert "10 for test, all of task.path of split test" in task.remarks[0]
    # What no row names is held back.
    assert sizes(QA(write(tmp_path / "my.jsonl", [*ROWS[:20], ROWS[20] | {"split": "test"}]))) == [18, 2, 1]
    test = write(tmp_path / "test.jsonl", [ROW | {"answer": "Zed"}, ROWS[3] | {"split": "test"}])
    task = QA(write(tmp_path / "my.jsonl", ROWS), test_path=test)
    assert sizes(task) == [27, 3, 2] and "Zed" not in task.answers
    assert task.remarks[1:] == (
        "of the 2 questions for test, 1 stand in training too, word for word",
        "of the 2 questions for test, 1 have answers that it never gives",
    )
    # Where nothing is trained, a test file is enough.
    assert len(QA(test_path=test).questions("test")) == 2
    with pytest.raises(UserError, match=r"^task\.path: is missing; give task\.path=…"):
        QA(test_path=test).questions("train")


@pytest.mark.fault("rows differ in large letters or spaces alone", "they are one: none is on both sides")
def test_rows_that_look_alike_are_one(tmp_path: Path) -> None:
    again = [row | {"facts": [row["facts"][0].upper() + " "], "question": "Who has\u00a0it?"} for row in ROWS]
    task = QA(write(tmp_path / "my.jsonl", ROWS + again))
    assert sizes(task) == [48, 3, 3]
    assert not {*task.questions("train")[0].facts} & {*task.questions("test")[0].facts}
    task = QA(write(tmp_path / "my.jsonl", ROWS), test_path=write(tmp_path / "test.jsonl", again[:5]))
    assert task.remarks[1] == "of the 5 questions for test, 5 stand in training too, word for word"


@pytest.mark.fault("rows give several answers to one question", "they are counted, and said")
def test_rows_that_contradict_each_other(tmp_path: Path) -> None:
    other = [row | {"answer": "Dan"} for row in ROWS[:6]]
    said = "questions with several answers to the same facts: {}; one of them at most counts as right"
    assert QA(write(tmp_path / "my.jsonl", ROWS + other)).remarks[1] == said.format(6)
    task = QA(write(tmp_path / "my.jsonl", ROWS), test_path=write(tmp_path / "test.jsonl", other[:2]))
    assert task.remarks[1] == said.format(2)


def test_that_answers_are_open_is_told(tmp_path: Path) -> None:
    rows = [row | {"answer": f"number {n}"} for n, row in enumerate(ROWS)]
    task = QA(write(tmp_path / "my.jsonl", rows))
    told = "30 different answers to 24 questions; if they are open ones, answer=generate writes them"
    assert task.remarks[-1] == told


@pytest.mark.fault("a row that is no question", "one line names file and line")
@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({}, "has no facts and no context; it has nothing"),
        ({"input": "x", "target": "y"}, "has no facts and no context; it has input, target"),
        (ROW | {"context": "Ada left."}, "has both facts and a context; leave one out"),
        (ROW | {"facts": []}, "has facts that are []; give a list of sentences"),
        (ROW | {"facts": "Ada left."}, "has facts that are 'Ada left.'; give a list of sentences"),
        (ROW | {"facts": ["Ada left.", 3]}, "has fact 2 3, which is no text"),
        (ROW | {"facts": [" "]}, "has fact 1 ' ', which is no text"),
        ({"context": "Ada left."}, "has no question; it has context"),
        (ROW | {"answer": None}, "has no answer; it has facts, question"),
        (ROW | {"answer": 3}, "has answer 3, which is no text"),
        (ROW | {"question": "\ud83d"}, "has question '\\ud83d', which is no text"),
        (ROW | {"split": "tset"}, "has the split 'tset'; give train, validation or test"),
        (7, "holds int, and no object"),
    ],
)
def test_what_is_no_question(row: Any, why: str, tmp_path: Path) -> None:
    path = write(tmp_path / "my.jsonl", [*ROWS, row])
    with pytest.raises(UserError) as refused:
        QA(path)
    told = str(refused.value)
    assert told.startswith(f"task.path={path}: ") and "line 31" in told and why in told and "\n" not in told


@pytest.mark.parametrize(
    ("content", "options", "why"),
    [
        ([], {}, "task.path=HERE: is empty; give rows with facts or context, question and answer"),
        (ROWS[:9], {}, "task.path=HERE: holds 9 different texts; at least 10 are needed to hold some back; give more"),
        ([ROW] * 30, {}, "task.path=HERE: holds 1 different texts; at least 10 are needed"),
        ([ROW | {"split": "test"}], {"test_path": "HERE"}, "task.test_path=HERE: task.path has rows of split test too"),
        (ROWS, {"test_path": "no"}, "task.test_path=no: no .json, .jsonl, .parquet file there"),
        (
            [ROW | {"split": "train"}],
            {"test_path": "HERE", "path": None},
            "line 1 has the split train, in a file for te",
        ),
    ],
)
def test_files_that_do_not_do(content: list[Any], options: dict[str, str], why: str, tmp_path: Path) -> None:
    path = write(tmp_path / "my.jsonl", content)
    given: dict[str, Any] = {"path": path} | {
        key: value and value.replace("HERE", path) for key, value in options.items()
    }
    with pytest.raises(UserError) as refused:
        QA(**given)
    assert why.replace("HERE", path) in str(refused.value)


SIZE = {"width": 16, "layers": 2, "heads": 2, "max_positions": 64}


def test_open_answers_are_written_and_judged(tmp_path: Path) -> None:
    """A model that writes is right by its words, known or not; a text without noise is read as it is."""
    rows = [row | {"answer": f"key {n}, the old"} for n, row in enumerate(ROWS)]
    task = QA(write(tmp_path / "my.jsonl", rows))
    tokenizer = TinyGPT().tokenizer([*task.sentences()] * 3)
    torch.manual_seed(0)
    model = RMTDecoder(TinyGPT(**SIZE).decoder(tokenizer), 40, memory_size=3)
    module = FactGenerator(model, task.answers).eval()
    placement = Placement(task, tokenize(Blank(), tokenizer, tmp_path), tokenizer, model.text_length, seed=1)
    cpu = torch.device("cpu")
    for like in (Key(2, 0), Key(0, 0, tokens=0), Key(0, 0, tokens=100)):
        found = list(replies(module, placement, like, None, 2, cpu))
        alone = replies(module, placement, like, None, 1, cpu)
        assert [reply.said for reply in found] == [reply.said for reply in alone]
        result = score_length(found, placement, like, module.WRITES)
        assert result.exact is not None and 0 <= result.exact <= result.f1 <= 1
        assert {"exact_match", "f1"} <= result.row().keys()
    # After full segments, it is what the model writes anyway.
    ids = FactDataset(placement, "test")[Key(2, 0)].input_ids
    (said,) = module.say(map(Segment, ids[None].unbind(dim=1)))
    written = generate(model, ids.flatten()[None], 20, stop_tokens=[module.end]).input_ids[0]
    assert said == tokenizer.decode(written, skip_special_tokens=True).strip()


def test_what_looks_alike_may_be_written(tmp_path: Path) -> None:
    task = QA(write(tmp_path / "my.jsonl", [row | {"answer": f"the  key {n}"} for n, row in enumerate(ROWS)]))
    assert "the key 3" in task.answers
    tokenizer = TinyGPT().tokenizer([*task.sentences()])
    module = FactGenerator(RMTDecoder(TinyGPT(**SIZE).decoder(tokenizer), 40, memory_size=3), ["key", "key", "a key"])
    assert module.words.shape[0] == 3


def test_an_answer_that_is_none_of_the_task_is_nobodys(
    tmp_path: Path, corpora: dict[Split, Corpus], tokenizer: PreTrainedTokenizerBase
) -> None:
    task = QA(write(tmp_path / "my.jsonl", ROWS), test_path=write(tmp_path / "test.jsonl", [ROW | {"answer": "Zed"}]))
    placement = Placement(task, corpora, tokenizer, text_length=30, seed=1)
    assert (placement.answer_ids("Zed") == -1).all() and (placement.answer_ids("Ada") >= 0).any()
    batch = FactDataset(placement, "test")[Key(1, 0)]
    assert np.all(batch.answer.numpy() == -1) and placement.same("zed", "Zed") and not placement.same(None, "Zed")
