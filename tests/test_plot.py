"""Figures for papers: what stands in them is what runs have found, and nothing of it is cut or covered."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.core.global_hydra import GlobalHydra
from matplotlib import rcParams
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from rmt_lightning import plot as front_door
from rmt_lightning.app import plotting
from rmt_lightning.core.files import write_csv
from rmt_lightning.core.statistics import Proportion, mean
from rmt_lightning.reporting import curves, figures, style
from rmt_lightning.reporting.reading import read_tests
from rmt_lightning.reporting.style import Curve, Place

CONFIG: dict[str, Any] = {
    "task": {"_target_": "rmt_lightning.Detect"},
    "noise": {"_target_": "rmt_lightning.Prose", "documents": 20},
    "backbone": {"_target_": "rmt_lightning.TinyBert", "width": 64, "layers": 2},
    "model": {"_target_": "rmt_lightning.RMTEncoder", "segment_length": 64, "memory_size": 10},
    "data": {"validation_samples": 512},
    "curriculum": {"max_segments": 3, "grow": "segments"},
    "trainer": {"max_steps": -1},
}


def rows_of(rights: dict[int, int], samples: int = 256, **more: Any) -> list[dict[str, Any]]:
    """Rows of evaluation.csv."""
    return [
        {"segments": segments, **Proportion(right, samples).row(), "text_tokens": 51 * segments} | more
        for segments, right in rights.items()
    ]


def make(folder: Path, seed: int = 1, rights: dict[int, int] | None = None, **changes: dict[str, Any]) -> Path:
    """A run folder that has passed three stages and been tested."""
    folder.mkdir(parents=True)
    config = {name: part | changes.get(name, {}) for name, part in CONFIG.items()} | {"seed": seed}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    write_csv(folder / "evaluation.csv", rows_of(rights or {1: 256, 2: 250 - seed, 4: 200 + seed}))
    stages = [
        {"stage": stage, "steps": 50 + seed, "seconds": 1.0, "accuracy": 0.99, "converged": True} for stage in (1, 2, 3)
    ]
    write_csv(folder / "stages.csv", stages)
    logged = [
        {"step": 25 * number - 1, "val/accuracy": accuracy, f"val/accuracy_segments_{stage}": accuracy}
        for number, (stage, accuracy) in enumerate([(1, 0.5), (1, 0.99), (2, 0.9), (2, 0.99), (3, 0.99)], start=1)
    ]
    (folder / "metrics/version_0").mkdir(parents=True)
    columns = ["step", "val/accuracy", *(f"val/accuracy_segments_{stage}" for stage in (1, 2, 3))]
    write_csv(
        folder / "metrics/version_0/metrics.csv", [{name: row.get(name, "") for name in columns} for row in logged]
    )
    return folder


def evaluate(run: Path, name: str = "last-detect-0123abcd", **settings: Any) -> Path:
    """The folder of an evaluation of a run."""
    folder = run / "evaluations" / name
    folder.mkdir(parents=True)
    own = {"checkpoint": "last.ckpt", "task": CONFIG["task"], "noise": CONFIG["noise"]} | settings
    (folder / "evaluation.json").write_text(json.dumps({"settings": own}))
    memory = {"host_memory_mb": 500.0, "device_memory_mb": 0.0}
    write_csv(folder / "evaluation.csv", rows_of({1: 128, 64: 120}, 128, **memory))
    write_csv(
        folder / "retention.csv", [{"age": age, "right": 64 - age // 32, "streams": 64} for age in range(16, 257, 16)]
    )
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where there are three seeds of one model and two of another, and a sweep over pairs."""
    monkeypatch.chdir(tmp_path)
    for seed in (1, 2, 3):
        evaluate(make(tmp_path / f"runs/rmt-seed_{seed}", seed))
    for seed in (1, 2):
        make(tmp_path / f"runs/lstm-seed_{seed}", seed, model={"_target_": "rmt_lightning.LSTM"})
    for pairs, seed in product((2, 4), (1, 2)):
        task = {"_target_": "rmt_lightning.Remember", "pairs": pairs, "values": 16}
        folder = make(tmp_path / f"sweep/pairs_{pairs}-seed_{seed}", seed, task=task)
        held = {"pairs": pairs, "capacity": pairs * 0.9 - 0.1 * seed}
        write_csv(folder / "evaluation.csv", rows_of({pairs: 240}, **held))
        settings = {"task.pairs": pairs, "model": "rmt_encoder", "seed": seed}
        (folder / "job.json").write_text(json.dumps({"number": pairs, "settings": settings, "failed": None}))
    return tmp_path


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """The command, in this process."""

    def call(*words: str) -> None:
        monkeypatch.setattr(sys, "argv", ["plot", *words])
        front_door.run()
        GlobalHydra.instance().clear()

    yield call
    GlobalHydra.instance().clear()


