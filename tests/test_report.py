"""The report on real run folders, and on what may stand where a run folder should."""

from __future__ import annotations

import csv
import gzip
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from base64 import b64decode, b64encode
from collections.abc import Callable
from html.parser import HTMLParser
from io import BytesIO
from math import log
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT
from PIL import Image
from plotly.offline import get_plotlyjs
from test_docs import COMMANDS

from rmt_lightning import report as front_door
from rmt_lightning.core.errors import UserError
from rmt_lightning.report import report
from rmt_lightning.reporting import figures, plots
from rmt_lightning.reporting.reading import read_runs
from rmt_lightning.reporting.redaction import public, public_text
from rmt_lightning.reporting.runs import LOSS, Point, Run, differences


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def unpacked(text: str) -> str:
    return gzip.decompress(b64decode(text, validate=True)).decode()


class Page(HTMLParser):
    """The parts of a page that tests ask for."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.packed: dict[str, str] = {}
        self.text = ""
        self._table, self._plot, self._within = "", "", ""
        self.feed(path.read_text())
        self.plotly = self.packed.pop("plotly")
        self.figures: dict[str, Any] = {name: json.loads(text) for name, text in self.packed.items()}

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        given = dict(attributes)
        if tag == "table":
            self._table = str(given["id"])
            self.tables[self._table] = []
        elif tag == "tr":
            self.tables[self._table].append([])
        elif tag in ("td", "th"):
            self.tables[self._table][-1].append("")
        elif tag in ("div", "script") and "id" in given:
            self._plot = str(given["id"])
        self._within = str(given.get("type", tag)) if tag == "script" else tag

    def handle_endtag(self, tag: str) -> None:
        self._within = ""
        self._table = "" if tag == "table" else self._table

    def handle_data(self, data: str) -> None:
        if self._within == "application/gzip":
            self.packed[self._plot] = unpacked(data)
        elif self._within not in ("script", "style"):
            self.text += data
            if self._table and self.tables[self._table][-1:] not in ([], [[]]):
                self.tables[self._table][-1][-1] += " ".join(data.split()) + " "


@pytest.fixture
def here(finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one good run in it."""
    shutil.copytree(finished_run, tmp_path / "good")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def copy(here: Path, name: str, **changes: Any) -> Path:
    """Another run like the good one, with other settings."""
    folder = here / name
    shutil.copytree(here / "good", folder)
    change(folder, **changes)
    return folder


def change(folder: Path, **changes: Any) -> None:
    config = yaml.safe_load((folder / "config.yaml").read_text())
    for part, settings in changes.items():
        config[part] |= settings
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


def made(*arguments: str) -> Page:
    front_door.main([*arguments, "--output", "page.html"])
    return Page(Path("page.html"))


def only(folder: Path) -> Run:
    (run,), skipped = read_runs([str(folder)])
    assert skipped == []
    return run


def test_the_numbers_are_those_of_the_run(here: Path) -> None:
    page = made("good")
    logged = rows(here / "good/metrics/version_0/metrics.csv")
    stages, tests = rows(here / "good/stages.csv"), rows(here / "good/evaluation.csv")
    heads, summary = page.tables["runs"]
    cells = {head.strip(): " ".join(cell.split()) for head, cell in zip(heads, summary, strict=True)}
    assert cells["status"] == "finished" and cells["segments"] == "3 of 3" and cells["steps"] == "18"
    assert cells["task"] == "Detect" and cells["backbone"] == "TinyRoFormer 1 × 16" and cells["memory tokens"] == "10"
    low, high = float(tests[-1]["low"]), float(tests[-1]["high"])
    accuracy = f"{float(tests[-1]['accuracy']):.1%}"
    assert cells["test of the longest inputs"] == (
        f"{accuracy} at 4 segments {low:.1%} – {high:.1%}, {tests[-1]['questions']} questions"
    )

    (trace,) = page.figures["val_accuracy"]["data"]
    validations = [row for row in logged if row["val/accuracy"]]
    assert trace["x"] == [int(row["step"]) + 1 for row in validations] == [3, 6, 9, 12, 15, 18]
    assert trace["y"] == pytest.approx([float(row["val/accuracy"]) for row in validations])
    assert trace["customdata"] == [f", stage {stage}" for stage in (1, 1, 2, 2, 3, 3)] and trace["text"] == [
        "",
        "1",
        "",
        "2",
        "",
        "3",
    ]
    (trace,) = page.figures["loss"]["data"]
    losses = [row for row in logged if row["train/loss"]]
    assert trace["x"] == [int(row["step"]) + 1 for row in losses]
    assert trace["y"] == pytest.approx([float(row["train/loss"]) for row in losses], rel=1e-4)

    for of in ("steps", "seconds"):
        (trace,) = page.figures[f"timeline_{of}"]["data"]
        widths = [float(row[of]) for row in stages]
        assert trace["text"] == ["1", "2", "3"] and trace["x"] == pytest.approx(widths, rel=1e-4)
        assert trace["base"] == pytest.approx([0, widths[0], widths[0] + widths[1]], rel=1e-4)
        # None of the stages of this tiny run converges.
        assert trace["marker"]["pattern"]["shape"] == ["/", "/", "/"]

    (trace,) = page.figures["lengths"]["data"]
    assert trace["x"] == [1, 4] and trace["marker"]["symbol"] == ["circle", "circle-open"]
    for row, y, above, below in zip(
        tests, trace["y"], trace["error_y"]["array"], trace["error_y"]["arrayminus"], strict=True
    ):
        assert y == float(row["accuracy"])
        assert [y - below, y + above] == pytest.approx([float(row["low"]), float(row["high"])], abs=1e-4)
    axis = page.figures["lengths"]["layout"]["xaxis"]
    assert axis["type"] == "log" and axis["tickvals"] == [1, 2, 4] and "range" in axis
    assert len(page.tables["tests"]) == 1 + len(tests)
    shown = [[cell.strip() for cell in row[4:7]] for row in page.tables["tests"]]
    assert shown == [["samples", "questions", "fits"], *(["8", row["questions"], "100.0%"] for row in tests)]
    for figure in page.figures.values():
        assert figure["layout"]["xaxis"]["title"]["text"]


