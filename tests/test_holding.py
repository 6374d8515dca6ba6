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
from conftest import Run, assert_identical, final
from torch.utils._pytree import tree_map
from transformers import PreTrainedTokenizerBase

from rmt_lightning.analysis.retention import LossRate, follow
from rmt_lightning.core.errors import UserError
from rmt_lightning.models.recurrence import Segment
from rmt_lightning.models.rmt import RMTEncoder
from rmt_lightning.tasks.datamodule import FactDataModule, FactDataset
from rmt_lightning.tasks.facts import Reasoning, Split
from rmt_lightning.tasks.noise import Corpus
from rmt_lightning.tasks.placement import Key, Placement
from rmt_lightning.training.classification import FactClassifier
from rmt_lightning.training.optimization import WarmupDecay
from rmt_lightning.training.phases.curriculum import SegmentCurriculum
from rmt_lightning.training.phases.state_passing import StatePassing

# As in the other tests of a run, but the last stage is followed by two short epochs with old memories.
HELD = ("hydra.run.dir=run", "hold=state_passing", "hold.steps=6", "hold.pool=8", "backbone.dropout=0.1")


class Phase:
    """The phase without a trainer: batches of 4 samples with facts and 3 carried ones, driven by hand."""

    def __init__(self, placement: Placement, model: RMTEncoder, **options: Any) -> None:
        self.placement = placement
        optimization = WarmupDecay(steps=10, lr=1e-3)
        self.classifier = FactClassifier(model, placement.task.answers, optimization, max_segments=3)
        data = FactDataModule(placement, segment_length=37, batch_size=7)
        data.carried = 3
        self.trainer: Any = SimpleNamespace(datamodule=data, global_step=0, global_rank=0)
        self.carried = StatePassing(SegmentCurriculum(3, 10), steps=10, lr=1e-3, **{"pool": 32, **options})

    def step(self, right: list[bool], num_segments: int = 3) -> tuple[dict[str, Any], list[torch.Tensor]]:
        """One step whose answers are `right`, wherever something is asked. Returns the batch, and states made up."""
        number = 7 * self.trainer.global_step
        keys = [Key(num_segments, number + row, facts=row < 4) for row in range(7)]
        samples = [FactDataset(self.placement, "train")[key] for key in keys]
        batch = {name: torch.stack([torch.as_tensor(s[name]) for s in samples]) for name in samples[0]}
        self.carried.on_train_batch_start(self.trainer, self.classifier, batch, 0)
        states = [torch.randn(7, *self.classifier.model.initial_state(1).shape[1:]) for _ in range(num_segments)]
        outputs = {"right": torch.tensor(right) & (batch["label"] >= 0), "states": states}
        self.carried.on_train_batch_end(self.trainer, self.classifier, outputs, batch, 0)
        self.trainer.global_step += 1
        return batch, states


ALL = [True] * 7


@pytest.fixture
def phase(placement: Placement, make_model: Callable[..., RMTEncoder]) -> Callable[..., Phase]:
    return lambda **options: Phase(placement, make_model(37, 4, double=False), **options)


def until_full(phase: Phase) -> None:
    phase.step(ALL)
    while (phase.carried.old.age < 0).any() or (phase.carried.blank.age < 0).any():
        phase.step(ALL)


def test_an_empty_pool_asks_nothing(phase: Callable[..., Phase]) -> None:
    batch, _ = phase().step(ALL)
    assert (batch["label"][:4] >= 0).all()
    assert (batch["label"][4:] == -1).all()


def test_fresh_memories_are_taken_in_as_they_were_before_the_question(phase: Callable[..., Phase]) -> None:
    p = phase()
    batch, states = p.step(ALL)
    taken = [row for row in range(4) if batch["last_told"][row] < 2]
    assert taken, "the seed gives no sample whose fact is told before the last segment"
    held = p.carried.old.age >= 0
    assert held.sum() == len(taken)
    kept = {name: part[held] for name, part in p.carried.old.content.items()}
    torch.testing.assert_close(kept["state"], states[-1][taken])
    # They wait for the question alone; what has been told them is kept beside it.
    assert (kept["waits"] == 1).all()
    assert torch.equal(kept["story"], batch["told"][taken])
    assert torch.equal(kept["label"], batch["label"][taken])
    assert torch.equal(p.carried.old.age[held], 2 - batch["last_told"][taken])


