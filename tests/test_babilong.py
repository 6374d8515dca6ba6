"""BABILong: the task, lengths in tokens, and published sets."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from pyarrow import parquet
from transformers import PreTrainedTokenizerBase

from rmt_lightning import evaluate as front_door
from rmt_lightning.analysis.extrapolation import LengthTest, overlap, replies, score_length
from rmt_lightning.core.errors import UserError
from rmt_lightning.core.tokens import in_short, token_count
from rmt_lightning.models.recurrence import Segment
from rmt_lightning.models.rmt import RMTEncoder
from rmt_lightning.reporting import sweeps
from rmt_lightning.tasks.babi import Babilong
from rmt_lightning.tasks.corpus import Corpus
from rmt_lightning.tasks.facts import Detect, Split
from rmt_lightning.tasks.placement import Key, Placement, side_by_side
from rmt_lightning.tasks.published import LABELS, Part, PublishedSet, is_right
from rmt_lightning.training.answering import FactClassifier

PLACES = ("office", "bathroom", "garden", "bedroom", "kitchen", "hallway")
PEOPLE = ("Mary", "John", "Daniel", "Sandra")


def stories(*, verb: str = "moved", places: tuple[str, ...] = PLACES) -> str:
    return "".join(
        f"1 {person} {verb} to the {place}.\n2 Fred went to the attic.\n3 Where is {person}? \t{place}\t1\n"
        for person in PEOPLE
        for place in places
    )


@pytest.fixture
def babi(tmp_path: Path) -> Path:
    """A folder of two tasks: the first is whole, of the second there is a train file only."""
    folder = tmp_path / "en-10k"
    folder.mkdir()
    (folder / "qa1_single-supporting-fact_train.txt").write_text(stories())
    (folder / "qa1_single-supporting-fact_test.txt").write_text(stories(verb="went", places=(*PLACES[:2], "moon")))
    (folder / "qa4_two-arg-relations_train.txt").write_text(stories())
    (folder / "notes.txt").write_text("none of these")
    return folder


@pytest.mark.fault("a test file asks for what training never says", "it is counted as wrong, and said")
def test_train_and_test_file_are_never_mixed(babi: Path) -> None:
    task = Babilong(str(babi))
    train, validation, test = (task.questions(split) for split in ("train", "validation", "test"))
    assert [len(part) for part in (train, validation, test)] == [22, 2, 12]
    assert all(" moved " in example.facts[0] for example in (*train, *validation))
    assert all(" went " in example.facts[0] and len(example.facts) == 2 for example in test)
    assert task.answers == tuple(sorted(PLACES)) and "moon" in {example.answer for example in test}
    assert task.remarks[0].endswith("12 for test, all of qa1_single-supporting-fact_test.txt")
    assert task.remarks[1:] == ("of the 12 questions for test, 4 have answers that it never gives",)
    # Nothing of the test teaches a tokenizer.
    assert not any("moon" in sentence or " went to the office" in sentence for sentence in task.sentences())
    assert Babilong(str(babi), "QA1").questions("test") == test
    # As bAbI comes with a file for validation.
    for part, text in (("train", stories()), ("valid", stories(verb="ran")), ("test", stories(verb="went"))):
        (babi / f"qa2_{part}.txt").write_text(text)
    assert {e.facts[0].split()[1] for e in Babilong(str(babi), "qa2").questions("validation")} == {"ran"}


@pytest.mark.parametrize(
    ("name", "folder", "message"),
    [
        ("qa3", "", "task.name=qa3: task.folder=FOLDER has no train file of it; whole there: qa1"),
        (
            "qa4", "", "task.name=qa4: task.folder=FOLDER has no test file of it; whole there: qa1; "
            "task=babi task.path=FOLDER/qa4_two-arg-relations_train.txt holds a part of it back",
        ),
        ("qa1", "..", "task.name=qa1: task.folder=FOLDER/.. has no train file of it; give the folder of files such as"),
        ("qa1", "no", "task.folder=FOLDER/no: cannot be read (No such file or directory); give the folder of"),
        ("qa1", "notes.txt", "task.folder=FOLDER/notes.txt: cannot be read (Not a directory); give the folder"),
        ("qa5", "", "task.folder=FOLDER: holds qa5_one_test.txt and qa5_two_test.txt; give a folder with one of them"),
        ("qa6", "", "task.folder=FOLDER/qa6_train.txt: line 2 asks without a tab before the answer"),
        (
            "qa7", "", "task.folder=FOLDER/qa7_train.txt: holds 1 bAbI stories; at least 10 are needed to hold some "
            "back; give more, or a file for validation, such as qa1_valid.txt",
        ),
        ("qa8", "", "task.name=qa8: task.folder=FOLDER has no train file of it; whole there: qa1, qa7"),
    ],
)  # fmt: skip
def test_which_files_there_are(babi: Path, name: str, folder: str, message: str) -> None:
    if name == "qa5":
        for part in ("one", "two"):
            (babi / f"qa5_{part}_test.txt").write_text(stories())
    for part in ("train", "test"):
        (babi / f"qa6_{part}.txt").write_text("1 Mary left.\n2 Where is Mary?\n")
    if name in ("qa7", "qa8"):
        for part in ("train", "test"):
            (babi / f"qa7_{part}.txt").write_text("1 Mary left.\n2 Who left?\tMary\t1\n")
            (babi / f"qa8_{part}.txt").mkdir()
    if name != "qa6":
        for part in ("train", "test"):
            (babi / f"qa6_{part}.txt").unlink()
    place = babi / folder if folder != ".." else f"{babi}/.."
    with pytest.raises(UserError) as refused:
        Babilong(str(place), name)
    assert str(refused.value).startswith(message.replace("FOLDER", str(babi)))


def test_lists_and_numbers_are_answers_too(babi: Path) -> None:
    text = stories().replace("\toffice\t", "\tapple,milk\t").replace("\tgarden\t", "\tnothing\t")
    for part in ("train", "test"):
        (babi / f"qa8_lists-sets_{part}.txt").write_text(text)
    task = Babilong(str(babi), "qa8")
    assert {"apple,milk", "nothing"} <= set(task.answers) and {"apple,milk", "nothing"} <= set(task.sentences())


def test_the_real_files(shared_data: Path) -> None:
    folder = shared_data / "babi/en-10k"
    task = Babilong(str(folder), "qa1")
    assert len(task.questions("test")) == 1000 and task.answers == tuple(sorted(PLACES))
    with pytest.raises(UserError, match=r"has no test file of it; whole there: qa1, qa2; task=babi task\.path="):
        Babilong(str(folder), "qa4")


@pytest.mark.parametrize(
    ("given", "count", "short"),
    [(0, 0, "0k"), ("0k", 0, "0k"), (1000, 1000, "1k"), ("64k", 64000, "64k"), ("1M", 10**6, "1M"), ("2K", 2000, "2k"),
     ("10M", 10**7, "10M"), ("1500k", 1_500_000, "1500k"), (333, 333, "333")],
)  # fmt: skip
def test_numbers_of_tokens(given: int | str, count: int, short: str) -> None:
    assert token_count("tokens", given) == count and in_short(count) == short
    assert token_count("tokens", in_short(count)) == count


@pytest.mark.parametrize("given", ["", "k", "1.5k", "1m", "-1", "1kk", "1 k", "10000M", "٣k", "1e3", "None"])
def test_what_is_no_number_of_tokens(given: str) -> None:
    with pytest.raises(UserError, match=r"^test\.tokens: .* is no number of tokens; give whole numbers up to 1000M"):
        LengthTest([1], None, [1, given])


@pytest.mark.parametrize("tokens", [0, 33, 100, 1000])
def test_lengths_in_tokens(
    tokens: int, babi: Path, corpora: dict[Split, Corpus], tokenizer: PreTrainedTokenizerBase
) -> None:
    """All that stands before the question is as long as was asked for, facts whole and in order."""
    for task in (Babilong(str(babi)), Detect()):
        placement, like = Placement(task, corpora, tokenizer, text_length=30, seed=3), Key(0, 0, tokens=tokens)
        assert placement.fits("test", like) == 1
        for number in range(10):
            sample = placement.sample("test", like._replace(number=number))
            assert sample.example is not None
            segments = list(sample.pieces)
            question = segments[-1][-1]
            told = [(piece.source, s) for s, pieces in enumerate(segments) for piece in pieces]
            assert question.source == "question"
            sizes = [sum(len(piece.ids) for piece in pieces) for pieces in segments]
            facts = sum(len(piece.ids) for pieces in segments for piece in pieces if isinstance(piece.source, int))
            assert sum(sizes) - len(question.ids) == (tokens or facts) and sum(sizes) == sample.tokens
            assert len(sizes) == sample.num_segments <= placement.longest("test", like)
            assert tokens == 0 or sizes[1:] == [30] * (len(sizes) - 1)
            assert [source for source, _ in told if isinstance(source, int)] == [*range(len(sample.example.facts))]
            assert sample.homes == tuple(segment for source, segment in told if isinstance(source, int))
    again = placement.sample("test", like)
    assert [ids.tolist() for ids in again.segments] == [ids.tolist() for ids in placement.sample("test", like).segments]


def test_no_more_is_made_than_is_read(
    babi: Path, corpora: dict[Split, Corpus], tokenizer: PreTrainedTokenizerBase
) -> None:
    placement = Placement(Babilong(str(babi)), corpora, tokenizer, text_length=30, seed=3)
    sample = placement.sample("test", Key(0, 0, tokens=10**9))
    sizes = [len(ids) for _, ids in zip(range(3), sample.segments, strict=False)]
    assert sizes[0] <= 30 and sizes[1:] == [30, 30] and sample.num_segments * 30 >= 10**9


def test_facts_stand_anywhere_in_so_many_tokens(
    corpora: dict[Split, Corpus], tokenizer: PreTrainedTokenizerBase
) -> None:
    placement = Placement(Detect(), corpora, tokenizer, text_length=30, seed=3)
    homes = [placement.sample("test", Key(0, number, tokens=299)).homes[0] for number in range(600)]
    # The first of its 11 segments is short.
    counts = np.bincount(homes, minlength=11)
    assert counts[0] < 30 and counts[1:].min() > 30


@pytest.mark.fault("facts take more tokens than are asked for", "the question is left out, and the share is told")
def test_questions_that_so_many_tokens_have_no_room_for(
    babi: Path, corpora: dict[Split, Corpus], tokenizer: PreTrainedTokenizerBase
) -> None:
    placement = Placement(Babilong(str(babi)), corpora, tokenizer, text_length=30, seed=3)
    assert placement.fits("test", Key(0, 0, tokens=3)) == 0 and placement.longest("test", Key(0, 0, tokens=3)) == 0
    with pytest.raises(UserError, match="none of its questions fits into 3 tokens, for they take"):
        placement.asked("test", None, Key(0, 0, tokens=3))


def test_texts_of_any_length_end_together() -> None:
    rows = [(1, iter([np.array([1, 2])])), (2, iter([np.array([3]), np.array([4, 5])]))]
    (first, mask), (last, full) = side_by_side(rows)
    assert mask is not None and full is None
    assert first.tolist() == [[0], [3]] and mask.tolist() == [[0], [1]] and last.tolist() == [[1, 2], [4, 5]]


def test_samples_of_unequal_lengths_are_read_as_if_each_were_alone(
    babi: Path, corpora: dict[Split, Corpus], tokenizer: PreTrainedTokenizerBase, make_model: Callable[..., RMTEncoder]
) -> None:
    model = make_model(segment_length=37, double=False).eval()
    placement = Placement(Babilong(str(babi)), corpora, tokenizer, model.text_length, seed=3)
    module = FactClassifier(model, placement.task.answers).eval()
    cpu, like = torch.device("cpu"), Key(0, 0, tokens=0)
    together = list(replies(module, placement, like, None, 12, cpu))
    assert [reply.said for reply in together] == [
        reply.said for reply in replies(module, placement, like, None, 1, cpu)
    ]
    for reply in together[:4]:
        ids = np.concatenate(list(placement.sample("test", reply.key).segments))
        assert reply.tokens == len(ids)
        if reply.segments == 1:
            (said,) = module.say(iter([Segment(torch.tensor(ids)[None])]))
            assert said == reply.said
    result = score_length(together, placement, like)
    assert (result.samples, result.tokens, result.questions, result.fits) == (12, 0, 12, 1.0)
    assert result.segments == max(reply.segments for reply in together) and result.exact is None
    # A place that training has never heard of is nobody's answer.
    assert not any(reply.right for reply in together if reply.example.answer == "moon")


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def babilong_run(tmp_path_factory: pytest.TempPathFactory, trained: Callable[..., Path]) -> Path:
    folder = tmp_path_factory.mktemp("babi")
    for part, verb in (("train", "moved"), ("test", "went")):
        (folder / f"qa1_{part}.txt").write_text(stories(verb=verb))
    words = ("task=babilong", f"task.folder={folder}", "test.segments=[1]", "test.tokens=[0,100,1k]")
    return trained(*words, "curriculum.max_segments=1", "data.segment_length=48")


@pytest.fixture
def evaluate(babilong_run: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RMT_LIGHTNING_CACHE", str(cache))

    def run(*words: str) -> Path:
        """The folder that the results are in."""
        given = ["evaluate", f"checkpoint={babilong_run}", "device=cpu", "output=found", *words]
        monkeypatch.setattr(sys, "argv", given)
        GlobalHydra.instance().clear()
        front_door.run()
        (folder,) = (tmp_path / "found" / "evaluations").iterdir()
        return folder

    yield run
    GlobalHydra.instance().clear()


def test_a_run_tests_lengths_in_tokens_and_so_does_evaluate(
    babilong_run: Path, evaluate: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    end, told = rows(babilong_run / "evaluation.csv"), lines(babilong_run / "predictions.jsonl")
    assert [row["tokens"] for row in end] == ["", "0", "100", "1000"] and end[0]["segments"] == "1"
    assert [int(row["segments"]) for row in end[2:]] == [4, 29]
    assert 1000 < int(end[3]["text_tokens"]) < 1010 and int(end[1]["text_tokens"]) < 40
    lengths = ["1 segments", "0 tokens", "100 tokens", "1000 tokens"]
    assert [row["length"] for row in told] == [length for length in lengths for _ in range(8)]
    for length, row in zip(lengths, end, strict=True):
        of_length = [line for line in told if line["length"] == length]
        assert sum(line["right"] for line in of_length) == int(row["right"])
        assert all(line["right"] == (line["answer"] == line["target"]) for line in of_length)
        assert all(line["question"].startswith("Where is ") and line["distance"] >= 0 for line in of_length)
    # Without segments of powers of two, for lengths are given; and again without what has been found.
    folder = evaluate("samples=8", "follow=0", "tokens=[1k,0]")
    assert "1,000" in capsys.readouterr().out
    assert [(row["tokens"], row["right"]) for row in rows(folder / "evaluation.csv")] == [
        (row["tokens"], row["right"]) for row in (end[1], end[3])
    ]
    assert {line["length"] for line in lines(folder / "predictions.jsonl")} == {"0 tokens", "1000 tokens"}
    monkeypatch.setattr("rmt_lightning.app.evaluation._test", None)
    assert evaluate("samples=8", "follow=0", "tokens=[0]") == folder


def test_sweeps_have_a_column_for_each_length() -> None:
    names = ["accuracy_1000_tokens", "accuracy_16", "accuracy_0_tokens", "accuracy_2"]
    told = [sweeps.in_words(name) for name in sorted(names, key=sweeps._order)]
    assert told == ["at 2 segments", "at 16 segments", "at 0k tokens", "at 1k tokens"]


def test_overlap_of_words() -> None:
    """The rules of SQuAD: case, punctuation and articles do not count."""
    said = [("The Garden.", "garden"), ("to the red garden", "garden"), ("kitchen", "office"), ("", "office")]
    assert overlap(said) == pytest.approx((1 / 4, (1 + 1 / 2) / 4))


@pytest.mark.parametrize(
    ("task", "target", "said", "question", "right"),
    [
        ("qa1", "garden", "garden", "Where is Mary?", True),
        ("qa1", "garden", "  The most recent location of Mary is Garden. ", "Where is Mary?", True),
        ("qa1", "Garden", "GARDEN", "Where is Mary?", True),
        ("qa1", "garden", "gardens and more", "Where is Mary?", True),
        ("qa1", "garden", "garden. Before, it was the office.", "Where is Mary?", True),
        ("qa1", "garden", "I think. garden", "Where is Mary?", False),
        ("qa1", "garden", "garden or office", "Where is Mary?", False),
        ("qa1", "garden", "office", "Where is Mary?", False),
        ("qa1", "garden", "", "Where is Mary?", False),
        ("qa1", "moon", "moon", "Where is Mary?", False),
        ("qa1", "garden", "garden <context> office", "Where is Mary?", True),
        ("qa1", "garden", "<example> garden", "Where is Mary?", False),
        ("qa1", "garden", "garden Question: is it the office?", "Where is Mary?", False),
        ("qa3", "garden", "before the kitchen it was in the garden", "Where was it before the Kitchen?", True),
        ("qa3", "kitchen", "kitchen", "Where was the apple before the kitchen?", False),
        ("qa5", "Fred", "Bill gave the milk to fred", "Who did Bill give the milk to?", True),
        ("qa5", "Fred", "Bill gave the milk to fred", "Who did Mary give the milk to?", False),
        ("qa6", "no", "no", "Is John in the office?", True),
        ("qa6", "no", "I do not know", "Is John in the office?", True),
        ("qa7", "none", "none", "How many objects is Mary carrying?", False),
        ("qa7", "two", "two", "How many objects is Mary carrying?", True),
        ("qa8", "apple,milk", "milk and apple", "What is Mary carrying?", True),
        ("qa8", "apple,milk", "apple", "What is Mary carrying?", False),
        ("qa8", "apple,milk", "apple, milk, football", "What is Mary carrying?", False),
        ("qa8", "apple", "apple,milk", "What is Mary carrying?", False),
        ("qa8", "nothing", "nothing", "What is Mary carrying?", True),
        ("qa19", "n,e", "n,e", "How do you go from here to there?", True),
        ("qa19", "n,e", "n,e,s", "How do you go from here to there?", False),
        ("qa19", "n,e", "n, e", "How do you go from here to there?", False),
    ],
)
def test_the_published_metric(task: str, target: str, said: str, question: str, right: bool) -> None:
    """As compare_answers of booydar/babilong judges them."""
    assert is_right(target, said, question, LABELS[task]) == right


def write_set(folder: Path, layout: str, tasks: tuple[str, ...], lengths: tuple[str, ...]) -> None:
    filler = "The sun was low and the air was still. "
    for task in tasks:
        for length in lengths:
            path = folder / layout.format(task=task, length=length)
            path.parent.mkdir(parents=True, exist_ok=True)
            made = [
                {"target": place, "question": f"Where is {person}? ", "input": text.strip()}
                for person, place in (("Mary", "garden"), ("John", "office"), ("Daniel", "kitchen"))
                for text in [f"{person} went to the {place}. " + filler * (0 if length == "0k" else 100)]
            ]
            if path.suffix == ".json":
                path.write_text(json.dumps(made))
            elif path.suffix == ".jsonl":
                path.write_text("".join(json.dumps(row) + "\n" for row in made))
            else:
                parquet.write_table(pyarrow.Table.from_pylist(made), path)


@pytest.mark.parametrize(
    "layout",
    [
        "data/{task}/{length}.json",
        "{length}/{task}-00000-of-00001.parquet",
        "{task}/{length}-00000-of-00001.parquet",
        "babilong-1k-samples/{task}_{length}.jsonl",
        "{task}-{length}-my.questions.jsonl",
    ],
)
def test_however_a_set_is_laid_out(layout: str, tmp_path: Path) -> None:
    write_set(tmp_path, layout, ("qa2", "qa10", "qa1"), ("1M", "64k", "0k"))
    (tmp_path / "README.md").write_text("# A set")
    published = PublishedSet(str(tmp_path))
    assert [str(part) for part in published.parts] == [
        f"{task} {length}" for length in ("0k", "64k", "1M") for task in ("qa1", "qa2", "qa10")
    ]
    first, *others = published.rows(Part("qa2", "0k"))
    assert tuple(first) == ("Mary went to the garden.", "Where is Mary?", "garden") and len(others) == 2
    some = PublishedSet(str(tmp_path), ["qa10", "qa1"], [0, "1000k"])
    assert [*map(str, some.parts)] == ["qa1 0k", "qa10 0k", "qa1 1M", "qa10 1M"]


@pytest.mark.fault("a file of a published set names a length of 1.5k tokens", "it is refused, not read as 5k")
def test_a_set_of_half_thousands(tmp_path: Path) -> None:
    write_set(tmp_path, "{task}_{length}.jsonl", ("qa1",), ("0k", "1.5k"))
    with pytest.raises(UserError, match=r"^set: 1\.5k is no number of tokens; give whole numbers"):
        PublishedSet(str(tmp_path))
    (tmp_path / "qa1_1.5k.jsonl").rename(tmp_path / "v1.0_qa1.64k.jsonl")
    assert [*map(str, PublishedSet(str(tmp_path)).parts)] == ["qa1 0k", "qa1 64k"]


def test_a_set_whose_names_tell_nothing(tmp_path: Path) -> None:
    write_set(tmp_path, "questions.jsonl", ("qa1",), ("0k",))
    for given in (tmp_path, tmp_path / "questions.jsonl", tmp_path / "*.jsonl"):
        published = PublishedSet(str(given))
        assert published.parts == [("questions", "")] and str(published.parts[0]) == "questions"
    targets = {row.target for row in published.rows(published.parts[0])}
    assert published.labels(published.parts[0], targets) == ("garden", "kitchen", "office")
    # Labels of a task count, unless its answers are others.
    assert published.labels(Part("qa1", "0k"), targets) == LABELS["qa1"]
    assert published.labels(Part("qa1", "0k"), {"moon", "sun"}) == ("moon", "sun")
    assert published.labels(Part("qa8", "0k"), {"apple,milk"}) == LABELS["qa8"]


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("qa1.json", "[]", {}, "no question"),
        ("qa1.jsonl", '{"input": "A.", "question": "B?"}\n', {}, "set=HERE: HERE/qa1.jsonl line 1: target is missing;"),
        ("qa1.jsonl", '{"input": "A.", "question": "B?", "target": 3}', {}, "line 1: target is 3, no text"),
        ("qa1.json", '[{"input": "A.", "question": " ", "target": "c"}]', {}, "row 1: question is ' ', no text"),
        ("qa1.jsonl", '{"input": "\\ud83d", "question": "B?", "target": "c"}', {}, "line 1: input is '\\ud83d', no"),
        ("qa1.jsonl", "{", {}, "set=HERE: HERE/qa1.jsonl is not .jsonl text (line 1: Expecting"),
        ("qa1_1k.jsonl", "{}", {"tasks": ["qa2"]}, "tasks=qa2: set=HERE has no qa2; it has qa1"),
        ("qa1_1k.jsonl", "{}", {"tokens": ["2k"]}, "tokens=2k: set=HERE has no 2k; it has 1k"),
        ("qa1.jsonl", "{}", {"tokens": [0]}, "tokens=0k: set=HERE has no 0k; its files name none"),
        ("notes.txt", "{}", {}, "set=HERE: no .json, .jsonl, .parquet file there; give a file, a folder or a pattern"),
    ],
)  # fmt: skip
def test_what_is_no_set(tmp_path: Path, name: str, content: str, options: dict[str, Any], message: str) -> None:
    (tmp_path / name).write_text(content)
    if message == "no question":
        published = PublishedSet(str(tmp_path))
        assert list(published.rows(published.parts[0])) == []
        return
    with pytest.raises(UserError) as refused:
        published = PublishedSet(str(tmp_path), **options)
        list(published.rows(published.parts[0]))
    assert message.replace("HERE", str(tmp_path)) in str(refused.value)


@pytest.mark.fault("the Hugging Face Hub cannot be reached", "one line says so, at once")
def test_a_set_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for given in ("RMT-team/babilong", "no-such/folder"):
        with pytest.raises(UserError, match=rf"^set={given}: no such folder, and the Hugging Face Hub cannot be asked"):
            PublishedSet(given)
    monkeypatch.setattr("rmt_lightning.tasks.published.out_of_reach", lambda _: "")
    write_set(tmp_path, "data/{task}/{length}.json", ("qa1", "qa2"), ("0k", "1k"))
    fetched = []

    class Hub:
        def list_repo_files(self, name: str, repo_type: str) -> list[str]:
            assert (name, repo_type) == ("RMT-team/babilong", "dataset")
            return ["README.md", *(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.json"))]

        def hf_hub_download(self, name: str, file: str, repo_type: str) -> str:
            fetched.append(file)
            return str(tmp_path / file)

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    published = PublishedSet("RMT-team/babilong", ["qa2"], ["1k"])
    assert published.parts == [("qa2", "1k")] and fetched == []
    assert len(list(published.rows(published.parts[0]))) == 3 and set(fetched) == {"data/qa2/1k.json"}
    with pytest.raises(
        UserError, match=r"^set=RMT-team/other: cannot be read from the Hugging Face Hub \(AssertionErr"
    ):
        PublishedSet("RMT-team/other")


def test_the_published_layout(
    evaluate: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_set(tmp_path / "set", "data/{task}/{length}.json", ("qa1", "qa5"), ("0k", "1k"))
    path = tmp_path / "set/data/qa5/1k.json"
    path.unlink()
    folder = evaluate("set=set")
    told = " ".join(capsys.readouterr().out.split())
    assert "Accuracy (%)" in told and "qa5 0k:" not in told
    found, board = rows(folder / "set.csv"), rows(folder / "leaderboard.csv")
    assert [(row["task"], row["length"], row["samples"]) for row in found] == [
        ("qa1", "0k", "3"), ("qa5", "0k", "3"), ("qa1", "1k", "3"),
    ]  # fmt: skip
    for row in found:
        assert float(row["low"]) <= float(row["accuracy"]) <= float(row["high"]) and row["questions"] == "3"
        assert row["exact_match"] == row["accuracy"]
    assert int(found[0]["text_tokens"]) < 40 < 900 < int(found[2]["text_tokens"])
    assert list(board[0]) == ["model_name", "task", "0k", "1k"]
    assert [(row["model_name"], row["task"]) for row in board] == [("run", name) for name in ("qa1", "qa5", "avg")]
    accuracy = {(row["task"], row["length"]): 100 * float(row["accuracy"]) for row in found}
    assert float(board[0]["1k"]) == pytest.approx(accuracy["qa1", "1k"]) and board[1]["1k"] == board[2]["1k"] == ""
    assert float(board[2]["0k"]) == pytest.approx((accuracy["qa1", "0k"] + accuracy["qa5", "0k"]) / 2)
    predictions = lines(folder / "predictions.jsonl")
    assert [row["length"] for row in predictions] == [name for name in ("qa1 0k", "qa5 0k", "qa1 1k") for _ in range(3)]
    assert all(row["right"] == (row["answer"] == row["target"]) for row in predictions)
    # What another version has not measured is left empty.
    part = {"task": "qa3", "length": "0k", "accuracy": 1.0}
    known = json.loads((folder / "evaluation.json").read_text())
    (folder / "evaluation.json").write_text(json.dumps(known | {"parts": known["parts"] | {"qa3 0k": part}}))
    # What has been asked is not asked again, but where files have changed.
    with monkeypatch.context() as patch:
        patch.setattr("rmt_lightning.app.evaluation._ask_part", None)
        assert evaluate("set=set", "tasks=[qa1]") == folder
        (tmp_path / "set/data/qa1/0k.json").write_text("[]")
        with pytest.raises(TypeError):
            evaluate("set=set")
    assert [row["f1"] for row in rows(folder / "set.csv") if row["task"] == "qa3"] == [""]
    # Of that name there is another one elsewhere.
    write_set(tmp_path / "elsewhere/set", "{task}_{length}.jsonl", ("qa1",), ("0k",))
    monkeypatch.chdir(tmp_path / "elsewhere")
    evaluate("set=set")
    assert [path.name for path in Path("found/evaluations").iterdir()] != [folder.name]


@pytest.mark.fault("the folder of results is removed or renamed in the meantime", "one line; none is made anew")
def test_a_folder_of_results_that_is_gone(
    evaluate: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(*_: Any) -> Any:
        (tmp_path / "found").rename(tmp_path / "renamed")
        return {}, []

    write_set(tmp_path / "set", "{task}_{length}.jsonl", ("qa1",), ("0k",))
    monkeypatch.setattr("rmt_lightning.app.evaluation._ask_part", ask)
    with pytest.raises(SystemExit):
        evaluate("set=set")
    assert "was removed or renamed in the meantime; start it again\n" in capsys.readouterr().err
    assert not (tmp_path / "found").exists()


@pytest.mark.fault("texts of a set are longer than a model can read", "they are left out, and said")
def test_texts_too_long_for_a_model(
    evaluate: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rmt_lightning.models.segment_model.SegmentModel.max_segments", 5)
    write_set(tmp_path / "set", "{task}_{length}.jsonl", ("qa1",), ("0k", "1k"))
    folder = evaluate("set=set")
    told = " ".join(capsys.readouterr().out.split())
    assert "qa1 1k: left out, for some of its texts are longer than 5 segments of 35 tokens" in told
    assert [row["length"] for row in rows(folder / "set.csv")] == ["0k"]
    with pytest.raises(SystemExit):
        evaluate("set=set", "tokens=[1k]")
    assert "error: set=set: all of its texts are too long for this model; give" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (
            "set=set segments=[1]",
            "segments: is nothing for set=set, whose texts are as they are; leave one of them out",
        ),
        ("set=set task=detect", "task: is nothing for set=set"),
        ("set=set stages=true", "stages: is nothing for set=set"),
        ("set=set tasks=[]", "tasks=[]: names no task; give some, such as [qa1,qa2], or leave it out"),
        ("tasks=[qa1]", "tasks=['qa1']: are those of a published set; give set=…, or leave it out"),
        ("set=no/such", "set=no/such: no such folder, and the Hugging Face Hub cannot be asked"),
        ("set=nowhere", "set=nowhere: no .json, .jsonl, .parquet file there"),
        ("set=set tokens=[9x]", "tokens: 9x is no number of tokens"),
        ("set=set", "set=set: qa1 holds no question; leave it out with tasks=…"),
    ],
)
def test_what_does_not_go_with_a_set(
    typed: str, message: str, evaluate: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "qa1.json").write_text("[]")
    with pytest.raises(SystemExit):
        evaluate(*typed.split())
    told = capsys.readouterr().err
    assert told.startswith(f"error: {message}") and told.count("\n") == 1