def groups(*places: str, but: tuple[str, ...] = ()) -> list[curves.Group]:
    found, skipped = read_tests(places)
    assert skipped == []
    return curves.groups(found, but)


def test_seeds_become_a_mean_and_a_single_run_has_its_own_interval(here: Path) -> None:
    lstm, rmt = groups("runs")
    assert (lstm.label, rmt.label) == ("LSTM", "RMTEncoder")
    one, two, four, *_, last = rmt.curve(curves.accuracy("segments")).places
    assert one == Place(1, 1, 1, 1)
    middle = mean([(200 + seed) / 256 for seed in (1, 2, 3)])
    assert four == Place(4, middle.value, *middle.interval) and middle.half is not None
    assert last == Place(64, 120 / 128, 120 / 128, 120 / 128)
    (alone,) = groups("runs/rmt-seed_2")
    assert alone.label == "" and alone.curve(curves.accuracy("segments")).places[2] == Place(
        4, 202 / 256, *Proportion(202, 256).interval
    )
    # Of two tests of a length that of more questions, with the memory that the other tells of.
    assert alone.curve(curves.accuracy("segments")).places[0] == Place(1, 1, *Proportion(256, 256).interval)
    assert [place.y for place in alone.curve(curves.megabytes("segments")).places] == [500, 500]
    assert two.x == 2 and [place.y for place in alone.curve(curves.kept).places[:2]] == [1, 63 / 64]
    taken = rmt.curve(curves.steps).places
    assert taken[2] == Place(3, 156, *mean([153, 156, 159]).interval)


def test_only_seeds_are_averaged(here: Path) -> None:
    """Another setting makes another curve; so does the same seed, which would make an interval narrower than it is."""
    make(here / "runs/small", 4, model={"memory_size": 2})
    make(here / "runs/again", 1, data={"validation_samples": 512})
    make(here / "runs/logged", 5, {1: 256}, test={"samples": 9})
    labels = {group.label: [tested.run.name for tested in group.members] for group in groups("runs")}
    assert len(labels) == 4 and sorted(map(len, labels.values())) == [1, 1, 2, 4]
    sets = {group.label: len(group.members) for group in groups("runs/rmt*", "runs/small")}
    assert sets == {"memory_size 10": 3, "memory_size 2": 1}


def test_an_evaluation_alone(here: Path) -> None:
    other = evaluate(here / "runs/rmt-seed_1", "last-reasoning-0", task={"_target_": "rmt_lightning.Reasoning"})
    elsewhere = evaluate(here / "results", "stage-1-detect-0", checkpoint="stage-1.ckpt")
    assert [group.label for group in groups(str(other), "runs/rmt-seed_2")] == ["Detect", "Reasoning"]
    (apart,) = groups(str(elsewhere))
    assert apart.curve(curves.accuracy("segments")).places[-1].x == 64
    # Those of a run, each once.
    assert len(groups("runs/rmt-seed_1/evaluations", "runs/rmt-seed_1/evaluations/last-r*")) == 2


def test_stages_are_those_of_runs_whether_they_were_passed_or_not(
    here: Path, run: Callable[..., None], capsys: Any
) -> None:
    for seed in (1, 2):
        make(here / f"stuck/seed_{seed}", seed)
        stages = [{"stage": 1, "steps": 50, "seconds": 1.0, "accuracy": 0.3 + 0.1 * seed, "converged": False}]
        write_csv(here / f"stuck/seed_{seed}/stages.csv", stages)
        shutil.rmtree(here / f"stuck/seed_{seed}/metrics")
    run("runs=stuck", "kind=curriculum", "output=a.png")
    assert Path("a.png").read_bytes().startswith(b"\x89PNG") and " 0.45 " in capsys.readouterr().out
    run("runs=[runs/rmt-seed_1,runs/rmt-seed_1/evaluations]", "kind=curriculum", "output=b.png")
    told = capsys.readouterr().out
    assert "left out rmt-seed_1/last-detect, which has nothing to show for kind=curriculum" in told