def test_memories_of_nothing_are_taken_in_as_they_were_before_the_fact(phase: Callable[..., Phase]) -> None:
    p = phase()
    batch, states = p.step(ALL)
    taken = [row for row in range(4) if batch["first_told"][row] > 0]
    assert taken, "the seed gives no sample whose fact is told behind the first segment"
    held = p.carried.blank.age >= 0
    expected = torch.stack([states[batch["first_told"][row]][row] for row in taken])
    torch.testing.assert_close(p.carried.blank.content[held], expected)
    assert torch.equal(p.carried.blank.age[held], batch["first_told"][taken])


def test_a_fact_told_beside_the_question_is_not_in_the_memory_before_it(phase: Callable[..., Phase]) -> None:
    p = phase()
    for _ in range(5):
        p.step(ALL, num_segments=1)
    assert (p.carried.old.age < 0).all()
    assert (p.carried.blank.age < 0).all()


def test_old_memories_are_asked_behind_noise_and_go_back_or_are_told_again(phase: Callable[..., Phase]) -> None:
    p = phase(youth=10**6)
    until_full(p)
    before, ages, read = p.carried.old.content["state"].clone(), p.carried.old.age.clone(), p.carried.counts["segments"]
    number = 7 * p.trainer.global_step
    noise = FactDataset(p.placement, "train")[Key(3, number + 4, facts=False)]["input_ids"]
    batch, states = p.step([False, False, False, False, True, False, True])
    held = p.carried._drawn_old
    assert len(held) == 3
    # What was read: the memory from the pool, noise, and its question at the end, which hides as much of the noise.
    torch.testing.assert_close(batch["state"][4:], before[held])
    content = {name: part[held] for name, part in p.carried.old.content.items()}
    question = content["story"][0, -1]
    assert torch.equal(batch["input_ids"][4, -1], torch.where(question >= 0, question, noise[-1]))
    assert torch.equal(batch["input_ids"][4, :-1], noise[:-1])
    assert torch.equal(batch["label"][4:], content["label"])
    # What became of them.
    assert p.carried.old.age[held].tolist() == [ages[held[0]] + 2, 0, ages[held[2]] + 2]
    torch.testing.assert_close(content["state"][[0, 2]], states[-1][[4, 6]])
    assert torch.equal(content["state"][1], p.classifier.model.memory)
    length = 3 - int((content["story"][1] >= 0).any(dim=1).int().argmax())
    assert content["waits"].tolist() == [1, length, 1]
    assert (p.carried.counts["lost"], p.carried.counts["segments"] - read) == (1, 9)


