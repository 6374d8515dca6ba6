"""Memories that are carried over from step to step, and how long they last."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Run
from test_resume import assert_identical, final

from rmt_lightning.analysis.retention import LossRate, follow
from rmt_lightning.errors import UserError
from rmt_lightning.models.recurrence import Segment
from rmt_lightning.models.rmt import RMTEncoder
from rmt_lightning.tasks.datamodule import FactDataModule, FactDataset
from rmt_lightning.tasks.placement import Key, Placement
from rmt_lightning.training.carried_states import CarriedStates
from rmt_lightning.training.classification import FactClassifier
from rmt_lightning.training.curriculum import SegmentCurriculum
from rmt_lightning.training.optimization import WarmupDecay

# As in the other tests of a run, but the last stage is followed by two short epochs with old memories.
HELD = ("hydra.run.dir=run", "hold=carried_states", "hold.steps=6", "hold.pool=8", "backbone.dropout=0.1")


class Phase:
    """The phase without a trainer: batches of 2 fresh samples and 3 carried ones, driven by hand."""

    def __init__(self, placement: Placement, model: RMTEncoder, **options: Any) -> None:
        self.placement = placement
        optimization = WarmupDecay(steps=10, lr=1e-3)
        self.classifier = FactClassifier(model, placement.task.answers, optimization, max_segments=3)
        data = FactDataModule(placement, segment_length=37, batch_size=5)
        data.carried = 3
        self.trainer: Any = SimpleNamespace(datamodule=data, global_step=0, global_rank=0)
        self.carried = CarriedStates(SegmentCurriculum(3, 10), steps=10, lr=1e-3, **{"pool": 4, **options})

    def step(self, right: list[bool], num_segments: int = 3) -> tuple[dict[str, Any], torch.Tensor]:
        """One step whose answers are `right`, wherever something is asked. Returns the batch and the memory before."""
        number = 5 * self.trainer.global_step
        keys = [Key(num_segments, number + row, facts=row < 2) for row in range(5)]
        samples = [FactDataset(self.placement, "train")[key] for key in keys]
        batch = {name: torch.stack([torch.as_tensor(s[name]) for s in samples]) for name in samples[0]}
        self.carried.on_train_batch_start(self.trainer, self.classifier, batch, 0)
        memory = torch.randn(5, *self.classifier.model.initial_state(1).shape[1:])
        outputs = {"right": torch.tensor(right) & (batch["label"] >= 0), "memory": memory}
        self.carried.on_train_batch_end(self.trainer, self.classifier, outputs, batch, 0)
        self.trainer.global_step += 1
        return batch, memory


@pytest.fixture
def phase(placement: Placement, make_model: Callable[..., RMTEncoder]) -> Callable[..., Phase]:
    return lambda **options: Phase(placement, make_model(37, 4, double=False), **options)


def until_full(phase: Phase) -> None:
    phase.step([True] * 5)
    while (phase.carried.age < 0).any():
        phase.step([True] * 5)


def test_an_empty_pool_asks_nothing(phase: Callable[..., Phase]) -> None:
    batch, _ = phase().step([True] * 5)
    assert (batch["label"][:2] >= 0).all()
    assert (batch["label"][2:] == -1).all()


def test_fresh_memories_are_taken_in_as_they_were_before_the_question(phase: Callable[..., Phase]) -> None:
    p = phase()
    taken: list[int] = []
    while not taken:
        batch, memory = p.step([True] * 5)
        taken = [row for row in range(2) if batch["told"][row] < 2]
    held = p.carried.age >= 0
    assert held.sum() == len(taken)
    torch.testing.assert_close(p.carried.memory[held], memory[taken])
    assert torch.equal(p.carried.label[held], batch["label"][taken])
    assert (p.carried.age[held] == 2).all()


def test_a_fact_told_beside_the_question_is_not_in_the_memory_before_it(phase: Callable[..., Phase]) -> None:
    p = phase()
    for _ in range(5):
        p.step([True] * 5, num_segments=1)
    assert (p.carried.age < 0).all()


def test_old_memories_are_asked_behind_noise_and_go_back_or_get_lost(phase: Callable[..., Phase]) -> None:
    p = phase()
    until_full(p)
    before, ages, read = p.carried.memory.clone(), p.carried.age.clone(), p.carried.segments
    number = 5 * p.trainer.global_step
    noise = FactDataset(p.placement, "train")[Key(3, number + 2, facts=False)]["input_ids"]
    batch, memory = p.step([False, False, True, False, True])
    held = p.carried._held
    assert len(held) == 3
    # What was read: the memory from the pool, noise, and its question at the end, which hides as much of the noise.
    torch.testing.assert_close(batch["state"][2:], before[held])
    question = p.carried.question[held[0]]
    assert torch.equal(batch["question"][2], question)
    assert torch.equal(batch["input_ids"][2, -1], torch.where(question >= 0, question, noise[-1]))
    assert torch.equal(batch["input_ids"][2, :-1], noise[:-1])
    assert torch.equal(batch["label"][2:], p.carried.label[held])
    # What became of them.
    assert p.carried.age[held].tolist() == [ages[held[0]] + 2, -1, ages[held[2]] + 2]
    torch.testing.assert_close(p.carried.memory[held[[0, 2]]], memory[[2, 4]])
    assert (p.carried.lost, p.carried.segments - read) == (1, 9)


def test_fresh_rows_start_from_the_trained_memory_and_teach_it(phase: Callable[..., Phase]) -> None:
    p = phase()
    until_full(p)
    batch, _ = p.step([True] * 5)
    own = p.classifier.model.memory
    torch.testing.assert_close(batch["state"][:2], own.expand(2, -1, -1))
    (gradient,) = torch.autograd.grad(batch["state"].sum(), own)
    assert (gradient == 2).all()


def test_memories_retire_after_their_lifetime(phase: Callable[..., Phase]) -> None:
    p = phase(lifetime=20, pool=64)
    ages = []
    for _ in range(400):
        p.step([True] * 5)
        ages.append(p.carried.age[p.carried.age >= 0].float().mean().item())
    # Of the 400 * 3 * 2 segments by which memories have grown older, one in 20 has ended one.
    assert 10 < sum(ages[200:]) / 200 < 40


def test_jitter_disturbs_old_memories_alone(phase: Callable[..., Phase]) -> None:
    p = phase(jitter=0.5, pool=64)
    until_full(p)
    before = p.carried.memory.clone()
    batch, _ = p.step([True] * 5)
    noise = batch["state"][2:] - before[p.carried._held]
    assert 0.3 < noise.std() < 0.7
    torch.testing.assert_close(batch["state"][:2], p.classifier.model.memory.expand(2, -1, -1))


def test_one_segment_leaves_nothing_to_carry() -> None:
    with pytest.raises(UserError, match=r"curriculum\.max_segments=1: leaves no memory to carry"):
        CarriedStates(SegmentCurriculum(1, 10), steps=10, lr=1e-3)


def held_at(folder: Path) -> list[int]:
    """The steps at which the losses of old memories were counted."""
    with (folder / "hold.csv").open() as file:
        return [int(row["step"]) for row in csv.DictReader(file)]


def test_a_run_with_old_memories_that_was_interrupted_ends_with_the_same_weights(train: Run, tmp_path: Path) -> None:
    whole = train(*HELD, "hydra.run.dir=whole")
    assert whole.returncode == 0, whole.stderr
    assert "Memories carried over" in whole.stdout
    assert held_at(tmp_path / "whole") == [21, 24]
    # In the middle of the phase's second epoch, then to its end.
    assert train(*HELD, "trainer.max_steps=22").returncode == 0
    resumed = train("resume=run", "trainer.max_steps=-1", small=False)
    assert resumed.returncode == 0, resumed.stderr
    assert_identical(final(tmp_path / "whole"), final(tmp_path / "run"))


def test_the_phase_can_be_added_to_a_run_that_has_ended(train: Run, tmp_path: Path) -> None:
    assert train("hydra.run.dir=run").returncode == 0
    added = train("resume=run", "hold=carried_states", "hold.steps=6", "hold.pool=8", small=False)
    assert added.returncode == 0, added.stderr
    assert held_at(tmp_path / "run") == [21, 24]
    again = train("resume=run", small=False)
    assert "has finished training; testing it again" in again.stderr + again.stdout


class Forgetful(RMTEncoder):
    """Remembers the answer in its state until a fixed number of segments has been read."""

    def __init__(self, lifetimes: torch.Tensor, answers: torch.Tensor) -> None:
        torch.nn.Module.__init__(self)
        self.lifetimes, self.answers = lifetimes, answers

    def initial_state(self, batch_size: int) -> torch.Tensor:
        return torch.zeros(batch_size)

    def step(self, segment: Segment, memory: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return memory, memory + 1

    def readout(self, hidden: torch.Tensor, segment: Segment) -> torch.Tensor:
        wrong = (self.answers + 1) % 6
        answer = torch.where(hidden <= self.lifetimes + 3, self.answers, wrong)
        return torch.nn.functional.one_hot(answer, 6).float()


def test_following_counts_what_is_lost_and_when(placement: Placement) -> None:
    data = FactDataModule(placement, segment_length=37, batch_size=5)
    dataset = FactDataset(placement, "test")
    told = [sample for sample in (dataset[Key(4, number)] for number in range(60)) if sample["told"] < 3][:4]
    answers = torch.tensor([sample["label"] for sample in told])
    # Four memories: two last for ever, one is lost after 3 segments, one after 9.
    model = Forgetful(torch.tensor([99, 3, 9, 99]), answers)

    def found(every: int) -> Any:
        known = placement.task.answers
        return follow(model, lambda scores: scores, data, 12, every, 4, torch.device("cpu"), known)

    result = found(every=2)
    assert (result.written, result.lost) == (4, 2)
    # Asked after reading 1, 3, 5, … segments: the second is found lost at the third question, the third at the sixth.
    assert result.right == {2: 4, 4: 4, 6: 3, 8: 3, 10: 3, 12: 2}
    assert result.exposure == 2 * (4 + 4 + 4 + 3 + 3 + 3)
    # Asking leaves no trace in the memory.
    assert found(every=4).right == {4: 4, 8: 3, 12: 2}


def test_the_interval_of_a_rate_is_that_of_a_poisson_count() -> None:
    # Exact limits for counts of 0, 3 and 20: Garwood 1936.
    for lost, low, high in ((0, 0.0, 3.69), (3, 0.62, 8.77), (20, 12.22, 30.89)):
        assert LossRate(lost, 1).interval == pytest.approx((low, high), abs=0.06)
    assert LossRate(20, 1000).rate == 0.02
    assert math.isnan(LossRate(0, 0).rate)
