"""The evaluation command on a finished run."""

from __future__ import annotations

import csv
import importlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from conftest import Run
from hydra.core.global_hydra import GlobalHydra

from rmt_lightning import evaluate as front_door
from rmt_lightning.app import evaluation, findings
from rmt_lightning.app.hydra_errors import told_in_one_line
from rmt_lightning.core.statistics import Proportion


@pytest.fixture
def here(finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> Path:
    shutil.copytree(finished_run, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RMT_LIGHTNING_CACHE", environment["RMT_LIGHTNING_CACHE"])
    return tmp_path


def evaluate(monkeypatch: pytest.MonkeyPatch, *settings: str) -> None:
    few = ["samples=12", "device=cpu", "follow=0", "probes=[]"]
    monkeypatch.setattr(sys, "argv", ["evaluate", "checkpoint=run", *few, *settings])
    GlobalHydra.instance().clear()
    front_door.run()


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def only(folder: Path) -> Path:
    (result,) = (folder / "run" / "evaluations").iterdir()
    return result


def test_results(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(monkeypatch, "segments=[1,4,40]")
    told = capsys.readouterr().out
    assert "Test on unseen text, 12 samples each" in told
    # Where it writes before it begins, and each length as it comes.
    begun, *lengths = [line for line in told.splitlines() if re.match(r"testing |\d+ segments?: ", line)]
    assert begun.endswith(f"results go to {os.path.relpath(only(here))}")
    assert [line.split(":")[0] for line in lengths] == ["1 segment", "4 segments", "40 segments"]
    assert all(re.search(r": \d+ of 12 right \(0\.\d{3} – [01]\.\d{3}\) in [\d.]+ s$", line) for line in lengths)
    found = rows(only(here) / "evaluation.csv")
    assert [row["segments"] for row in found] == ["1", "4", "40"]
    distances = rows(only(here) / "distances.csv")
    settings = json.loads((only(here) / "evaluation.json").read_text())["settings"]
    assert settings["checkpoint"] == "last.ckpt" and settings["task"]["_target_"].endswith("Detect")
    for row in found:
        assert row["samples"] == "12" and 0 <= int(row["right"]) <= 12
        assert float(row["low"]) <= float(row["accuracy"]) <= float(row["high"])
        assert float(row["tokens_per_second"]) > 0 and float(row["host_memory_mb"]) > 100
        parts = [part for part in distances if part["segments"] == row["segments"]]
        assert sum(int(part["samples"]) for part in parts) == 12
        assert sum(int(part["right"]) for part in parts) == int(row["right"])
        assert max(int(part["from"]) for part in parts) < int(row["segments"])


def test_it_agrees_with_the_test_at_the_end_of_the_run(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate(monkeypatch, "segments=[1,4]", "samples=8")
    end = {row["segments"]: row["right"] for row in rows(here / "run" / "evaluation.csv")}
    assert {row["segments"]: row["right"] for row in rows(only(here) / "evaluation.csv")} == end


def test_batches_change_nothing(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate(monkeypatch, "segments=[5]", "batch_size=12")
    first = rows(only(here) / "evaluation.csv")[0]["right"]
    shutil.rmtree(here / "run" / "evaluations")
    evaluate(monkeypatch, "segments=[5]", "batch_size=5")
    assert rows(only(here) / "evaluation.csv")[0]["right"] == first


@pytest.mark.soak
def test_an_interrupted_evaluation_goes_on(
    here: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while the third length is read; the first two are not read again."""
    killer = """
import os, signal
from rmt_lightning.analysis import extrapolation
from rmt_lightning.evaluate import run
from rmt_lightning.tasks.placement import Key

original = extrapolation.replies

def killer(classify, data, num_segments, *rest):
    if num_segments == Key(3, 0):
        os.kill(os.getpid(), signal.SIGKILL)
    return original(classify, data, num_segments, *rest)

extrapolation.replies = killer
run()
"""
    settings = ["checkpoint=run", "samples=12", "segments=[1,2,3]", "device=cpu"]
    killed = subprocess.run([sys.executable, "-c", killer, *settings], cwd=here, env=environment, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    before = rows(only(here) / "evaluation.csv")
    assert [row["segments"] for row in before] == ["1", "2"]
    evaluate(monkeypatch, "segments=[1,2,3]")
    after = rows(only(here) / "evaluation.csv")
    assert after[:2] == before and after[2]["segments"] == "3"


@pytest.mark.fault("two evaluations of a checkpoint at once", "both end, and all that either has found is kept")
def test_evaluations_side_by_side(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    test, found = evaluation._test, []

    def beside(*arguments: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        row, predictions = test(*arguments)
        found.append(row["segments"])
        # Another one comes to 3 first, and to 5.
        for other in (3, 5):
            another, length = findings.Findings(only(here), {}), f"{other} segments"
            # What ends a line for some stands in questions from the web.
            asked = {"length": length, "question": "Where\u2028is\x85Mary?"}
            another.predict(length, [prediction | asked for prediction in predictions])
            another.add("lengths", str(other), row | {"segments": other})
        return row, predictions

    monkeypatch.setattr(evaluation, "_test", beside)
    evaluate(monkeypatch, "segments=[1,3]")
    assert found == [1]
    told = [json.loads(line) for line in (only(here) / "predictions.jsonl").open()]
    assert {row["length"] for row in told} == {"1 segments", "3 segments", "5 segments"} and len(told) == 3 * 12
    for table in ("evaluation.csv", "distances.csv"):
        assert list(dict.fromkeys(row["segments"] for row in rows(only(here) / table))) == ["1", "3", "5"]
    assert json.loads((only(here) / "evaluation.json").read_text())["settings"]["samples"] == 12


@pytest.mark.fault("an evaluation is killed before it writes its tables", "the same command writes them")
def test_tables_follow_what_was_found(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as killed, pytest.raises(SystemExit):
        killed.setattr(findings, "write_csv", Mock(side_effect=KeyboardInterrupt))
        evaluate(monkeypatch, "segments=[2]")
    assert {path.name for path in only(here).iterdir() if path.suffix} == {"evaluation.json", "predictions.jsonl"}
    monkeypatch.setattr(evaluation, "_test", None)
    evaluate(monkeypatch, "segments=[2]")
    assert [row["segments"] for row in rows(only(here) / "evaluation.csv")] == ["2"]


@pytest.mark.fault("the run folder cannot be written to", "one line at the start; output= puts results elsewhere")
@pytest.mark.parametrize("door", ["evaluate", "attend"])
def test_a_run_of_somebody_else(
    door: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = here / "run" / {"evaluate": "evaluations", "attend": "attention"}[door]
    # Even the superuser makes no folder in a file.
    place.touch()
    words = {"evaluate": ["segments=[1]", "samples=8", "follow=0"], "attend": ["segments=1", "stream_segments=2"]}[door]
    run = importlib.import_module(f"rmt_lightning.{door}").run
    monkeypatch.setattr(sys, "argv", [door, "checkpoint=run", *words])
    with pytest.raises(SystemExit) as refused:
        run()
    told = capsys.readouterr().err
    assert refused.value.code == 2 and told.count("\n") == 1 and "give output=<another folder>" in told
    sys.argv.append("output=mine")
    run()
    assert list((here / "mine" / place.name).glob("last-detect-*/*.csv"))


def test_damaged_results_are_named(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate(monkeypatch, "segments=[1]")
    damage = {"right": "a", "samples": 1, "segments": 1, "distances": {}}
    for content in (
        "",
        "[" * 10**5,
        json.dumps({"lengths": {"1": damage}}),
        json.dumps({"lengths": {"1": damage | {"right": 0, "samples": 0, "text_tokens": 0}}}),
        '{"lengths": {"1": {"right": 1}}}',
        '{"lengths": {"x": {}}}',
        '{"probes": {"1 x": {}}}',
        '{"parts": {"qa1 1z": {"task": "qa1", "length": "1z", "accuracy": 1.0}}}',
    ):
        (only(here) / "evaluation.json").write_text(content)
        with pytest.raises(SystemExit):
            evaluate(monkeypatch, "segments=[1]")
        assert "evaluation.json: is damaged; remove it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("door", "hint"),
    [
        ("train", "a run that has begun goes on with resume=<its folder>"),
        ("evaluate", "the same command goes on where it stopped"),
        ("export", "repeat the command"),
    ],
)
def test_an_interruption_is_told(door: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left, told_in_one_line(door):
        raise KeyboardInterrupt
    assert left.value.code == 130 and capsys.readouterr().err == f"error: interrupted; {hint}\n"


def test_memory_does_not_grow_with_the_input(here: Path, command: Run) -> None:
    result = command("rmt_lightning.evaluate", "checkpoint=run", "samples=4", "segments=[64,2048]", "probes=[]")
    assert result.returncode == 0, result.stderr
    short, long = (float(row["host_memory_mb"]) for row in rows(only(here) / "evaluation.csv"))
    assert long < 1.05 * short


def test_other_text_and_another_task(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "book.txt").write_text("A quiet morning. Nobody spoke for a while. Then it rained again! " * 200)
    evaluate(monkeypatch, "noise=files", "noise.path=book.txt", "segments=[2]")
    evaluate(monkeypatch, "task=memorize", "segments=[2]")
    assert len(list((here / "run" / "evaluations").iterdir())) == 2
    # A tokenizer that learns from that text would give other tokens to the same weights.
    shutil.rmtree(here / "run" / "tokenizer")
    with pytest.raises(SystemExit):
        evaluate(monkeypatch, "noise=files", "noise.path=book.txt", "segments=[2]")
    assert "run: has no tokenizer/, which its weights need; put it back\n" in capsys.readouterr().err


PLACES = ("office", "bathroom", "garden", "bedroom", "kitchen", "hallway")
STORIES = [
    f"1 {person} moved to the {place}.\n2 Where is {person}? \t{place}\t1\n"
    for person in ("Mary", "John")
    for place in PLACES
]


@pytest.mark.fault("a run is evaluated on text that has changed since", "said, and kept apart from earlier results")
def test_text_that_has_changed(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    said = "run: the text is not the one that the run began with: its files or the settings of its noise have changed; "
    said += "what is held out now may have been trained on"
    evaluate(monkeypatch, "segments=[1]")
    assert said not in capsys.readouterr().out
    first = only(here)
    (here / "run" / "text.json").write_text('{"sha256": "of another text"}')
    evaluate(monkeypatch, "segments=[1]")
    assert said in capsys.readouterr().out
    # Text that somebody asks for is meant to be another.
    book = tmp_path / "book.txt"
    for words in ("It was a good day.", "It was a bad day."):
        book.write_text(" ".join(f"{words} {number} came." for number in range(600)))
        evaluate(monkeypatch, "segments=[1]", "noise=files", f"noise.path={book}")
    assert said not in capsys.readouterr().out
    folders = [path for path in (here / "run" / "evaluations").iterdir() if path != first]
    texts = [json.loads((path / "evaluation.json").read_text())["settings"]["text"] for path in folders]
    assert len(set(texts)) == len(texts) == 3


@pytest.mark.fault("a file of fewer questions than samples", "each is asked once, and the interval counts it once")
def test_answers_in_another_order(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bAbI file lists its answers alphabetically; a score still stands for the word it was trained on."""
    (here / "qa.txt").write_text("".join([*STORIES, *STORIES[:3]]))
    checkpoint = here / "run" / "checkpoints" / "last.ckpt"
    saved = torch.load(checkpoint, weights_only=True)
    saved["state_dict"]["head.weight"].zero_()
    saved["state_dict"]["head.bias"] = torch.tensor([float(answer == "kitchen") for answer in saved["answers"]])
    torch.save(saved, checkpoint)
    evaluate(monkeypatch, "task=babi", "task.test_path=qa.txt", "segments=[1]", "samples=120", "follow=4", "every=4")
    told = capsys.readouterr().out
    assert "samples=120: there are 15 questions for test, and each is asked once" in told
    (row,) = rows(only(here) / "evaluation.csv")
    # Two in twelve, and the file is asked whole: what stands there twice counts once.
    assert (row["right"], row["samples"], row["questions"], row["fits"]) == ("2", "15", "12", "1.0")
    low, high = Proportion(2, 15, questions=12, finite=True).interval
    assert (float(row["low"]), float(row["high"])) == pytest.approx((low, high))
    (memories,) = rows(only(here) / "retention.csv")
    assert 1 <= int(memories["questions"]) <= int(memories["streams"]) <= 15
    # All of them are asked if no number is given.
    evaluate(monkeypatch, "task=babi", "task.test_path=qa.txt", "segments=[1,2]", "samples=null")
    assert "Test on unseen text, 15 samples each" in capsys.readouterr().out


@pytest.mark.fault("questions do not fit into short inputs", "every table says which share of them does")
def test_lengths_without_room_for_all_questions(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f"{number} John went to the {PLACES[number % 6]}.\n" for number in range(2, 12)]
    crowd = [f"{story[:-2].replace('2 Where', '12 Where')}1\n" for story in STORIES]
    crowd = [story.replace("12 Where", "".join(names) + "12 Where") for story in crowd]
    (here / "qa.txt").write_text("".join([*STORIES, *crowd]))
    evaluate(monkeypatch, "task=babi", "task.test_path=qa.txt", "segments=[1,8]")
    evaluate(monkeypatch, "task=babi", "task.test_path=qa.txt", "segments=[1,8]", "samples=null")
    told = capsys.readouterr().out
    assert "Test on unseen text, 12 to 24 samples" in told and "50.0%" in told and "100.0%" in told
    found = [rows(folder / "evaluation.csv") for folder in sorted((here / "run" / "evaluations").iterdir())]
    wanted = [[("12", "12", "0.5"), ("12", "12", "1.0")], [("12", "12", "0.5"), ("24", "24", "1.0")]]
    assert sorted([(r["samples"], r["questions"], r["fits"]) for r in of_folder] for of_folder in found) == wanted
    # Lengths without any are named, and refused if there are no others.
    (here / "qa.txt").write_text("".join(crowd))
    evaluate(monkeypatch, "task=babi", "task.test_path=qa.txt", "segments=[1,8]", "follow=4", "every=4")
    assert "0.0%" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        evaluate(monkeypatch, "task=babi", "task.test_path=qa.txt", "segments=[1]")
    assert "task=babi: none of its questions fits into one segment" in capsys.readouterr().err


def test_what_earlier_versions_did_not_count(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate(monkeypatch, "segments=[1]", "follow=4", "every=4", "batch_size=5")
    path = only(here) / "evaluation.json"
    content = json.loads(path.read_text())
    assert content["lengths"]["1"]["questions"] <= 12
    for row in (content["lengths"]["1"], content["retention"]["4 every 4 of 5"]):
        del row["questions"]
    del content["lengths"]["1"]["fits"], content["lengths"]["1"]["finite"]
    path.write_text(json.dumps(content))
    evaluate(monkeypatch, "segments=[1,2]", "follow=4", "every=4", "batch_size=5")
    assert re.search(r"– +│\n", capsys.readouterr().out)
    assert [row["questions"] == "" for row in rows(only(here) / "evaluation.csv")] == [True, False]
    assert [row["questions"] for row in rows(only(here) / "retention.csv")] == [""]


def test_what_changes_nothing_is_said(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate(monkeypatch, "segments=[1]", "every=8")
    assert "every=8: changes nothing, for with follow=0 no memories are followed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["checkpoint=absent"], "checkpoint=absent: no run there; give a run folder or one of its checkpoints/*.ckpt"),
        (["checkpoint=run/config.yaml"], "checkpoint=run/config.yaml: no run there"),
        (["segments=[]"], "segments=[]: names no length"),
        (["segments=[0]"], "segments=[0]: must be greater than or equal to 1"),
        (["segments=4"], "segments=4: must be a valid list"),
        (["batch_size=0"], "batch_size=0: must be greater than or equal to 1"),
        (["samples=0"], "samples=0: must be greater than or equal to 1"),
        (["probes=[0]"], "probes=[0]: must be greater than or equal to 1"),
        (["samples={a:1}"], "samples={'a': 1}: must be a valid integer"),
        (["lengths=[1]"], "lengths: no such setting"),
        (
            ["task=babi", "task.path=other.txt"],
            "task=babi: the model does not know the answers here, there; it knows bath",
        ),
        (
            ["checkpoint=run/checkpoints/truncated.ckpt"],
            "HERE/run/checkpoints/truncated.ckpt: is damaged or no checkpoint",
        ),
        (["device=cuda"], "device=cuda: torch finds no GPU; give cpu or auto"),
    ],
)
def test_bad_input(
    settings: list[str], message: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if "device=cuda" in settings and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    checkpoints = here / "run" / "checkpoints"
    (checkpoints / "truncated.ckpt").write_bytes((checkpoints / "last.ckpt").read_bytes()[:-500])
    story = "1 Mary moved to the {0}.\n2 Where is Mary? \t{0}\t1\n"
    (here / "other.txt").write_text((story.format("here") + story.format("there")) * 10)
    with pytest.raises(SystemExit) as exit_:
        evaluate(monkeypatch, *settings)
    errors = capsys.readouterr().err
    assert exit_.value.code == 2, errors
    assert errors.startswith(f"error: {message}".replace("HERE", str(here))) and errors.count("\n") == 1, errors
    assert not (here / "run" / "evaluations").exists()


def test_memories_are_followed_and_the_rate_of_loss_is_told(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate(monkeypatch, "segments=[1]", "follow=12", "every=4", "batch_size=10")
    told = " ".join(capsys.readouterr().out.split())
    assert "Memory lost per segment: " in told
    asked = rows(only(here) / "retention.csv")
    assert [(row["age"], row["streams"]) for row in asked] == [("4", "10"), ("8", "10"), ("12", "10")]
    (row,) = json.loads((only(here) / "evaluation.json").read_text())["retention"].values()
    assert row["lost"] <= row["written"] <= row["streams"] == 10
    assert 0 < row["exposure"] <= 4 * 3 * row["written"]
    assert f"At the upper end {math.exp(-4096 * row['rate_high']):.1%} of them are left after 4,096 segments" in told
    # Done once, it is not done again; another way of following is added.
    monkeypatch.setattr("rmt_lightning.app.evaluation._follow", None)
    evaluate(monkeypatch, "segments=[1]", "follow=12", "every=4", "batch_size=10")


def test_another_number_of_memories_is_another_result(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """retention.csv tells the ways apart, and a call is not given what another way of following has found."""
    follow = ["segments=[1]", "follow=8", "every=4"]
    for settings in ("batch_size=10", "batch_size=3", "batch_size=3 follow=4"):
        evaluate(monkeypatch, *follow, *settings.split())
    ways = ("follow", "every", "streams", "age")
    asked = [tuple(row[way] for way in ways) for row in rows(only(here) / "retention.csv")]
    assert asked == [("8", "4", streams, age) for streams in ("10", "3") for age in ("4", "8")] + [("4", "4", "3", "4")]
    # A file of before, whose keys leave out the streams: its rows know them.
    path = only(here) / "evaluation.json"
    content = json.loads(path.read_text())
    content["retention"] = {"8 every 4": next(iter(content["retention"].values()))}
    path.write_text(json.dumps(content))
    capsys.readouterr()
    with monkeypatch.context() as without:
        without.setattr("rmt_lightning.app.evaluation._follow", None)
        evaluate(monkeypatch, *follow, "batch_size=10")
    assert "Memory lost per segment" in capsys.readouterr().out
    evaluate(monkeypatch, *follow, "batch_size=3")
    assert [row["streams"] for row in rows(only(here) / "retention.csv")] == ["10", "10", "3", "3"]


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("follow=5 every=6", "every=6: asks nothing in follow=5 segments; give less, or follow=0"),
        ("follow=16 stages=true", "follow=16: with stages=true memories are not followed; leave one of them out"),
        (
            "stages=true checkpoint=run/checkpoints/stage-1.ckpt",
            "checkpoint=run/checkpoints/stage-1.ckpt: with stages=tr",
        ),
        ("hydra.run.dir=x", "hydra.run.dir=x: nothing is written there; --help shows what says where results go"),
        ("output=", "output=: is empty; give a value, or leave it out"),
        (f"output={'x' * 300}", f"{'x' * 300}: File name too long; choose another folder"),
        ("samples=1000001", "samples=1000001: must be less than or equal to 1000000"),
    ],
)
def test_what_would_have_no_effect(
    typed: str, message: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        evaluate(monkeypatch, "segments=[1]", *typed.split())
    told = capsys.readouterr().err
    assert stopped.value.code == 2 and told.startswith(f"error: {message}") and told.count("\n") == 1
    assert {path.name for path in here.iterdir()} == {"run"}


def test_what_cannot_be_followed(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("rmt_lightning.models.segment_model.SegmentModel.max_segments", 9)
    with pytest.raises(SystemExit):
        evaluate(monkeypatch, "segments=[1]", "follow=16")
    assert "follow=16: only memories that a head can ask are followed, not those of answer=" in capsys.readouterr().err


def test_probes(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that knows no "nowhere"; and some of the probes have been asked before."""
    evaluate(monkeypatch, "segments=[2]", "probes=[2]")
    told, folder = capsys.readouterr().out, only(here)
    assert "What has been learnt, 12 samples each" in told and "holds evaluation.csv, distances.csv, probes.csv" in told
    found = {row["probe"]: row for row in rows(folder / "probes.csv")}
    assert next(iter(found)) == "detect" and len(found) == 10
    (end,), itself = rows(folder / "evaluation.csv"), found["detect"]
    assert all(itself[name] == end[name] for name in ("right", "low", "questions"))
    assert [itself[name] for name in ("last_place", "commonest_place", "decoy")] == ["12", "12", "0"]
    for row in found.values():
        assert int(row["right"]) + int(row["decoy"]) <= int(row["samples"]) == 12
        share = next(line for line in told.splitlines() if line.startswith(f"│ {row['probe']} ")).split("│")[4]
        assert share.strip() == f"{int(row['decoy']) / 12:.1%}"
        assert row["right"] == "0" or "nowhere" not in row["probe"]
    path = folder / "evaluation.json"
    content = json.loads(path.read_text())
    del content["probes"]["2 reworded"]
    path.write_text(json.dumps(content))
    ask = Mock(side_effect=evaluation.replies)
    monkeypatch.setattr(evaluation, "replies", ask)
    evaluate(monkeypatch, "segments=[2]", "probes=[2,1]")
    asked = [(call.args[2].num_segments, call.args[1].task.name) for call in ask.call_args_list]
    assert asked == [(2, "reworded"), *((1, name) for name in found)]
    assert [row["segments"] for row in rows(folder / "probes.csv")] == ["1"] * 10 + ["2"] * 10


def test_probes_of_tasks_that_tell_otherwise(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a task is worth is told of all that ask for places; nothing of others, and asking for it is a mistake."""
    evaluate(monkeypatch, "segments=[1]", "task=reasoning", "probes=[1]")
    (row,) = rows(only(here) / "probes.csv")
    assert row["probe"] == "reasoning" and 0 < int(row["last_place"]) < 12
    assert "What has been learnt" in capsys.readouterr().out
    monkeypatch.setattr(evaluation, "probes", lambda *_: ())
    evaluate(monkeypatch, "segments=[1]", "task=reasoning", "probes=null")
    assert "learnt" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        evaluate(monkeypatch, "segments=[1]", "task=reasoning", "probes=[4]")
    refused = "error: probes=[4]: there are none for task=reasoning, whose answers are no places; leave it out\n"
    assert capsys.readouterr().err == refused


def test_which_probes_are_asked_unless_they_are_given(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # There is room for two facts and a question, but not in one segment.
    config = (here / "run" / "config.yaml").read_text()
    (here / "run" / "config.yaml").write_text(config.replace("segment_length: 48", "segment_length: 29"))
    ask = Mock(return_value=[])
    monkeypatch.setattr(evaluation, "_ask", ask)
    evaluate(monkeypatch, "segments=[1]", "probes=null")
    probed = ask.call_args.args[1]
    assert [*probed] == [1, 8] and 0 < len(probed[1]) < len(probed[8]) == 10
    assert "probes: not all of them can be asked in inputs of 1 segments" in " ".join(capsys.readouterr().out.split())
    test = Mock(side_effect=KeyboardInterrupt)
    monkeypatch.setattr(evaluation, "evaluate", test)
    with pytest.raises(SystemExit):
        evaluate(monkeypatch, "segments=[1]", "stages=true", "probes=null")
    assert test.call_args.args[0].probes == []


def test_all_stages_side_by_side(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Copies that somebody has made of them are none.
    for name in ("stage-1 (copy).ckpt", "stage-01.ckpt"):
        shutil.copy(here / "run/checkpoints/stage-1.ckpt", here / "run/checkpoints" / name)
    evaluate(monkeypatch, "stages=true", "segments=[1,3]")
    (together,) = (here / "run" / "evaluations").glob("stages-detect-*")
    assert f"{together.relative_to(here)} holds them all" in capsys.readouterr().out
    found = rows(together / "results.csv")
    assert [(row["stage"], row["segments"]) for row in found] == [(s, n) for s in "123" for n in "13"]
    assert {path.name for path in together.iterdir() if path.suffix} == {"results.csv", "figure.png", "figure.pdf"}
    # What was found before stays in it.
    evaluate(monkeypatch, "stages=true", "segments=[2]")
    found = rows(together / "results.csv")
    assert [(row["stage"], row["segments"]) for row in found] == [(s, n) for s in "123" for n in "123"]
    stages = rows(here / "run" / "stages.csv")
    assert all(1 <= int(row["questions"]) <= 16 and row["fits"] == "1.0" for row in stages)
    # Each row is what the stage's own evaluation says.
    own = rows(next((here / "run" / "evaluations").glob("stage-2-detect-*")) / "evaluation.csv")
    assert [row["right"] for row in own] == [row["right"] for row in found if row["stage"] == "2"]


def test_the_figure_of_all_stages_draws_chance_of_the_task(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guess among two answers is right half of the time, whatever else the model knows to say."""
    (here / "qa.txt").write_text("".join(story for story in STORIES if "kitchen" in story or "garden" in story) * 10)
    drawn = []
    monkeypatch.setattr("rmt_lightning.reporting.style.save", lambda figure, _stem: drawn.append(figure))
    evaluate(monkeypatch, "stages=true", "segments=[1]", "task=babi", "task.path=qa.txt")
    (axes,) = drawn[0].axes
    assert [list(line.get_ydata()) for line in axes.lines if line.get_linestyle() == ":"] == [[0.5, 0.5]]


def test_stages_of_a_run_that_has_passed_none(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (here / "run" / "checkpoints").glob("stage-*.ckpt"):
        path.unlink()
    with pytest.raises(SystemExit) as stopped:
        evaluate(monkeypatch, "stages=true")
    assert stopped.value.code == 2
    assert "checkpoint=run: the run has passed no stage yet; train it further" in capsys.readouterr().err