def test_lengths_in_tokens(here: Path) -> None:
    found, _ = read_tests(["runs/rmt-seed_1"])
    assert not curves.in_tokens(found)
    folder = make(here / "runs/long", 1, model={"segment_length": 512})
    found, _ = read_tests(["runs/rmt-seed_1", "runs/long"])
    assert curves.in_tokens(found)
    write_csv(folder / "evaluation.csv", rows_of({1: 256}, tokens=1000) + rows_of({16: 200}, tokens=64000))
    found, _ = read_tests(["runs/long"])
    assert curves.in_tokens(found) and len(curves.by_length(found[0])) == 2


def cut_or_covered(figure: Figure) -> list[str]:
    """What leaves a figure, or stands on something else."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    # Ticks beyond the ends of an axis are not drawn.
    hidden = {text for axes in figure.axes for text in _hidden_ticks(axes)}
    shown = [text for text in texts if text not in hidden]
    # Of labels without their lines.
    boxes = {text: Text.get_window_extent(text, renderer) for text in shown}
    whole = figure.bbox.padded(1)
    found = [
        f"cut: {text.get_text()}"
        for text, box in boxes.items()
        if not (box.x0 >= whole.x0 and box.x1 <= whole.x1 and box.y0 >= whole.y0 and box.y1 <= whole.y1)
    ]
    found += [
        f"on each other: {one.get_text()}, {other.get_text()}"
        for one, other in combinations(boxes, 2)
        if boxes[one].padded(-1).overlaps(boxes[other].padded(-1))
    ]
    for legend in figure.legends:
        box = legend.get_window_extent(renderer)
        found += [
            f"legend on {axes.get_ylabel()}" for axes in figure.axes if axes.get_window_extent(renderer).overlaps(box)
        ]
    return found


def _hidden_ticks(axes: Any) -> list[Text]:
    ticks = []
    for axis in (axes.xaxis, axes.yaxis):
        low, high = sorted(axis.get_view_interval())
        every = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
        ticks += [
            label
            for tick in every
            for label in (tick.label1, tick.label2)
            if not low <= tick.get_loc() <= high or not label.get_visible()
        ]
    return ticks


@pytest.mark.parametrize(
    ("name", "width"),
    [
        ("talk", "column"),
        ("paper", "page"),
        pytest.param("talk", "page", marks=pytest.mark.soak),
        pytest.param("paper", "column", marks=pytest.mark.soak),
    ],
)
def test_nothing_is_cut_or_covered(name: Any, width: Any, here: Path) -> None:
    with style.styled(name, width):
        for kind, places in KINDS.items():
            figure = plotting._of_sweep(places) if kind == "sweep" else plotting._of_runs(places, kind)
            assert cut_or_covered(figure) == [], kind
            assert figure.get_figwidth() == style.WIDTHS[width]
        many = [
            Curve(f"model {number}", look, [Place(2**power, 1 - number * power / 400, 0.4, 1) for power in range(8)])
            for number, look in enumerate(style.looks([f"model {number}" for number in range(11)]))
        ]
        figure = figures.lengths(many, chances=[1 / 6])
        assert cut_or_covered(figure) == []
        named = [text.get_text() for text in figure.axes[0].texts] or [
            str(h.get_label()) for h in figure.legends[0].legend_handles if h
        ]
        assert {curve.label for curve in many} <= {*named}


KINDS = {
    "length": ["runs"], "curriculum": ["runs"], "retention": ["runs"], "capacity": ["sweep"], "sweep": ["sweep"],
}  # fmt: skip


def test_chance_is_drawn_where_the_task_can_be_made(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    def lines(*places: str) -> list[float]:
        axes = plotting._of_runs(places, "length").axes[0]
        return sorted(line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == ":")

    assert lines("runs") == [1 / 6]
    make(here / "others/whereabouts", 1, task={"_target_": "rmt_lightning.Whereabouts"})
    assert lines("runs", "others") == [1 / 7, 1 / 6]
    # Of classes from elsewhere nothing is imported, and files may have gone.
    make(here / "evil/run", 1, task={"_target_": "evil.Task"})
    make(here / "gone/run", 1, task={"_target_": "rmt_lightning.QA", "path": "absent.jsonl"})
    inner = {"_target_": "pathlib.Path.touch", "self": "executed"}
    for number, task in enumerate(
        [
            {"_target_": "rmt_lightning.QA", "path": inner},
            {"_target_": "rmt_lightning.core.files.removed", "path": "runs"},
        ]
    ):
        make(here / f"worse{number}/run", 1, task=task)
        assert lines(f"worse{number}") == []
    assert lines("evil") == lines("gone") == []
    assert Path("runs").is_dir() and not Path("executed").exists()


@pytest.mark.parametrize(
    ("words", "width"),
    [(["format=pdf"], 3.3), (["output=a/b.pdf", "width=page", "style=talk"], 6.9), (["output=c.svg"], 3.3)],
)
def test_files(words: list[str], width: float, here: Path, run: Callable[..., None], capsys: Any) -> None:
    before = dict(rcParams)
    run("runs=[runs/rmt-seed_1,runs/lstm*]", *words)
    output = Path(next((word.partition("=")[2] for word in words if "output" in word), "length.pdf"))
    content = output.read_bytes()
    if output.suffix == ".pdf":
        # TrueType in whole, no Type 3; and as wide as it was to be.
        assert b"/FontFile2" in content and b"/Type3" not in content
        box = re.search(rb"/MediaBox \[ 0 0 ([\d.]+)", content)
        assert box and float(box[1]) == pytest.approx(72 * width, abs=0.1)
    else:
        assert b"<svg" in content and b'width="237.6pt"' in content
    told = capsys.readouterr().out
    assert f"{output} shows kind=length" in told and re.search(r"│ LSTM +│ lstm-seed_1", told)
    assert dict(rcParams) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "runs: is missing; give runs=…"),
        ("runs=[]", "runs=[]: names no folder; give some"),
        ("runs=absent", "runs=absent: no run could be read"),
        ("runs=runs kind=lengths", "kind=lengths: must be 'length', 'curriculum', "),
        ("runs=runs wdith=page", "wdith: no such setting; did you mean width?"),
        ("runs=runs output=a.jpg", "output=a.jpg: must end in .pdf or .svg or .png; "),
        ("runs=runs output=a.png format=pdf", "output=a.png: must end in .pdf; "),
        ("runs=runs output=there.pdf", "output=there.pdf: is there already; choose another"),
        ("runs=runs output=there.pdf/a.pdf", "output=there.pdf/a.pdf: cannot be written (File exists)"),
        ("runs=runs kind=sweep", "runs=runs: holds no sweep; "),
        ("runs=runs/rmt-seed_1/evaluations kind=curriculum", "runs=runs/rmt-seed_1/evaluations: no run has ended"),
        ("runs=runs kind=capacity", "runs=runs: no run tells pairs; "),
        ("runs=runs/lstm-seed_1 kind=retention", "runs=runs/lstm-seed_1: of no run memories have been followed; "),
    ],
)
def test_refused(words: str, message: str, here: Path, run: Callable[..., None], capsys: Any) -> None:
    Path("there.pdf").write_text("mine")
    with pytest.raises(SystemExit) as left:
        run(*words.split())
    told = capsys.readouterr().err.splitlines()
    assert left.value.code == 2 and told[-1].startswith(f"error: {message}"), told
    assert Path("there.pdf").read_text() == "mine" and sorted(here.glob("*.p*")) == [here / "there.pdf"]


@pytest.mark.fault("files of runs are damaged when they are plotted", "they are named; the others are drawn")
def test_what_cannot_be_read_is_left_out(here: Path, run: Callable[..., None], capsys: Any) -> None:
    (here / "runs/rmt-seed_1/config.yaml").write_text("{")
    (here / "runs/rmt-seed_2/evaluation.csv").write_text("nothing\n")
    (here / "runs/rmt-seed_2/evaluations/last-detect-0123abcd/evaluation.csv").write_text("")
    write_csv(here / "runs/rmt-seed_3/evaluation.csv", rows_of({1: 256}))
    run("runs=runs", "output=a.png")
    told = " ".join(capsys.readouterr().out.split())
    assert "rmt-seed_1: config.yaml is damaged" in told and "left out rmt-seed_2" in told
    assert Path("a.png").read_bytes().startswith(b"\x89PNG")


def test_a_name_looks_the_same_everywhere() -> None:
    alone, (_, beside) = style.looks(["ARMT"])[0], style.looks(["lstm", "armt"])
    assert alone == beside
    for names in style._NAMES:
        assert len({(look.color, look.marker) for look in style.looks(names)}) == len(names)
    # None looks like a known one, and no two are the same, however many there are.
    many = style.looks(["RMTEncoder", *(f"setting {number}" for number in range(40)), "RMTEncoder"])
    assert len({*many}) == 42


def test_texts_are_shown_as_they_are(here: Path) -> None:
    make(here / "odd/$x_{1}$", 1, model={"_target_": "rmt_lightning.ARMT"}, noise={"path": "$\\frac{1"})
    make(here / "odd/_hidden", 1, noise={"path": "_b"})
    with style.styled():
        content = style.rendered(plotting._of_runs(["odd"], "length"), "svg")
    assert b"frac" in content and math.isfinite(len(content))