def test_memory_that_holds(here: Path) -> None:
    (here / "good/hold.csv").write_text("step,rate,rate_low,rate_high\n20,0.02,0.01,0.05\n40,0,0,0.01\n")
    test = here / "good/evaluations/last-detect-1"
    test.mkdir(parents=True)
    shutil.copy(here / "good/evaluation.csv", test)
    (test / "retention.csv").write_text("age,right,streams\n16,64,64\n32,48,64\n")
    front_door.main(["good"])
    page = Page(Path("report.html"))
    (rate,), (kept,) = (page.figures[name]["data"] for name in ("loss_rate", "retention"))
    assert (rate["x"], rate["y"]) == ([20, 40], [0.02, 0])
    assert (rate["error_y"]["array"], rate["error_y"]["arrayminus"]) == ([0.03, 0.01], [0.01, 0])
    assert (kept["x"], kept["y"]) == ([16, 32], [1, 0.75])
    # Where no memory has been carried on yet, there is no rate, and nothing is wrong.
    with (here / "good/hold.csv").open("a") as file:
        file.write("60,nan,nan,nan\n")
    assert [row["step"] for row in only(here / "good").losses] == [20, 40] and only(here / "good").problems == []
    # Each way in which they were followed is a line of its own.
    asked = "32,16,64,16,64\n32,16,64,32,48\n8,4,10,4,9\n8,4,10,8,8\n"
    (test / "retention.csv").write_text(f"follow,every,streams,age,right\n{asked}")
    front_door.main(["good"])
    one, other = Page(Path("report.html")).figures["retention"]["data"]
    assert (one["x"], one["y"], other["x"], other["y"]) == ([16, 32], [1, 0.75], [4, 8], [0.9, 0.8])


def test_training_tells_what_it_ran_on(here: Path) -> None:
    (start,) = json.loads((here / "good/hardware.json").read_text())
    assert start["step"] == 0 and start["cores"] >= 1 and start["gpus"] == [] and start["precision"] == "32-true"
    assert start["python"] == ".".join(map(str, sys.version_info[:3])) and start["torch"][0].isdigit()
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", start["commit"] or "0" * 40)
    assert not {socket.gethostname(), str(Path.home())} & set(map(str, start.values()))
    logged = rows(here / "good/metrics/version_0/metrics.csv")
    memory = [float(row["train/host_memory_mb"]) for row in logged if row["train/host_memory_mb"]]
    assert 100 < memory[0] <= memory[-1] < 20_000
    page = made("good")
    _, cells = page.tables["machines"]
    assert f"{max(memory):,.0f}" in cells[2] and start["cpu"] in cells[5] and f"torch {start['torch']}" in cells[8]


def test_all_runs_in_a_folder_and_their_differences(here: Path) -> None:
    (here / "sweep").mkdir()
    for number, size in enumerate((2, 5)):
        copy(here, f"sweep/{number}", model={"memory_size": size})
    page = made("sweep", "good", "sweep/0", "s*p")
    names = [row[0].split(maxsplit=1)[1].strip() for row in page.tables["runs"][1:]]
    assert names[:2] == ["sweep/0", "sweep/1"] and names[2].endswith("good") and len(names) == 3
    assert [[cell.strip() for cell in row] for row in page.tables["differences"][1:]] == [
        ["model.memory_size", "2", "5", "10"]
    ]
    assert [trace["meta"] for trace in page.figures["val_accuracy"]["data"]] == [0, 1, 2]
    assert page.text.count("all settings") == 3


@pytest.mark.parametrize("many", [60, pytest.param(1000, marks=[pytest.mark.soak, pytest.mark.timeout(900)])])
@pytest.mark.fault("a report on many runs", "it takes a twentieth of a second a run, however many there are")
def test_a_report_on_many_runs(many: int, here: Path) -> None:
    for number in range(many - 1):
        folder = here / f"run{number}"
        shutil.copytree(here / "good", folder, ignore=shutil.ignore_patterns("*.ckpt", "tokenizer"))
        text = (folder / "config.yaml").read_text()
        (folder / "config.yaml").write_text(re.sub(r"^seed: .*", f"seed: {number}", text, flags=re.MULTILINE))
    # Of this process, for others may be busy.
    began = time.process_time()
    page = made(".")
    assert time.process_time() - began < 5 + 0.05 * many
    assert f"show the last 50 of {many:,} runs" in page.text and len(page.tables["runs"]) == many + 1