def test_old_memories_of_some_facts_are_told_the_others(
    corpora: dict[Split, Corpus], tokenizer: PreTrainedTokenizerBase, make_model: Callable[..., RMTEncoder]
) -> None:
    placement = Placement(Reasoning(), corpora, tokenizer, text_length=30, seed=3)
    # None retires.
    p = Phase(placement, make_model(37, 4, double=False), youth=10**6)
    until_full(p)
    # How many facts were to come, and whether the memory was kept behind them.
    seen: set[tuple[int, bool]] = set()
    questions: set[int] = set()
    while len(seen) < 3 or len(questions) < 4:
        before = tree_map(torch.clone, p.carried.old.content)
        ages, number = p.carried.old.age.clone(), 7 * p.trainer.global_step
        batch, states = p.step(ALL)
        for row, place in zip((4, 5, 6), p.carried._drawn_old, strict=True):
            begin, border = 3 - int(before["waits"][place]), batch["border"][row]
            rest = before["story"][place].clone()
            rest[:begin] = -1
            assert (rest[begin] >= 0).any()
            if before["gap"][place] > 0:
                # Any of the four questions may be asked, whichever it was that was asked before.
                rest[-1] = p.carried.old.content["story"][place, -1]
                (asked,) = torch.nonzero((before["questions"][place] == rest[-1]).all(dim=1))[0]
                assert batch["label"][row] == before["answers"][place, asked]
                # It comes first in line, and none of the four is lost.
                assert torch.equal(batch["questions"][row, 0], before["questions"][place, asked])
                pairs = [{(*q.tolist(), int(a)) for q, a in zip(all_["questions"][i], all_["answers"][i], strict=True)}
                         for all_, i in ((before, place), (batch, row))]  # fmt: skip
                assert pairs[0] == pairs[1]
                questions.add(int(asked))
            # What a memory waits for: one more fact or none, and the question. The rest is noise, before and between.
            *facts, question = tokenizer.decode(rest[rest >= 0]).split(".")
            assert question.endswith("?")
            noise = FactDataset(p.placement, "train")[Key(3, number + row, facts=False)]["input_ids"]
            assert torch.equal(batch["input_ids"][row], torch.where(rest >= 0, rest, noise))
            # It is kept as it was before that, or before the question alone.
            assert border in (begin, 2)
            seen.add((len(facts), bool(border > begin)))
            held = p.carried.old.content["state"][place]
            if before["gap"][place] == 0:
                # Nothing is to be remembered between a fact and the question beside it.
                assert p.carried.old.age[place] == -1 or not torch.equal(held, states[border][row])
                continue
            assert p.carried.old.content["waits"][place] == 3 - border
            torch.testing.assert_close(held, states[border][row])
            assert p.carried.old.age[place] == ages[place] + border
    assert seen == {(0, False), (1, False), (1, True)}
    # A wrong answer is a memory lost, or a late fact missed.
    counts = dict(p.carried.counts)
    batch, _ = p.step([False] * 7)
    num_late = int(batch["late"][4:].sum())
    # It is told again, unless the last fact stands beside the question: there is no memory between them to ask.
    gaps = p.carried.old.content["gap"][p.carried._drawn_old]
    assert torch.equal(p.carried.old.age[p.carried._drawn_old], torch.where(gaps > 0, 0, -1))
    counted = [p.carried.counts[name] - counts[name] for name in ("segments", "lost", "told", "missed")]
    assert counted == [3 * (3 - num_late), 3 - num_late, 2 + num_late, 2 + num_late]


def test_half_of_the_old_memories_that_are_asked_know_all_facts(
    corpora: dict[Split, Corpus], tokenizer: PreTrainedTokenizerBase, make_model: Callable[..., RMTEncoder]
) -> None:
    p = Phase(Placement(Reasoning(), corpora, tokenizer, text_length=30, seed=3), make_model(37, 4, double=False))
    until_full(p)
    for _ in range(20):
        content = p.carried.old.content
        whole = content["waits"] <= content["gap"]
        p.step(ALL)
        drawn = p.carried._drawn_old
        assert len(drawn) == len(drawn.unique()) == 3
        assert whole[drawn[0]] or not whole.any()


def test_what_was_lost_is_told_again_and_then_remembered_from_there(phase: Callable[..., Phase]) -> None:
    p = phase(youth=10**6, pool=4)
    until_full(p)
    p.step([False] * 7)
    lost = {int(place) for place in p.carried._drawn_old}
    content = tree_map(torch.clone, p.carried.old.content)
    drawn: list[tuple[int, int]] = []
    while not drawn:
        batch, states = p.step(ALL)
        drawn = [(row, place) for row, place in enumerate(p.carried._drawn_old.tolist(), start=4) if place in lost]
        assert (p.carried.old.age >= 0).all()
    row, place = drawn[0]
    # The memory of nothing was told the story, and waits for the question now.
    torch.testing.assert_close(batch["state"][row], content["state"][place])
    story = content["story"][place]
    assert torch.equal(batch["input_ids"][row][story >= 0], story[story >= 0])
    assert p.carried.old.content["waits"][place] == 1
    torch.testing.assert_close(p.carried.old.content["state"][place], states[-1][row])
    told = int((story >= 0).any(dim=1).int().argmax())
    assert p.carried.old.age[place] == 2 - told


def test_old_memories_of_nothing_are_told_facts(phase: Callable[..., Phase]) -> None:
    p = phase()
    until_full(p)
    before, ages, told = p.carried.blank.content.clone(), p.carried.blank.age.clone(), p.carried.counts["told"]
    batch, states = p.step([True, False, False, False, False, False, False])
    drawn = p.carried._drawn_blank
    assert len(drawn) == 2
    torch.testing.assert_close(batch["state"][:2], before[drawn])
    first = batch["first_told"]
    assert p.carried.blank.age[drawn].tolist() == [ages[drawn[0]] + first[0], -1]
    torch.testing.assert_close(p.carried.blank.content[drawn[0]], states[first[0]][0])
    assert (p.carried.counts["missed"], p.carried.counts["told"] - told) == (1, 2)


