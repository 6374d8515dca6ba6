"""Files of bAbI, as they are and as others write them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rmt_lightning.core.errors import UserError
from rmt_lightning.tasks.babi import Babi
from rmt_lightning.tasks.facts import PEOPLE, PLACES


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(seed))


BABI = """1 Mary moved to the bathroom.
2 John went to the hallway.
3 Where is Mary? \tbathroom\t1
4 Mary went back to the garden.
5 Where is Mary? \tgarden\t4
"""


def test_babi_file(tmp_path: Path) -> None:
    path = tmp_path / "qa.txt"
    path.write_text(BABI * 10)
    task = Babi(str(path))
    assert task.answers == ("bathroom", "garden")
    seen = {task.draw(generator(seed), "train") for seed in range(20)}
    assert {(e.facts, e.question, e.answer, e.support) for e in seen} == {
        (("Mary moved to the bathroom.", "John went to the hallway."), "Where is Mary?", "bathroom", (0,)),
        (
            ("Mary moved to the bathroom.", "John went to the hallway.", "Mary went back to the garden."),
            "Where is Mary?", "garden", (2,),
        ),
    }  # fmt: skip


@pytest.mark.parametrize(
    "number", ["qa1_single-supporting-fact", "qa2_two-supporting-facts", "qa5_three-arg-relations"]
)
def test_real_babi(shared_data: Path, number: str) -> None:
    task = Babi(str(shared_data / f"babi/en-10k/{number}_train.txt"))
    rng = generator()
    for split in ("train", "validation", "test"):
        for _ in range(200):
            example = task.draw(rng, split)
            assert example.question.endswith("?") and all(fact.endswith(".") for fact in example.facts)
            if number.startswith("qa1"):
                person = example.question.removeprefix("Where is ").removesuffix("?")
                last = [fact for fact in example.facts if fact.startswith(person)][-1]
                assert last.endswith(f" {example.answer}.")


@pytest.mark.parametrize(
    "content", ["no numbers here", "", "1 Mary moved to the bathroom.\n2 Where is Mary?\tbathroom\t1\n"]
)
def test_what_is_no_babi_file_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "qa.txt"
    path.write_text(content)
    with pytest.raises(UserError, match=r"task\.path"):
        Babi(str(path))
    with pytest.raises(UserError, match=r"task\.path"):
        Babi(str(tmp_path / "absent"))


STORIES = [
    f"1 {person} moved to the {place}.\n2 Fred went to the attic.\n3 Where is {person}? \t{place}\t1\n"
    for person in PEOPLE
    for place in PLACES
]


def babi(tmp_path: Path, content: str | bytes, **files: str) -> Babi:
    for name, text in {"path": content, **files}.items():
        (tmp_path / f"{name}.txt").write_bytes(text.encode() if isinstance(text, str) else text)
    return Babi(**{name: str(tmp_path / f"{name}.txt") for name in ("path", *files)})


@pytest.mark.fault("a bAbI file in another of the ways in which such files are written", "it is read as it is meant")
@pytest.mark.parametrize(
    ("old", "new", "support"),
    [
        ("\t1\n", "\n", (0, 1)),
        ("\t1\n", "\t\n", (0, 1)),
        ("\t1\n", "\t1,2\n", (0, 1)),
        ("\t1\n", "\t2, 1\n", (1, 0)),
        ("\n", "\r\n", (0,)),
        ("\n1 ", "\n\n1 ", (0,)),
        ("3 Where", "7 Where", (0,)),
        ("\n3 ", "\n3\t", (0,)),
        ("moved to", "moved\u2028to", (0,)),
        ("Where is", "Где же", (0,)),
    ],
)
def test_babi_files_of_other_hands(tmp_path: Path, old: str, new: str, support: tuple[int, ...]) -> None:
    task = babi(tmp_path, "\ufeff" + "".join(STORIES).replace(old, new) + "\n \n")
    assert task.answers == tuple(sorted(PLACES))
    examples = [example for split in ("train", "validation", "test") for example in task.questions(split)]
    assert len(examples) == len(STORIES)
    assert all(len(e.facts) == 2 and e.support == support and e.answer in e.facts[0] for e in examples)


def test_babi_files_that_count_from_zero(tmp_path: Path) -> None:
    begun = "0 Mary slept.\n" + "".join(STORIES)
    assert babi(tmp_path, begun).questions("train")[0].facts[:2] == ("Mary slept.", "Mary moved to the bathroom.")
    counted = [story.replace("1\n", "0\n").replace("1 ", "0 ").replace("2 ", "1 ", 1) for story in STORIES]
    assert babi(tmp_path, "".join(counted)).questions("train") == babi(tmp_path, "".join(STORIES)).questions("train")


@pytest.mark.fault("a bAbI file that is damaged", "it is refused in one line that names file and line")
@pytest.mark.parametrize(
    ("story", "line", "why"),
    [
        ("1 Mary left.\n2 Where is Mary?\toffice\t7\n", 2, "needs 7, which is the number of no statement before it"),
        ("1 A is in.\n2 Where is A?\tin\t3\n3 B is out.\n", 2, "needs 3, which is the number of no statement"),
        ("1 A is in.\n2 Where is A?\tin\t2\n", 2, "needs 2, which is the number of no statement"),
        ("1 A is in.\n2 Where is A?\tin\tone\n", 2, "does not end in '<question> tab <answer> tab <numbers"),
        ("1 A is in.\n2 Where is A?\tin\t1\t1\n", 2, "does not end in '<question> tab <answer> tab <numbers"),
        ("1 A is in.\n2 Where is A? in 1\n", 2, "asks without a tab before the answer"),
        ("1 A is in.\n2 Where is A?\t\t1\n", 2, "has no answer after its tab"),
        ("1 A\tis in.\n2 Where is A?\tin\t1\n", 1, "has a tab, but neither a question mark before it nor the numbers"),
        ("1 Where is A?\tin\t\n", 1, "asks before anything is told"),
        ("1 A is in.\n1 B is in.\n2 Where is A?\tin\t1\n", 2, "begins a story before anything has been asked"),
        ("1 A is in.\n2 B is in.\n2 Where is A?\tin\t1\n", 3, "has the number 2; a story begins with 1"),
        ("1 A is in.\n3 B is in.\n2 Where is A?\tin\t1\n", 3, "has the number 2; a story begins with 1"),
        ("A is in.\n", 1, "is not of the form '<number> <sentence>' of bAbI files"),
        ("1 A is in.\n", 1, "ends a story that asks nothing"),
    ],
)
def test_damaged_babi_files(tmp_path: Path, story: str, line: int, why: str) -> None:
    with pytest.raises(UserError) as refused:
        babi(tmp_path, "".join(STORIES) + story)
    shown = f"task.path={tmp_path}/path.txt: line {3 * len(STORIES) + line} {why}"
    assert str(refused.value).startswith(shown) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "is empty"),
        (b"\xef\xbb\xbf\n \n", "is empty"),
        ("".join(STORIES).replace("office", "b\xfcro").encode("latin1"), "line 10 is not UTF-8; save it as UTF-8"),
        (STORIES[0].encode(), "holds 1 bAbI stories; at least 10 are needed to hold some back; give more, or task.val"),
        (b"2 Mary left.\n3 Where is Mary?\tout\t2\n", "line 1 has the number 2; a story begins with 1"),
    ],
)
def test_what_holds_too_little_is_refused(tmp_path: Path, content: bytes, why: str) -> None:
    with pytest.raises(UserError) as refused:
        babi(tmp_path, content)
    assert str(refused.value).startswith(f"task.path={tmp_path}/path.txt: {why}")


def test_which_babi_files_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number in range(3):
        Path(f"part[{number}].txt").write_text("".join(STORIES[8 * number : 8 * number + 8]))
    whole = Babi(["part[0].txt", "part[1].txt", "part[2].txt", "./part[2].txt"])
    assert whole.questions("train") == Babi("part*.txt").questions("train")
    with pytest.raises(UserError, match=r"task\.test_path=\.: is a folder; give a file, or a pattern such as"):
        Babi("part*.txt", test_path=".")
    with pytest.raises(UserError, match=r"task\.path=\[\]: names no file"):
        Babi([])
    with pytest.raises(UserError, match=r"task\.path=/dev/zero: is no plain file; give a qa\*\.txt file"):
        Babi("/dev/zero")
    with pytest.raises(UserError, match=r"task\.path=x{300}: cannot be read as a bAbI file \(File name too long\)"):
        Babi("x" * 300)
    with pytest.raises(UserError, match=r"task\.path: is missing; give task\.path=…"):
        Babi(validation_path="part[0].txt")


@pytest.mark.fault("a file of questions for the test", "all of them are in the test, and none was taken from training")
def test_babi_files_for_validation_and_test(tmp_path: Path) -> None:
    validation, test = STORIES[0].replace("attic", "barn"), STORIES[1] * 2 + STORIES[2].replace("garden", "moon")
    task = babi(tmp_path, "".join(STORIES), validation_path=validation, test_path=test)
    assert [len(task.questions(split)) for split in ("train", "validation", "test")] == [len(STORIES), 1, 3]
    assert "moon" in task.answers
    assert task.remarks == (
        "24 questions for training; 1 for validation, all of task.validation_path; 3 for test, all of task.test_path",
        "of the 3 questions for test, 2 stand in training too, word for word",
        "of the 3 questions for test, 1 have answers that it never gives",
    )
    # What is not given is held back.
    task = babi(tmp_path, "".join(STORIES), test_path=test)
    assert [len(task.questions(split)) for split in ("train", "validation", "test")] == [22, 2, 3]
    # Where nothing is trained, a test file is enough.
    task = Babi(test_path=str(tmp_path / "test_path.txt"))
    assert len(task.questions("test")) == 3
    with pytest.raises(UserError, match=r"task\.path: is missing; give task\.path=…"):
        task.draw(generator(), "train")


@pytest.mark.fault("a story that stands in a file several times", "it is not held back and trained on at once")
def test_equal_stories_are_on_one_side(tmp_path: Path) -> None:
    task = babi(tmp_path, "".join(story * 5 for story in STORIES[:12]))
    train, validation, test = (task.questions(split) for split in ("train", "validation", "test"))
    assert [len(part) for part in (train, validation, test)] == [50, 1, 1]
    assert not {*validation, *test} & {*train}
    # A question of different stories is asked only where training does not tell it.
    more = [story + f"4 Fred slept.\n5 Where is Fred? \tattic\t2\n{story}" for story in STORIES]
    task = babi(tmp_path, "".join(more))
    assert not {*task.questions("validation"), *task.questions("test")} & {*task.questions("train")}
    # With too few stories, it is said.
    assert "of the 2 questions for test, 2 stand in training too, word for word" in babi(tmp_path, BABI * 10).remarks


def test_all_questions_of_the_real_test(shared_data: Path) -> None:
    train, test = (
        str(shared_data / f"babi/en-10k/qa1_single-supporting-fact_{part}.txt") for part in ("train", "test")
    )
    task = Babi(train, test_path=test)
    assert [len(task.questions(split)) for split in ("train", "test")] == [9000, 1000]


def test_a_file_of_two_names_is_read_once(tmp_path: Path) -> None:
    story = "1 Ann went to the {0}.\n2 Where is Ann?\t{0}\t1\n"
    (tmp_path / "qa.txt").write_text("".join(story.format(place) for place in PLACES))
    (tmp_path / "link.txt").symlink_to("qa.txt")
    names = [str(tmp_path / name) for name in ("qa.txt", "link.txt", "*.txt")]
    assert len(Babi(test_path=names).questions("test")) == len(PLACES)