def test_of_many_runs_the_last_are_shown(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rmt_lightning.reporting.page.MOST", 2)
    for size in (2, 5):
        copy(here, f"memory-{size}", model={"memory_size": size})
    page = made("good", "memory-2", "memory-5")
    assert [row[0].split()[-1] for row in page.tables["runs"][1:]] == ["memory-2", "memory-5", "good"]
    assert [len(row) for row in page.tables["differences"]] == [3, 3]
    assert [trace["meta"] for trace in page.figures["loss"]["data"]] == [0, 1]
    assert "show the last 2 of 3 runs" in page.text and page.text.count("all settings") == 2


def test_evaluations_are_told_apart(here: Path) -> None:
    columns = "segments,text_tokens,right,samples,accuracy,low,high,tokens_per_second,host_memory_mb,device_memory_mb\n"
    config = yaml.safe_load((here / "good/config.yaml").read_text())
    elsewhere = {"_target_": "x.Files", "path": "books/*.txt"}
    for name, checkpoint, noise in (
        ("a", "last.ckpt", config["noise"]),
        ("b", "last.ckpt", elsewhere),
        ("c", "stage-2.ckpt", config["noise"]),
    ):
        folder = here / "good/evaluations" / name
        folder.mkdir(parents=True)
        (folder / "evaluation.csv").write_text(f"{columns}64,2240,6,8,0.75,0.4,0.9,1000.5,512.4,0.0\n")
        settings = {"checkpoint": checkpoint, "task": config["task"], "noise": noise, "device": "cpu"}
        (folder / "evaluation.json").write_text(json.dumps({"settings": settings, "lengths": {}}))
    run = only(here / "good")
    assert [evaluation.label for evaluation in run.evaluations] == [
        "at the end of training",
        "last.ckpt, 8 samples",
        "last.ckpt, Files books/*.txt, 8 samples",
        "stage-2.ckpt, 8 samples",
    ]
    assert [evaluation.own for evaluation in run.evaluations] == [True, True, False, False]
    assert [evaluation.stage for evaluation in run.evaluations] == [None, None, None, 2]
    assert run.longest_test is not None and run.longest_test["segments"] == 64
    page = made("good")
    assert [trace["y"] for trace in page.figures["memory"]["data"]] == [[512.4]] * 3
    assert page.figures["lengths"]["layout"]["xaxis"]["tickvals"][-1] == 64
    assert [cell.strip() for cell in page.tables["tests"][-1][-4:]] == ["1,000", "cpu", "512", "–"]
    # Earlier versions did not count different questions.
    assert [cell.strip() for cell in page.tables["tests"][-1][4:7]] == ["8", "–", "–"]


def pixels(picture: bytes | str) -> bytes:
    """Those of a picture, or of one that stands in a page."""
    content = picture if isinstance(picture, bytes) else b64decode(picture.partition(",")[2])
    with Image.open(BytesIO(content)) as image:
        return image.convert("RGB").tobytes()


def test_a_page_of_two_runs_is_small(here: Path) -> None:
    """Whatever has been drawn of them, it can be mailed."""
    maps = ROOT / "experiments/attention_of_memory"
    copy(here, "other", model={"memory_size": 5})
    for name in ("good", "other"):
        (here / name / "attention/last").mkdir(parents=True)
        for picture in ("attention.png", "figure.png"):
            shutil.copy(maps / picture, here / name / "attention/last")
    page = made("good", "other")
    assert Path("page.html").stat().st_size < 2.5e6
    assert page.plotly == get_plotlyjs() and sum(tag == "img" for tag, _ in page.tags) == 4


def test_attention_maps_are_embedded(here: Path) -> None:
    folder = here / "good/attention/last-detect-1a2b"
    folder.mkdir(parents=True)
    shutil.copy(here / "good/curriculum.png", folder / "attention.png")
    (folder / "broken.png").write_text("not a picture")
    cut = (here / "good/curriculum.png").read_bytes()[:900]
    (folder / "cut.png").write_bytes(cut)
    page = made("good")
    image, damaged = [attributes for tag, attributes in page.tags if tag == "img"]
    assert image["alt"] == "Attention map of good: last-detect-1a2b/attention" and image["loading"] == "lazy"
    assert pixels(str(image["src"])) == pixels((folder / "attention.png").read_bytes())
    assert damaged["src"] == f"data:image/png;base64,{b64encode(cut).decode()}"
    assert "good/attention/last-detect-1a2b/broken.png: is no picture" in page.text


def test_a_young_an_interrupted_and_a_stuck_run(here: Path) -> None:
    (here / "good/phases.json").unlink()  # as in version 0.1
    young = copy(here, "young")
    for name in ("stages.csv", "evaluation.csv", "hardware.json", "train.log"):
        (young / name).unlink()
    shutil.rmtree(young / "metrics")
    interrupted = copy(here, "interrupted")
    (interrupted / "evaluation.csv").unlink()
    (interrupted / "stages.csv").write_text("".join((here / "good/stages.csv").read_text().splitlines(True)[:2]))
    log = interrupted / "metrics/version_0/metrics.csv"
    text = log.read_text()
    log.write_text(text[: 3 * len(text) // 4].rstrip())
    stuck = copy(here, "stuck", curriculum={"when_stuck": "stop"})
    stopped = copy(here, "stopped", curriculum={"max_segments": 9}, trainer={"max_steps": 18})

    assert [only(folder).status for folder in (young, stuck, stopped)] == [
        "interrupted or running", "did not converge", "stopped at max_steps",
    ]  # fmt: skip
    run = only(interrupted)
    assert run.status == "interrupted or running"
    assert run.problems and run.problems[0].startswith("metrics/version_0/metrics.csv: is incomplete; ")
    assert run.stages[0].seconds is not None and run.stages[-1].converged is None
    page = made("young", "interrupted", "stuck", "stopped")
    assert [row[2].strip() for row in page.tables["runs"][1:3]] == ["not tested", "not tested"]
    assert "was not written down" in page.tables["machines"][1][-1]
    # Alone, a young run still makes a page.
    page = made("young")
    assert page.figures == {} and "No run has been validated yet." in page.text


def test_a_resumed_run_is_one_curve(here: Path) -> None:
    """Killed at step 9 with a checkpoint of step 6: what was logged of steps 7 to 9 is replaced."""
    shutil.rmtree(here / "good/metrics/version_0")
    header = "epoch,step,train/loss,val/accuracy,val/accuracy_segments_1,val/accuracy_segments_2\n"
    for version, lines in {
        0: ("0,2,9.0,,,", "0,2,,0.2,0.2,", "1,5,9.0,,,", "1,5,,1.0,1.0,", "2,6,9.0,,,", "2,8,9.0,,,"),
        1: ("2,6,1.0,,,", "2,8,1.0,,,", "2,8,,0.6,0.9,0.6"),
        10: ("3,9,0.5,,,", "3,10,nan,,,"),
    }.items():
        folder = here / f"good/metrics/version_{version}"
        folder.mkdir()
        (folder / "metrics.csv").write_text(header + "".join(f"{line}\n" for line in lines))
    (here / "good/metrics/version_2").mkdir()
    for name in ("stages.csv", "phases.json"):
        (here / "good" / name).unlink()
    run = only(here / "good")
    assert run.curves[LOSS] == [
        Point(3, "stage 1", 9.0), Point(6, "stage 1", 9.0), Point(7, "stage 2", 1.0), Point(9, "stage 2", 1.0),
        Point(10, "stage 2", 0.5),
    ]  # fmt: skip
    assert [(stage.number, stage.steps, stage.accuracy) for stage in run.stages] == [(1, 6, 1.0), (2, 3, 0.6)]
    assert run.problems == [] and run.status == "interrupted or running"


def test_a_phase_after_the_curriculum(here: Path) -> None:
    """Of 18 steps, the curriculum of the good run takes all; here its stages take 4 each and memory is held for 6."""
    (here / "good/phases.json").unlink()  # as in version 0.1
    stages = (here / "good/stages.csv").read_text().splitlines()
    shorter = [",".join([row.split(",")[0], "4", *row.split(",")[2:]]) for row in stages[1:]]
    for name, steps in (("done", 6), ("holding", 7)):
        folder = copy(here, name)
        config = yaml.safe_load((folder / "config.yaml").read_text())
        (folder / "config.yaml").write_text(yaml.safe_dump(config | {"hold": {"steps": steps}}))
        (folder / "stages.csv").write_text("\n".join([stages[0], *shorter, ""]))
    done, holding = read_runs(["done", "holding"])[0]
    assert (done.status, done.phases[1].steps) == ("finished", 6)
    assert (holding.status, holding.phases[1].steps) == ("interrupted or running", 6)
    page = made("done")
    (bars,) = page.figures["timeline_steps"]["data"]
    assert bars["text"] == ["1", "2", "3", "State passing"] and bars["base"][-1] == 12 and bars["x"][-1] == 6
    assert page.figures["timeline_seconds"]["data"][0]["text"] == ["1", "2", "3"]
    assert page.tables["runs"][1][5].split()[-3:] == ["+", "State", "passing"]


def test_a_language_model_has_perplexity_and_no_stages(here: Path) -> None:
    config = yaml.safe_load((here / "good/config.yaml").read_text())
    config["curriculum"] = {"_target_": "rmt_lightning.training.phases.curriculum.FixedSteps", "steps": 10}
    config["model"] = {"_target_": "rmt_lightning.models.transformer_xl.TransformerXL", "layers": 1, "width": 16}
    (here / "good/config.yaml").write_text(yaml.safe_dump(config))
    for name in ("stages.csv", "phases.json"):
        (here / "good" / name).unlink()
    (here / "good/metrics/version_0/metrics.csv").write_text(
        "epoch,step,train/loss,val/bits_per_byte,val/loss,val/perplexity\n0,4,6.4,,,\n0,4,,3.3,6.4,597.5\n1,9,,3.2,6.3,544.5\n"
    )
    (here / "good/evaluation.csv").write_text(
        "documents,nats,tokens,bytes,loss,perplexity,bits_per_byte\n2,16847.5,2639,7082,6.38,592.33,3.43206\n"
    )
    page = made("good")
    heads, summary = page.tables["runs"]
    cells = {head.strip(): " ".join(cell.split()) for head, cell in zip(heads, summary, strict=True)}
    assert cells["status"] == "finished" and cells["segments"] == "–" and cells["model"] == "TransformerXL 1 × 16"
    assert cells["test of the longest inputs"] == "perplexity 592.33 3.4321 bits per byte, 2 documents"
    (trace,) = page.figures["val_perplexity"]["data"]
    assert (trace["x"], trace["y"], trace["customdata"]) == ([5, 10], [597.5, 544.5], ["", ""])
    assert page.figures["timeline_steps"]["data"][0]["text"] == ["Training"]
    validated = {"val_bits_per_byte", "val_loss", "val_perplexity"}
    assert page.figures.keys() == {"loss", "timeline_steps"} | validated
    assert "Not everything could be read" not in page.text


def test_a_new_metric_shows_by_itself(here: Path) -> None:
    log = here / "good/metrics/version_0/metrics.csv"
    head, *lines = log.read_text().splitlines()
    validated = [bool(row["val/accuracy"]) for row in rows(log)]
    scores = [f",{0.1 * number:.1f}" if done else "," for number, done in enumerate(validated)]
    log.write_text("\n".join([f"{head},val/f1_score", *map("".join, zip(lines, scores, strict=True)), ""]))
    page = made("good")
    (trace,) = page.figures["val_f1_score"]["data"]
    assert trace["y"] == pytest.approx([0.1 * number for number, done in enumerate(validated) if done])
    assert page.figures["val_f1_score"]["layout"]["yaxis"]["title"]["text"] == "validation f1 score"
    assert "Validation f1 score" in page.text
    # Slices of an accuracy are no metrics of their own.
    assert {name for name in page.figures if name.startswith("val")} == {"val_accuracy", "val_loss", "val_f1_score"}


def phases(folder: Path, *entries: dict[str, Any]) -> None:
    default = {"name": "any", "first_step": None, "steps": 0, "finished": False, "stuck": False, "table": None}
    (folder / "phases.json").write_text(json.dumps([default | entry for entry in entries]))


CURRICULUM = {"title": "Curriculum", "first_step": 0, "steps": 12, "finished": True, "table": "stages.csv"}


def test_any_phase_is_shown_by_its_own_title_and_rows(here: Path) -> None:
    sleep = {"title": "Sleep <b>", "first_step": 12, "steps": 6, "table": "sleep.csv"}
    (here / "good/sleep.csv").write_text("step,depth,dream\n15,0.123456789,fish\n18,2,/home/jane/x\n18,")
    stages = (here / "good/stages.csv").read_text().splitlines()[:3]
    (here / "good/stages.csv").write_text("\n".join([*stages, ""]))
    phases(here / "good", CURRICULUM, sleep)
    page = made("good")
    assert [[cell.strip() for cell in row] for row in page.tables["phase-0-1"]] == [
        ["step", "depth", "dream"], ["15", "0.12346", "fish"], ["18", "2", "~/x"],
    ]  # fmt: skip
    assert "good: Sleep <b>, 6 steps" in " ".join(page.text.split())
    assert "good/sleep.csv: is incomplete; 2 rows could be read" in page.text
    (bars,) = page.figures["timeline_steps"]["data"]
    # Its validations, on three segments, make no stage.
    assert bars["text"] == ["1", "2", "Sleep &lt;b&gt;"] and bars["x"] == [6, 6, 6]
    assert bars["marker"]["pattern"]["shape"][-1] == "."
    (trace,) = page.figures["val_accuracy"]["data"]
    assert trace["text"] == ["", "1", "", "2", "", "Sleep &lt;b&gt;"]
    assert page.tables["runs"][1][5].split()[-3:] == ["+", "Sleep", "<b>"]


def test_the_status_follows_from_the_phases(here: Path) -> None:
    def status(*entries: dict[str, Any]) -> str:
        phases(here / "good", *entries)
        return only(here / "good").status

    later = {"title": "Later", "first_step": 12}
    assert status(CURRICULUM, later) == "interrupted or running"
    assert status(CURRICULUM, later | {"finished": True}) == "finished"
    assert status(CURRICULUM | {"finished": False, "stuck": True}, later | {"first_step": None}) == "did not converge"
    assert status(CURRICULUM, later | {"out_of_time": True}) == "stopped at max_time"
    change(here / "good", trainer={"max_steps": 18})
    assert status(CURRICULUM, later) == "stopped at max_steps"


@pytest.mark.parametrize("content", [b"", b"{}", b'[{"title": 1}]', b"\xff[", b"[" * 9999], ids=range(5))
def test_phases_that_cannot_be_read_are_those_of_the_other_files(content: bytes, here: Path) -> None:
    (here / "good/phases.json").write_bytes(content)
    (run,), _ = read_runs(["good"])
    assert run.problems == ["phases.json: is damaged"]
    assert [(phase.title, phase.steps) for phase in run.phases] == [("Curriculum", 18)] and run.status == "finished"


def test_a_phase_has_no_table_elsewhere(here: Path) -> None:
    (here / "secret.csv").write_text("word\nhush\n")
    phases(here / "good", CURRICULUM | {"table": "../secret.csv"})
    assert "hush" not in made("good").text


def test_long_curves_become_means() -> None:
    points = [Point(step, f"stage {1 + (step > 1500)}", float(step)) for step in range(1, 3001)]
    thinned = plots._thinned(points)
    assert len(thinned) <= plots.POINTS + 2
    assert thinned[0] == Point(3, "stage 1", 2.0) and thinned[-1] == Point(3000, "stage 2", 2999.0)
    assert sum(point.value for point in thinned) / len(thinned) == pytest.approx(1500.5, rel=1e-3)


def nothing(here: Path) -> str:
    return "absent"


def empty_folder(here: Path) -> str:
    (here / "empty").mkdir()
    return "empty"


def a_file(here: Path) -> str:
    return "good/config.yaml"


def config_with(content: bytes | None) -> Callable[[Path], str]:
    def make(here: Path) -> str:
        config = copy(here, "broken") / "config.yaml"
        config.unlink() if content is None else config.write_bytes(content)
        return "broken"

    return make


BROKEN = [
    (nothing, "absent: does not exist"),
    (lambda here: "no*thing", "no*thing: does not exist"),
    (empty_folder, "empty: holds no run"),
    (a_file, "good/config.yaml: is not a folder"),
    (config_with(None), "broken: config.yaml is missing"),
    (config_with(b""), "broken: config.yaml is empty"),
    (config_with(b"\x00\xff\x93garbage"), "broken: config.yaml is damaged"),
    (config_with(b"task: [unclosed"), "broken: config.yaml is damaged"),
    (config_with(b"[" * 600), "broken: config.yaml is damaged"),
    (config_with(b"services: {web: {image: nginx}}\n"), "broken: config.yaml is not that of a run"),
    (config_with(b"- a list\n"), "broken: config.yaml is not that of a run"),
]


@pytest.mark.parametrize(("make", "message"), BROKEN)
def test_what_cannot_be_read_is_named_and_skipped(
    make: Callable[[Path], str], message: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = make(here)
    page = made(place, "good")
    assert capsys.readouterr().err == f"skipped {message}\n"
    assert f"{message} (skipped)" in page.text and len(page.tables["runs"]) == 2
    # Alone it makes no page.
    assert fails(capsys, place) == f"error: no run could be read: {message}\n"


def fails(capsys: pytest.CaptureFixture[str], *arguments: str, output: str = "new.html") -> str:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as exit_:
        patch.setattr(sys, "argv", ["report", *arguments, "--output", output])
        front_door.run()
    errors = capsys.readouterr().err
    assert exit_.value.code == 2 and errors.count("\n") == 1
    assert not Path("new.html").exists()
    return errors


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_folders_without_permission(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    closed = copy(here, "closed")
    closed.chmod(0)
    try:
        made("closed", "good")
        assert capsys.readouterr().err == "skipped closed: permission denied\n"
    finally:
        closed.chmod(0o755)


GARBAGE = [
    b"",
    b"\x00\x01\xfe\xff" * 50,
    b"a,b\n1,2\n",
    b"epoch,stage\n",
    b"segments," + b"9" * 200_000,
    b"[{]\n",
    b"null\n",
]


@pytest.mark.parametrize("content", GARBAGE, ids=range(len(GARBAGE)))
def test_garbage_in_any_other_file_is_not_fatal(content: bytes, here: Path) -> None:
    folder = here / "good/evaluations/last-detect"
    folder.mkdir(parents=True)
    for name in ("stages.csv", "evaluation.csv", "metrics/version_0/metrics.csv", "hardware.json"):
        (here / "good" / name).write_bytes(content)
    for name in ("evaluation.csv", "evaluation.json"):
        (folder / name).write_bytes(content)
    page = made("good")
    assert page.figures == {} and len(page.tables["runs"]) == 2
    for name in (
        "stages.csv",
        "hardware.json",
        "metrics/version_0/metrics.csv",
        "evaluations/last-detect/evaluation.csv",
    ):
        assert f"good/{name}: " in page.text


PROBES = (
    "probe,segments,right,samples,questions,accuracy,low,high,decoy,last_place,commonest_place\n"
    "detect,1,6,8,8,0.75,0.4,0.9,0,8,8\nno fact (nowhere),1,0,8,8,0.0,0.0,0.3,6,0,0\n"
)


@pytest.mark.fault("a table of probes is damaged", "it is named, and what can be read of it is shown")
def test_probes_and_what_may_stand_in_their_place(here: Path) -> None:
    damages = [*GARBAGE, PROBES.replace(",8,8,0.75", ",0,8,0.75").encode(), PROBES.replace("decoy", "else").encode()]
    for number, content in enumerate([PROBES.encode(), *damages, PROBES[:-4].encode()]):
        folder = here / f"good/evaluations/{number:02}"
        folder.mkdir(parents=True)
        shutil.copy(here / "good/evaluation.csv", folder)
        (folder / "probes.csv").write_bytes(content)
    page = made("good")
    tables = [page.tables[name][1:] for name in page.tables if name.startswith("probes-")]
    cells = [[[cell.strip() for cell in row] for row in table] for table in tables]
    detect = ["detect", "1", "8", "75.0%", "40.0% – 90.0%", "0.0%", "100.0%", "100.0%"]
    nothing = ["no fact (nowhere)", "1", "8", "0.0%", "0.0% – 30.0%", "75.0%", "0.0%", "0.0%"]
    assert cells == [[detect, nothing], [nothing], [detect]]
    assert all(f"good/evaluations/{number:02}/probes.csv: " in page.text for number in range(1, len(damages) + 2))


def test_nothing_is_loaded_and_nothing_escapes(here: Path) -> None:
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
    copy(here, "<img src=x onerror=alert(1)>&amp;", noise={"path": evil})
    page = made("good", "<img src=x onerror=alert(1)>&amp;")
    assert [attributes for tag, attributes in page.tags if tag == "img"] == []
    assert sum(tag == "script" for tag, _ in page.tags) == len(page.figures) + 2
    # Plotly would show the name of a run as HTML.
    assert page.figures["loss"]["data"][1]["name"] == "&lt;img src=x onerror=alert(1)&gt;&amp;amp;"
    assert evil in page.text

    loading = {"src", "href", "srcset", "action", "data", "poster"}
    assert not any(loading & attributes.keys() for _, attributes in page.tags)
    assert not {"link", "iframe", "object", "base"} & {tag for tag, _ in page.tags}
    content = Path("page.html").read_text()
    styles = "".join(re.findall(r"<style>(.*?)</style>", content, flags=re.DOTALL))
    assert styles and "url(" not in styles and "@import" not in styles
    policy = next(str(a["content"]) for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; ") and "http" not in policy


def test_keys_and_home_folders_stay_here(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/data/people/jane")
    token = "hf_" + "a1B2" * 9
    change(
        here / "good",
        noise={"path": "/data/people/jane/books/*.txt", "token": "very secret"},
        logger={"api_key": "0123", "project": "p", "url": "https://jane:pass@example.org"},
        backbone={"name": f"/home/jane/models/bert {token}", "vocabulary_file": "/mnt/home/john/v.txt"},
    )
    made("good", "/home/jane/absent")
    content = Path("page.html").read_text()
    for secret in ("jane", "john", "very secret", "0123", token, "pass@"):
        assert secret not in content.split("plotly.js v")[0], secret
    assert "path: ~/books/*.txt" in content and "vocabulary_size: 900" in content and "~/absent" in content


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/jane", "~"),
        ("/root/x and /Users/j.doe/y", "~/x and ~/y"),
        ("~/.cache/rmt", "~/.cache/rmt"),
        ("outputs/home/run", "outputs/home/run"),
        ("https://example.org/home/page", "https://example.org/home/page"),
        ("/rooted/homes/x", "/rooted/homes/x"),
        ("C:\\Users\\Jane Doe\\x", "~\\x"),
        ("d:/users/jane/x or \\\\server\\Users\\jane", "~/x or ~"),
        ("file:///home/jane/x", "file://~/x"),
        ("host:/home/jane/x:/home/bob", "host:~/x:~"),
        ("~jane/x", "~/x"),
        ("/scratch/users/jane/x /homes/jane /home2/jane", "~/x ~ ~"),
        ("s3://b/%2Fhome%2Fjane%2Fx", "s3://b/~%2Fx"),
        ("sftp://host/data/home/jane/x or //host/home/jane/x", "~/x or ~/x"),
        ("/afs/example.org/user/j/jane/x", "~/x"),
        ("/afs/example.org/usr/jane/x or /u/jane or /work/users/j/a/jane/x", "~/x or ~ or ~/x"),
        ("C:/Documents and Settings/jane/x or \\\\server\\home$\\jane\\x", "~/x or ~\\x"),
        ("/global/homes/j/jane/x or /home1/0123/jane or /data/a/big", "~/x or ~ or /data/a/big"),
        ("hdfs://node/user/jane/x or gs://b/users/jane/x", "~/x or ~/x"),
        ("/home/CORP\\jane/x or jane@cluster:~/x", "~/x or (hidden)@cluster:~/x"),
        ("/usr/lib/x or a/u/b or s3://bucket/x", "/usr/lib/x or a/u/b or s3://bucket/x"),
    ],
)
def test_home_folders(text: str, shown: str) -> None:
    assert public_text(text) == shown


def test_what_counts_as_a_key() -> None:
    shown = public({"tokenizer": "a", "memory_tokens": "b", "hf_token": "c", "key": ["d"], "secret": "", "api_key": 5})
    assert shown == {
        "tokenizer": "a", "memory_tokens": "b", "hf_token": "(hidden)", "key": ["(hidden)"], "secret": "", "api_key": 5,
    }  # fmt: skip


RANDOM = "q7Xw2Lp9Zt4Vb8Nc3Rk6Yd1Hf5Js0Gm"


@pytest.mark.fault("a key stands in a setting, an address or a message", "the page of the report does not show it")
@pytest.mark.parametrize(
    "secret",
    [
        f"sk-proj-{RANDOM}", "AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
        "AIzaSyD-9tSrke72PouQMnMX-a7eZSW0jkFMBWY", "glpat-Ab1_Cd2-Ef3Gh4Ij5Kl6", f"xoxb-1234-5678-{RANDOM}",
        "0123456789abcdef0123456789abcdef01234567", RANDOM, f"eyJhbGciOiJIUzI1NiJ9.{RANDOM}", f"ghp_{RANDOM}",
        "Bearer abcdefgh", "https://jane:pass@word@example.org", "jane:word@example.org", "s3://x?sig=abc",
        "https://hooks.slack.com/services/T0/B0/abc", "AccountKey=abc", "--api-key abc",
        "hvs.CAESIJabcdefGHIJ12345678", "sq0atp-abcdefGHIJ1234567890ab", "HF_TOKEN=abc", "password: 'abc'",
        "curl -u jane:word", "--token xabc", "DB_PASS=xabc", "sshpass -p xabc",
        "PGPASS=xabc", '{"password": "xabc"}', "DB_PASSWORD='x abc'",
        "AGE-SECRET-KEY-1QPZRY9X8GF2TVDW0S3JN54KHCE6MUA7L",
        "-----BEGIN PRIVATE KEY-----\nabc\n-----END PRIVATE KEY-----", "Xk9fQ2mZ", "aB3dE5fG7h", "tR0ub4DoR",
        "pW7xKq2ZtB4v", "hUnTeR2x9", "Zq8PvL2mXw4TsB6n",
    ],
)  # fmt: skip
def test_keys_are_known_by_how_they_look(secret: str) -> None:
    shown = public_text(f"see {secret}, and go on")
    assert "(hidden)" in shown and shown.endswith(" and go on")
    assert not any(part in shown for part in (secret.removesuffix("@example.org")[-8:], "abc", "word"))


def test_what_is_no_key_is_shown() -> None:
    for text in (
        "sentence-transformers/all-MiniLM-L6-v2-onnx-int8-quantized", "outputs/2026-01-31/12-00-00-detect",
        "memory_size_2-seed_1-bptt_depth_3", "torchmetrics.classification.MulticlassF1Score", "tokens: 5000",
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", "last-detect-1a2b3c4d/attention", "tokenizer=bert",
        "Intel(R) Xeon(R) Gold 6248R CPU @ 3.00GHz", "http://localhost:8080/x", "rmt_lightning.TinyRoFormer",
        "facebook/wav2vec2-base Wav2Vec2Bert", "NVIDIA A100-SXM4-80GB, NVIDIA H100 80GB HBM3",
        "meta-llama/Llama-3.2-1B ResNet50 EfficientNetB0",
        "Qwen/Qwen2.5-0.5B-Instruct", "Qwen2MoeForCausalLM", "LayoutLMv3 DeBERTaV3 ConvNextV2 BatchNorm1d", "AdamW8bit",
        "HuggingFaceTB/SmolLM2-135M", "BinaryAUROC SQuAD2 WikiText103 ImageNet1k", "transformer_xl ddp_cpu bf16-mixed",
        "GeForce RTX 3090 Ti", "AMD EPYC 7B12", "2026-01-31T12:00:00Z", "glibc2.35 x86_64", "2600a97 843a944 1a2b3c4d",
        "JavaScript PyTorch GitHub YouTube McDonald", "lr1e-4_bs32_seg7", "MainProcess Rank0 LOCAL_RANK=1",
    ):  # fmt: skip
        assert public_text(text) == text


def test_settings_are_known_by_their_names() -> None:
    for name in (
        "passwd", "auth", "access_token_file", "private_key_path", "secretKey", "apiKey", "WANDB_API_KEY", "sshKey",
        "credentials", "db_password", "Authorization", "x-api-key", "passphrase", "creds",
        "webhook_url", "dsn", "kerberos_keytab", "netrc", "seed_phrase", "session_id", "sessionId", "connection_string",
        "salt", "hf_tok", "csrf", "connStr", "db_pw",
    ):  # fmt: skip
        assert public({name: "abc"}) == {name: "(hidden)"}
        assert public({name: {"of": ["abc"]}}) == {name: {"of": ["(hidden)"]}}
    assert public({"passwd": 1234, "/home/jane/x": 1}) == {"passwd": "(hidden)", "~/x": 1}
    names = (
        "tokenizer",
        "text_tokens",
        "author",
        "keyword",
        "passes",
        "basis",
        "commit",
        "seed",
        "segment_length",
        "memory_size",
        "update",
        "warmup",
        "threshold",
        "patience",
        "precision",
        "accelerator",
        "jitter",
        "fragments",
        "vocabulary_size",
        "project",
        "entity",
        "tags",
        "job_type",
        "max_positions",
        "stokes",
        "skip_connection",
        "session",
    )
    kept = dict.fromkeys(names, "a1" * 9)
    assert public(kept) == kept


@pytest.mark.fault("a file of a run is a link to a private one, or a pipe", "the report skips the run and says so")
@pytest.mark.parametrize("name", ["evaluation.csv", "attention", "metrics/version_0/metrics.csv"])
def test_a_page_shows_nothing_from_elsewhere(name: str, here: Path) -> None:
    copy(here, "other")
    (here / "good" / name).rename(here / "private") if (here / "good" / name).exists() else (here / "private").mkdir()
    (here / "good" / name).symlink_to(here / "private")
    page = made("good", "other")
    assert f"good: {name} is a link that leads out of the run folder (skipped)" in page.text
    (here / "good" / name).unlink()
    os.mkfifo(here / "good" / name)
    assert f"good: {name} is no file (skipped)" in made("good", "other").text


def test_links_of_wandb_are_its_own(here: Path) -> None:
    """In an offline run it keeps links to its logs in the home folder, of which nothing is read."""
    logs = here / "good" / "wandb" / "offline-run-1" / "logs"
    logs.mkdir(parents=True)
    (here / "core-debug.log").touch()
    (logs / "debug-core.log").symlink_to(here / "core-debug.log")
    assert "skipped" not in made("good").text


def test_differences() -> None:
    configs = [{"a": {"x": 1, "y": [1]}, "b": None}, {"a": {"x": 1.0, "y": [1]}, "b": None, "c": {}}]
    assert differences(configs) == {"a.x": ["1", "1.0"], "c": ["–", "{}"]}
    assert differences(configs[:1]) == {}


def test_bad_outputs(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert fails(capsys, "good", output="page.txt") == (
        "error: --output=page.txt: is not the name of a page; give one that ends in .html\n"
    )
    (here / "folder.html").mkdir()
    assert fails(capsys, "good", output="folder.html").startswith("error: --output=folder.html: is not the name")
    assert "cannot be written: " in fails(capsys, "good", output="good/config.yaml/x.html")
    assert fails(capsys, "--color=red").startswith("error: ")
    # An older page survives a full disk, and is replaced as a whole otherwise.
    Path("old.html").write_text("old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        error = fails(capsys, "good", output="old.html")
    assert error == "error: --output=old.html: cannot be written: No space left on device; give another place\n"
    assert Path("old.html").read_text() == "old" and not list(here.glob("*.partial"))
    front_door.main(["good", "--output", "old.html"])
    assert Path("old.html").read_text().endswith("</html>")


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def sweep_of(here: Path) -> None:
    for number, size in enumerate((2, 5)):
        job = copy(here, f"sweeps/one/memory_size_{size}")
        settings = {"number": number, "settings": {"model.memory_size": size}, "failed": None}
        (job / "job.json").write_text(json.dumps(settings))


def test_a_report_that_fails_writes_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep_of(here)
    before = files(here)
    assert "cannot be written: " in fails(capsys, "sweeps/one", output="good/config.yaml/x.html")
    assert files(here) == before
    # Nothing but a job that has not begun: there is no run to show.
    (here / "young/job").mkdir(parents=True)
    (here / "young/job/job.json").write_text("{}")
    before = files(here)
    assert "no run could be read: young: holds no run" in fails(capsys, "young")
    assert files(here) == before


def test_patterns_find_sweeps_each_once(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep_of(here)
    page = made("sweeps/o*", "sweeps/one", "sweeps/../sweeps", "sweeps/*/memory*")
    assert [name for name in page.tables if name.startswith("sweep")] == ["sweep-0-groups"]
    assert capsys.readouterr().out.count("sweeps/one holds all of it") == 1
    assert {"sweep.csv", "summary.csv", "sweep.png", "sweep.pdf"} <= files(here / "sweeps/one")


def test_a_sweep_from_within(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep_of(here)
    monkeypatch.chdir(here / "sweeps/one/memory_size_2")
    made(".")
    assert (here / "sweeps/one/sweep.csv").exists() and not Path("sweep.csv").exists()


def test_a_folder_of_a_sweep_that_cannot_be_written_is_named(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep_of(here)
    (here / "sweeps/one/sweep.csv").mkdir()
    page = made("sweeps")
    told = capsys.readouterr()
    assert told.err == "skipped sweeps/one/sweep.csv: cannot be written: Is a directory\n"
    assert "Sweep one" in told.out and len(page.tables["runs"]) == 3


def test_chance_is_that_of_the_task() -> None:
    (axes,) = figures.generalization([{"stage": 1, "segments": 1, "accuracy": 0.5}], chance=0.25).axes
    assert 0.25 in [line.get_ydata()[0] for line in axes.lines]


def test_the_commands_of_the_readme(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commands = [shlex.split(command)[3:] for command in COMMANDS if "rmt_lightning.report" in command]
    for name in ("12-00-00-detect", "13-00-00-memorize"):
        copy(here, f"outputs/2026-01-31/{name}")
    assert len(commands) == 2
    for arguments in commands:
        front_door.main(arguments)
    assert sorted(capsys.readouterr().out.splitlines()) == ["january.html shows 2 runs", "report.html shows 2 runs"]


def test_help_does_not_wait_for_what_is_heavy() -> None:
    program = """
import sys
from rmt_lightning.report import main
try:
    main(["--help"])
finally:
    print(sorted({"torch", "plotly", "hydra", "yaml", "pandas", "scipy", "matplotlib"} & set(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0 and result.stdout.endswith("\n[]\n")
    assert "a folder that holds runs at any depth" in " ".join(result.stdout.split())


def test_colors_are_legible_on_white_and_on_black() -> None:
    """A contrast of at least 3 (WCAG 2.2, 1.4.11) for everything that is drawn, and 4.5 for text."""
    css = (Path(plots.__file__).parent / "report.html").read_text()
    light, dark = (dict(re.findall(r"--(\w+): (#\w+)", part)) for part in css.split("prefers-color-scheme: dark"))
    for theme in (light, dark):
        assert all(contrast(color, theme["paper"]) >= 3 for color in plots.COLORS)
        for name in ("ink", "quiet", "good", "bad", "open"):
            assert contrast(theme[name], theme["paper"]) >= 4.5 and contrast(theme[name], theme["raised"]) >= 4.5
    styles = [plots.style(number) for number in range(20)]
    assert len(set(styles)) == 20


def contrast(one: str, other: str) -> float:
    def luminance(color: str) -> float:
        full = color if len(color) == 7 else "#" + "".join(2 * digit for digit in color[1:])
        red, green, blue = (int(full[place : place + 2], 16) / 255 for place in (1, 3, 5))
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (red, green, blue)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    bright, faint = sorted((luminance(one), luminance(other)), reverse=True)
    return (bright + 0.05) / (faint + 0.05)


def test_ticks_are_powers_of_two() -> None:
    axis = plots._powers_of_two([1, 3, 4096])
    assert axis["tickvals"] == [1, 4, 16, 64, 256, 1024, 4096]
    assert axis["range"][0] < 0 and axis["range"][1] > log(4096, 10)


def test_an_extra_that_is_missing_is_named(finished_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "rmt_lightning.reporting.page", raising=False)
    monkeypatch.setitem(sys.modules, "plotly", None)
    with pytest.raises(UserError, match=r"plotly: is missing; pip install 'rmt-lightning\[report\]'"):
        report([str(finished_run)], Path("report.html"))
