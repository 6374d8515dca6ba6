"""The parts of training by themselves. The whole is in test_train.py and test_resume.py."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import default_collate
from torchmetrics import Metric
from torchmetrics.classification import (
    BinaryAccuracy,
    MulticlassAccuracy,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
    MulticlassROC,
)
from torchmetrics.retrieval import RetrievalMAP
from torchmetrics.text import BLEUScore
from transformers import PreTrainedTokenizerBase

from rmt_lightning.analysis.extrapolation import LengthResult, LengthTest
from rmt_lightning.app.build import save_architecture
from rmt_lightning.core.errors import UserError
from rmt_lightning.core.statistics import Proportion
from rmt_lightning.models.baselines.full_attention import FullAttention
from rmt_lightning.models.rmt import RMTEncoder
from rmt_lightning.models.segment_model import SegmentModel
from rmt_lightning.models.tiny import TinyBert
from rmt_lightning.reporting import figures
from rmt_lightning.reporting.style import Place
from rmt_lightning.tasks.corpus import Corpus
from rmt_lightning.tasks.datamodule import FactDataset
from rmt_lightning.tasks.facts import PLACES, Carried, Reasoning, Split, Task
from rmt_lightning.tasks.placement import Key, Placement
from rmt_lightning.training.answering import FactClassifier
from rmt_lightning.training.callbacks.checkpoints import AtomicCheckpointIO, check_fits, read_checkpoint
from rmt_lightning.training.metrics import SlicedAccuracy
from rmt_lightning.training.optimization import WarmupDecay, at_stage
from rmt_lightning.training.phases.curriculum import SegmentCurriculum, StageResult
from rmt_lightning.training.phases.phase import Phases


def test_accuracy_by_length_and_distance() -> None:
    accuracy = SlicedAccuracy(longest=3)
    accuracy.update(torch.tensor([True, False, True, True]), 2, torch.tensor([0, 1, 1, 1]))
    accuracy.update(torch.tensor([False, False]), 3, torch.tensor([2, 1]))
    found = {name: value.item() for name, value in accuracy.compute().items()}
    assert found == pytest.approx(
        {
            "accuracy": 0,
            "accuracy_segments_2": 3 / 4,
            "accuracy_segments_3": 0,
            "accuracy_distance_0": 1,
            "accuracy_distance_1": 2 / 4,
            "accuracy_distance_2": 0,
        }
    )
    accuracy.reset()
    accuracy.update(torch.tensor([True]), 1, torch.tensor([0]))
    assert accuracy.compute() == {"accuracy": 1, "accuracy_segments_1": 1, "accuracy_distance_0": 1}


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
@pytest.mark.parametrize("how", ["full depth", "one border", "full attention"])
@pytest.mark.parametrize("key", [Key(3, 0), Key(1, 0), Key(1, 0, text_length=28)])
@pytest.mark.parametrize(("task", "questions"), [(Reasoning(), 4), (Carried(), 2)])
def test_all_questions_share_the_loss(
    how: str,
    key: Key,
    task: Task,
    questions: int,
    corpora: dict[Split, Corpus],
    tokenizer: PreTrainedTokenizerBase,
    make_model: Callable[..., RMTEncoder],
) -> None:
    placement = Placement(task, corpora, tokenizer, text_length=41, seed=3)
    model: SegmentModel = make_model(48, bptt_depth=1 if how == "one border" else -1)
    if how == "full attention":
        model = FullAttention(TinyBert(width=16, layers=2, heads=2, max_positions=128).encoder(tokenizer), 41)
    phases = Phases([SegmentCurriculum(3, steps=10)], WarmupDecay(10, 1e-3), seed=0)
    accuracy = {"accuracy": SlicedAccuracy(3)}
    classifier = FactClassifier(model, task.answers, phases, accuracy, all_questions=True).double()
    batch = default_collate([FactDataset(placement, "train")[key._replace(number=number)] for number in range(6)])
    outputs = classifier.training_step(batch, 0)

    # By hand: one input for each question, which are the same but for their ends.
    inputs = [batch.input_ids.clone() for _ in range(questions)]
    for ids, question in zip(inputs, batch.questions.unbind(dim=1), strict=True):
        question = question[:, -ids.shape[2] :]
        ids[:, -1][question >= 0] = question[question >= 0]
    assert torch.equal(inputs[0], batch.input_ids) and not torch.equal(inputs[1], inputs[0])
    losses = [
        nn.functional.cross_entropy(classifier(ids), classifier.classes(answer))
        for ids, answer in zip(inputs, batch.answers.unbind(dim=1), strict=True)
    ]
    expected = torch.stack(losses).mean()
    torch.testing.assert_close(outputs["loss"], expected)
    parameters = list(classifier.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(outputs["loss"], parameters, allow_unused=True),
        torch.autograd.grad(expected, parameters, allow_unused=True),
    )
    # Right is who answers the question that is there.
    answered = classifier(batch.input_ids).argmax(dim=1)
    assert torch.equal(outputs["outcome"].right, answered == classifier.classes(batch.answer))
    for row, answer in zip(classifier.classes(batch.answer).tolist(), batch.answer, strict=True):
        assert tokenizer.decode(answer[answer >= 0]).strip() == task.answers[row]


def test_metrics_are_asked_for_by_name(make_model: Callable[..., RMTEncoder]) -> None:
    """Any metric of torchmetrics will do, if there is what it asks for; and phases need the one they decide by."""
    phases = Phases([SegmentCurriculum(3, steps=10)], WarmupDecay(10, 1e-3), seed=0)
    model, accuracy = make_model(), {"accuracy": SlicedAccuracy(3)}
    FactClassifier(model, PLACES, phases, accuracy | {"f1": MulticlassF1Score(6)})
    with pytest.raises(UserError, match=r"metrics\.error: its update asks for indexes; there are right, num_seg"):
        FactClassifier(model, PLACES, phases, accuracy | {"error": RetrievalMAP()})
    with pytest.raises(UserError, match=r"metrics\.accuracy: phases decide by it; leave it in"):
        FactClassifier(model, PLACES, phases, {"f1": MulticlassF1Score(6)})


@pytest.mark.fault("a metric fails on what a validation has, or is no number", "refused in one line at the start")
@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (
            MulticlassF1Score(3),
            r"metrics\.m: cannot be measured of right \(12,\), distance \(12,\), preds \(12, 6\), target",
        ),
        (BinaryAccuracy(), r"metrics\.m: cannot be measured of .* \(RuntimeError Predictions and targets are expected"),
        (BLEUScore(), r"metrics\.m: cannot be measured of .* \(TypeError iteration over a 0-d tensor\); change its"),
        (MulticlassConfusionMatrix(6), r"metrics\.m: is \(6, 6\), and one number is logged; give it a setting such as"),
        (MulticlassAccuracy(6, average=None), r"metrics\.m: is \(6,\), and one number is logged"),
        (MulticlassROC(6), r"metrics\.m: is tuple, and one number is logged"),
        (SlicedAccuracy(3), r"metrics\.m: val/accuracy is logged already; give it another name, or leave it out"),
    ],
)
def test_metrics_are_tried(metric: Metric, message: str, make_model: Callable[..., RMTEncoder]) -> None:
    phases = Phases([SegmentCurriculum(3, steps=10)], WarmupDecay(10, 1e-3), seed=0)
    with pytest.raises(UserError, match=message):
        FactClassifier(make_model(), PLACES, phases, {"accuracy": SlicedAccuracy(3), "m": metric})
    with pytest.raises(UserError, match=r"metrics\.loss: val/loss is logged already"):
        FactClassifier(make_model(), PLACES, phases, {"accuracy": SlicedAccuracy(3), "loss": MulticlassF1Score(6)})
    with pytest.raises(UserError, match=r"metrics\.accuracy: cannot be measured of .* \(IndexError"):
        FactClassifier(make_model(), PLACES, phases, {"accuracy": SlicedAccuracy(2)})


def test_each_length_is_tested_once(make_model: Callable[..., RMTEncoder]) -> None:
    assert make_model().fitting("test.segments", [3, 1, 1, 3]) == [3, 1]


def test_answers_that_look_alike(make_model: Callable[..., RMTEncoder]) -> None:
    with pytest.raises(
        UserError, match=r"backbone: its tokenizer cannot tell two of the answers apart, garden and Garden;"
    ):
        FactClassifier(make_model(), ("garden", "Garden"))


def test_settings_of_a_stage() -> None:
    assert [at_stage([6000, 20000], n) for n in (1, 2, 7)] == [6000, 20000, 20000]
    assert at_stage(0.1, 7) == 0.1


@pytest.mark.parametrize(
    ("warmup", "expected"), [(0.0, [1, 0.75, 0.5, 0.25, 0, 0]), (0.5, [1 / 3, 2 / 3, 1, 0.5, 0, 0])]
)
def test_warmup_and_decay(warmup: float, expected: list[float]) -> None:
    optimizer, schedule = WarmupDecay(steps=4, lr=2.0, warmup=warmup).build([nn.Parameter(torch.zeros(1))], 1)
    rates = []
    for _ in expected:
        rates.append(optimizer.param_groups[0]["lr"] / 2.0)
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx(expected)


def test_wilson_interval() -> None:
    # Values of Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20.
    for right, samples, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)):
        assert Proportion(right, samples).interval == pytest.approx((low, high), abs=6e-5)
    # Of a finite set, each question counts once, however often it was asked.
    assert Proportion(50, 100, questions=10, finite=True).interval == Proportion(5, 10).interval
    assert Proportion(50, 100, questions=10).interval == Proportion(50, 100).interval
    low, high = Proportion(128, 128).interval
    assert low < 1.0 == high


def test_no_length_to_test() -> None:
    with pytest.raises(UserError, match=r"test\.segments"):
        LengthTest(segments=[], samples=1)


@pytest.mark.parametrize(
    ("options", "accuracies", "expected"),
    [
        ({"threshold": 0.9}, [0.8, 0.9], [False, True]),
        ({"threshold": [0.99, 0.9]}, [0.8, 0.9], [False, True]),
        ({"threshold": [0.9, 0.99]}, [0.8, 0.9], [False, False]),
        ({"threshold": 0.9, "validations": 2}, [0.9, 0.8, 0.95, 0.9], [False, False, False, True]),
        ({"patience": 2}, [0.5, 0.6, 0.6, 0.55], [False, False, False, True]),
        ({"patience": 2}, [0.5, 0.4, 0.6, 0.5, 0.6], [False, False, False, False, True]),
    ],
)
def test_convergence(options: dict, accuracies: list[float], expected: list[bool]) -> None:
    curriculum = SegmentCurriculum(max_segments=3, steps=10, **options)
    curriculum.stage = 3
    assert [curriculum._converged(accuracy) for accuracy in accuracies] == expected


def test_curriculum_state_is_plain_and_complete() -> None:
    curriculum = SegmentCurriculum(max_segments=2, steps=10)
    curriculum.results = [StageResult(1, 5, 1.5, 0.99, True), StageResult(2, 6, 1.0, 0.5, False)]
    curriculum.history = [(5, 1, 0.99)]
    other = SegmentCurriculum(max_segments=2, steps=10)
    other.load_state_dict(curriculum.state_dict())
    assert other.state_dict() == curriculum.state_dict()
    assert other.results == curriculum.results
    assert not other.finished
    other.when_stuck = "continue"
    assert other.finished


def test_lessons_that_are_asked_for_on_resuming_begin(placement: Placement) -> None:
    begun, resumed = (SegmentCurriculum(max_segments=2, steps=10, lessons=lessons) for lessons in (False, True))
    for curriculum in (begun, resumed):
        curriculum.placement = placement
    begun.begin(0)
    resumed.load_state_dict(begun.state_dict())
    assert resumed.begins
    resumed.begin(3)
    assert (resumed.lesson, resumed.first_step, resumed.schedule_step) == (1, 0, 3) and not resumed.begins
    begun.load_state_dict(resumed.state_dict())
    assert begun.lesson is None and not begun.begins


@pytest.mark.fault(
    "the disk is full while a tokenizer is written, which is told by Rust", "one line that names the file"
)
def test_an_error_of_the_system_told_by_rust(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        raise Exception("File too large (os error 27)")

    model = SimpleNamespace(parts={"tokenizer": SimpleNamespace(save_pretrained=fail)}, modules=list, state_dict=dict)
    with pytest.raises(OSError, match="File too large") as caught:
        save_architecture(model, tmp_path)
    assert caught.value.errno == errno.EFBIG and caught.value.filename.endswith("tokenizer")


def test_a_failed_write_keeps_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"state_dict": {"w": torch.ones(3)}}, path)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        AtomicCheckpointIO().save_checkpoint({"state_dict": {"w": torch.zeros(3)}}, path)
    assert torch.equal(read_checkpoint(path)["state_dict"]["w"], torch.ones(3))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.fault("a state holds what no checkpoint is opened with again", "it is not written, and told in one line")
@pytest.mark.parametrize(
    ("value", "told"),
    [
        (np.float64(1), "numpy._core.multiarray.scalar, numpy.dtype"),
        ([Path("x")], "pathlib.PosixPath"),
        (lambda: 1, "Can't pickle "),
    ],
)
def test_a_state_that_could_not_be_opened(value: object, told: str, tmp_path: Path) -> None:
    checkpoint = {"state_dict": {}, "callbacks": {"Other": {}, "Count": {"best": value}}}
    with pytest.raises(UserError, match=rf"^Count: its state holds {re.escape(told)}.*, which no checkpoint is opened"):
        AtomicCheckpointIO().save_checkpoint(checkpoint, tmp_path / "last.ckpt")
    assert not list(tmp_path.iterdir())


class Harmful:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("executed"),))


def test_checkpoints_are_read_without_executing_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "extra": Harmful()}, "bad.ckpt")
    with pytest.raises(UserError, match="no checkpoint"):
        read_checkpoint(Path("bad.ckpt"))
    assert not Path("executed").exists()


def test_another_model_is_named() -> None:
    small, large = nn.Linear(2, 2), nn.Linear(2, 3)
    check_fits(small, small.state_dict(), Path("a.ckpt"))
    with pytest.raises(UserError, match=r"a\.ckpt: holds another model: weight is \(3, 2\) there and \(2, 2\) here"):
        check_fits(small, large.state_dict(), Path("a.ckpt"))
    with pytest.raises(UserError, match=r"bias is missing there"):
        check_fits(small, {"weight": small.weight}, Path("a.ckpt"))


def test_the_figure() -> None:
    results = [LengthResult(right, 100, n) for n, right in ((1, 100), (2, 97), (64, 50))]
    tests = [Place(result.segments, result.accuracy, *result.interval) for result in results]
    history = [(5, 1, 0.5), (10, 1, 1.0), (15, 2, 0.9)]
    figure = figures.curriculum(history, tests, 2, 1 / 6, "task=detect", samples=100)
    left, right = figure.axes
    assert left.get_xlabel() == "optimizer step" and right.get_xlabel() == "segments of the input"
    assert [text.get_text() for text in right.get_xticklabels()] == ["1", "2", "64"]
    drawn = [line.get_xydata().tolist() for line in left.lines if line.get_marker() == "o"]
    assert drawn == [[[5, 0.5], [10, 1]], [[15, 0.9]]]
    assert [line.get_ydata()[0] for line in left.lines if line.get_linestyle() == ":"] == [1 / 6]
    # A band of intervals, and that of the lone validation.
    assert len(left.collections) == 2