def test_the_other_samples_start_from_the_trained_memory_and_teach_it(phase: Callable[..., Phase]) -> None:
    p = phase()
    until_full(p)
    batch, _ = p.step(ALL)
    own = p.classifier.model.memory
    torch.testing.assert_close(batch["state"][2:4], own.expand(2, -1, -1))
    (gradient,) = torch.autograd.grad(batch["state"].sum(), own)
    assert (gradient == 2).all()


def test_each_order_of_age_is_as_frequent_in_the_pool(phase: Callable[..., Phase]) -> None:
    p = phase(youth=4, pool=64)
    ages = []
    for step in range(600):
        p.step(ALL)
        if step >= 200:
            ages.append(p.carried.old.age[p.carried.old.age >= 0])
    # Age plus youth doubles from 8 to 16 and from 16 to 32.
    counts = torch.histogram(torch.cat(ages).float(), torch.tensor([3.5, 11.5, 27.5])).hist
    assert 0.7 < counts[0] / counts[1] < 1.4


def test_jitter_disturbs_old_memories_alone(phase: Callable[..., Phase]) -> None:
    p = phase(jitter=0.5, pool=64)
    until_full(p)
    before = p.carried.old.content["state"].clone()
    batch, _ = p.step(ALL)
    noise = batch["state"][4:] - before[p.carried._drawn_old]
    assert 0.3 < noise.std() < 0.7
    torch.testing.assert_close(batch["state"][2:4], p.classifier.model.memory.expand(2, -1, -1))


def test_pools_from_before_all_questions_were_kept_fill_anew(phase: Callable[..., Phase]) -> None:
    p = phase()
    until_full(p)
    pools = [(pool.content, pool.age) for pool in (p.carried.old, p.carried.blank)]
    saved = {"memories": tree_map(lambda part: part[None], pools)}
    for outdated in (False, True):
        if outdated:
            del saved["memories"][0][0]["questions"], saved["memories"][0][0]["answers"]
        resumed = phase()
        resumed.carried.on_load_checkpoint(resumed.trainer, resumed.classifier, saved)
        assert hasattr(resumed.carried, "old") is not outdated
        resumed.step(ALL)
        assert (resumed.carried.old.age >= 0).sum() > 0


def test_one_segment_leaves_nothing_to_carry() -> None:
    with pytest.raises(UserError, match=r"curriculum\.max_segments=1: leaves no memory to carry"):
        StatePassing(SegmentCurriculum(1, 10), steps=10, lr=1e-3)


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


@pytest.mark.soak
def test_the_phase_can_be_added_to_a_run_that_has_ended(train: Run, tmp_path: Path) -> None:
    assert train("hydra.run.dir=run").returncode == 0
    added = train("resume=run", "hold=state_passing", "hold.steps=6", "hold.pool=8", small=False)
    assert added.returncode == 0, added.stderr
    assert held_at(tmp_path / "run") == [21, 24]
    again = train("resume=run", small=False)
    assert "has finished training; testing it again" in again.stderr + again.stdout
    more = train("resume=run", "curriculum.max_segments=4", small=False)
    assert more.returncode == 0, more.stderr
    assert held_at(tmp_path / "run") == [21, 24, 33, 36]


class Forgetful(RMTEncoder):
    """Remembers the answer in its state until a fixed number of segments has been read."""

    def __init__(self, lifetimes: torch.Tensor, answers: torch.Tensor) -> None:
        torch.nn.Module.__init__(self)
        self.lifetimes, self.answers = lifetimes, answers

    def initial_state(self, batch_size: int) -> torch.Tensor:
        return torch.zeros(batch_size)

    def read_segment(self, segment: Segment, memory: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return memory, memory + 1

    def readout(self, hidden: torch.Tensor, segment: Segment) -> torch.Tensor:
        wrong = (self.answers + 1) % 6
        answer = torch.where(hidden <= self.lifetimes + 3, self.answers, wrong)
        return torch.nn.functional.one_hot(answer, 6).float()


def test_following_counts_what_is_lost_and_when(placement: Placement) -> None:
    data = FactDataModule(placement, segment_length=37, batch_size=5)
    dataset = FactDataset(placement, "test")
    told = [sample for sample in (dataset[Key(4, number)] for number in range(60)) if sample["last_told"] < 3][:4]
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
