"""Memories that are carried over from step to step, and how long they last."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Run, assert_identical, final
from transformers import PreTrainedTokenizerBase

from rmt_lightning.core.errors import UserError
from rmt_lightning.core.statistics import LossRate
from rmt_lightning.models import state as tree
from rmt_lightning.models.recurrence import Segment
from rmt_lightning.models.rmt import RMTEncoder
from rmt_lightning.models.segment_model import Reading
from rmt_lightning.tasks.corpus import Corpus
from rmt_lightning.tasks.datamodule import FactBatch, FactDataModule, FactDataset
from rmt_lightning.tasks.facts import PLACES, Reasoning, Split
from rmt_lightning.tasks.placement import Key, Placement
from rmt_lightning.training.answering import FactClassifier
from rmt_lightning.training.metrics import SlicedAccuracy
from rmt_lightning.training.optimization import WarmupDecay
from rmt_lightning.training.phases.curriculum import SegmentCurriculum
from rmt_lightning.training.phases.phase import Outcome, Phases, Start
from rmt_lightning.training.phases.state_passing import Plan, StatePassing
from rmt_lightning.training.retention import early, follow, measure

# As in the other tests of a run, but the last stage is followed by two short epochs with old memories.
SHORT = ("hydra.run.dir=run", "hold=state_passing", "hold.steps=6", "hold.pool=8", "backbone.dropout=0.1")
HELD = (*SHORT, "hold.until_rate=1")


class Phase:
    """The phase without a trainer: batches of 4 samples with facts and 3 carried ones, driven by hand."""

    def __init__(self, placement: Placement, model: RMTEncoder, **options: Any) -> None:
        self.placement, self.model = placement, model
        self.passing = StatePassing(steps=10, lr=1e-3, **{"pool": 32, "share": 0.43, **options})
        self.curriculum = SegmentCurriculum(3, steps=10)
        phases = Phases([self.curriculum, self.passing], WarmupDecay(steps=10, lr=1e-3), seed=0)
        data = FactDataModule(placement, phases, segment_length=37, batch_size=7)
        phases.prepare(FactClassifier(model, placement.task.answers, phases, {"accuracy": SlicedAccuracy(3)}), data)
        assert self.passing.carried == 3
        self.steps = 0
        self.random = torch.Generator()

    def batch(self, num_segments: int = 3) -> FactBatch:
        keys = [Key(num_segments, 7 * self.steps + row, facts=row < 4) for row in range(7)]
        samples = [FactDataset(self.placement, "train")[key] for key in keys]
        return FactBatch(*map(torch.stack, zip(*samples, strict=True)))

    def step(self, right: list[bool], num_segments: int = 3) -> tuple[Start, Plan, list[torch.Tensor]]:
        """One step whose answers are `right`, wherever something is asked: its start, its plan, made up states."""
        self.random.manual_seed(self.steps)
        start = self.passing.start(self.batch(num_segments), self.model, self.random)
        states = [torch.randn(7, *self.model.initial_state(1).shape[1:]) for _ in range(num_segments)]
        outcome = Outcome(torch.tensor(right) & (start.batch.answer >= 0).any(dim=1), states)
        with torch.no_grad():
            self.passing.step(start, outcome, self.model, self.random)
        self.steps += 1
        return start, self.passing._planned, states

    def text(self, answer: torch.Tensor) -> str:
        return self.placement.tokenizer.decode(answer[answer >= 0]).strip()


ALL = [True] * 7


@pytest.fixture
def phase(placement: Placement, make_model: Callable[..., RMTEncoder]) -> Callable[..., Phase]:
    return lambda **options: Phase(placement, make_model(37, 4, double=False), **options)


def until_full(phase: Phase) -> None:
    phase.step(ALL)
    while (phase.passing.old.age < 0).any() or (phase.passing.blank.age < 0).any():
        phase.step(ALL)


def test_an_empty_pool_asks_nothing(phase: Callable[..., Phase]) -> None:
    start, _, _ = phase().step(ALL)
    assert (start.batch.answer[:4] >= 0).any(dim=1).all()
    assert (start.batch.answer[4:] == -1).all()


def test_fresh_memories_are_taken_in_as_they_were_before_the_question(phase: Callable[..., Phase]) -> None:
    p = phase()
    start, _plan, states = p.step(ALL)
    taken = [row for row in range(4) if start.batch.last_told[row] < 2]
    assert taken, "the seed gives no sample whose fact is told before the last segment"
    held = p.passing.old.age >= 0
    assert held.sum() == len(taken)
    kept = p.passing.old.take(held)
    torch.testing.assert_close(kept.state, states[-1][taken])
    # They wait for the question alone; what has been told them is kept beside it.
    assert (kept.waits == 1).all()
    assert torch.equal(kept.story, start.batch.told[taken])
    assert torch.equal(kept.answers[:, 0], start.batch.answer[taken])
    assert torch.equal(p.passing.old.age[held], 2 - start.batch.last_told[taken])


def test_memories_of_nothing_are_taken_in_as_they_were_before_the_fact(phase: Callable[..., Phase]) -> None:
    p = phase()
    _start, plan, states = p.step(ALL)
    taken = [row for row in range(4) if plan.first_told[row] > 0]
    assert taken, "the seed gives no sample whose fact is told after the first segment"
    held = p.passing.blank.age >= 0
    expected = torch.stack([states[plan.first_told[row]][row] for row in taken])
    torch.testing.assert_close(p.passing.blank.content[held], expected)
    assert torch.equal(p.passing.blank.age[held], plan.first_told[taken])


def test_a_fact_told_beside_the_question_is_not_in_the_memory_before_it(phase: Callable[..., Phase]) -> None:
    p = phase()
    for _ in range(5):
        p.step(ALL, num_segments=1)
    assert (p.passing.old.age < 0).all()
    assert (p.passing.blank.age < 0).all()


def test_old_memories_are_asked_behind_noise_and_go_back_or_are_told_again(phase: Callable[..., Phase]) -> None:
    p = phase(youth=10**6)
    until_full(p)
    before, ages, read = p.passing.old.content.state.clone(), p.passing.old.age.clone(), p.passing.counts["segments"]
    number = 7 * p.steps
    noise = FactDataset(p.placement, "train")[Key(3, number + 4, facts=False)].input_ids
    start, _plan, states = p.step([False, False, False, False, True, False, True])
    held = p.passing._drawn_old
    assert len(held) == 3
    # What was read: the memory from the pool, noise, and its question at the end, which hides as much of the noise.
    torch.testing.assert_close(start.state[4:], before[held])
    content = p.passing.old.take(held)
    question = content.story[0, -1]
    assert torch.equal(start.batch.input_ids[4, -1], torch.where(question >= 0, question, noise[-1]))
    assert torch.equal(start.batch.input_ids[4, :-1], noise[:-1])
    assert torch.equal(start.batch.answer[4:], content.answers[:, 0])
    # What became of them.
    assert p.passing.old.age[held].tolist() == [ages[held[0]] + 2, 0, ages[held[2]] + 2]
    torch.testing.assert_close(content.state[[0, 2]], states[-1][[4, 6]])
    assert torch.equal(content.state[1], p.model.memory)
    length = 3 - int((content.story[1] >= 0).any(dim=1).int().argmax())
    assert content.waits.tolist() == [1, length, 1]
    assert (p.passing.counts["lost"], p.passing.counts["segments"] - read) == (1, 9)


def test_old_memories_of_some_facts_are_told_the_others(
    corpora: dict[Split, Corpus], tokenizer: PreTrainedTokenizerBase, make_model: Callable[..., RMTEncoder]
) -> None:
    placement = Placement(Reasoning(), corpora, tokenizer, text_length=30, seed=3)
    # None retires.
    p = Phase(placement, make_model(37, 4, double=False), youth=10**6)
    until_full(p)
    # How many facts were to come, and whether the memory was kept after them.
    seen: set[tuple[int, bool]] = set()
    questions: set[int] = set()
    while len(seen) < 3 or len(questions) < 4:
        before = tree.map(torch.clone, p.passing.old.content)
        ages, number = p.passing.old.age.clone(), 7 * p.steps
        start, plan, states = p.step(ALL)
        for row, place in zip((4, 5, 6), p.passing._drawn_old, strict=True):
            begin, border = 3 - int(before.waits[place]), plan.border[row]
            rest = before.story[place].clone()
            rest[:begin] = -1
            assert (rest[begin] >= 0).any()
            if before.gap[place] > 0:
                # Any of the four questions may be asked, whichever it was that was asked before.
                rest[-1] = p.passing.old.content.story[place, -1]
                (asked,) = torch.nonzero((before.questions[place] == rest[-1]).all(dim=1))[0]
                assert torch.equal(start.batch.answer[row], before.answers[place, asked])
                # It comes first in line, and none of the four is lost.
                assert torch.equal(start.batch.questions[row, 0], before.questions[place, asked])
                pairs = [{(*q.tolist(), *a.tolist()) for q, a in zip(all_.questions[i], all_.answers[i], strict=True)}
                         for all_, i in ((before, place), (start.batch, row))]  # fmt: skip
                assert pairs[0] == pairs[1]
                questions.add(int(asked))
            # What a memory waits for: one more fact or none, and the question. The rest is noise, before and between.
            *facts, question = tokenizer.decode(rest[rest >= 0]).split(".")
            assert question.endswith("?")
            noise = FactDataset(p.placement, "train")[Key(3, number + row, facts=False)].input_ids
            assert torch.equal(start.batch.input_ids[row], torch.where(rest >= 0, rest, noise))
            # It is kept as it was before that, or before the question alone.
            assert border in (begin, 2)
            seen.add((len(facts), bool(border > begin)))
            held = p.passing.old.content.state[place]
            if before.gap[place] == 0:
                # Nothing is to be remembered between a fact and the question beside it.
                assert p.passing.old.age[place] == -1 or not torch.equal(held, states[border][row])
                continue
            assert p.passing.old.content.waits[place] == 3 - border
            torch.testing.assert_close(held, states[border][row])
            assert p.passing.old.age[place] == ages[place] + border
    assert seen == {(0, False), (1, False), (1, True)}
    # A wrong answer is a memory lost, or a late fact missed.
    counts = dict(p.passing.counts)
    start, plan, _ = p.step([False] * 7)
    num_late = int(plan.late[4:].sum())
    # It is told again, unless the last fact stands beside the question: there is no memory between them to ask.
    gaps = p.passing.old.content.gap[p.passing._drawn_old]
    assert torch.equal(p.passing.old.age[p.passing._drawn_old], torch.where(gaps > 0, 0, -1))
    counted = [p.passing.counts[name] - counts[name] for name in ("segments", "lost", "told", "missed")]
    assert counted == [3 * (3 - num_late), 3 - num_late, 2 + num_late, 2 + num_late]


def test_half_of_the_old_memories_that_are_asked_know_all_facts(
    corpora: dict[Split, Corpus], tokenizer: PreTrainedTokenizerBase, make_model: Callable[..., RMTEncoder]
) -> None:
    p = Phase(Placement(Reasoning(), corpora, tokenizer, text_length=30, seed=3), make_model(37, 4, double=False))
    until_full(p)
    for _ in range(20):
        content = p.passing.old.content
        whole = content.waits <= content.gap
        p.step(ALL)
        drawn = p.passing._drawn_old
        assert len(drawn) == len(drawn.unique()) == 3
        assert whole[drawn[0]] or not whole.any()


def test_what_was_lost_is_told_again_and_then_remembered_from_there(phase: Callable[..., Phase]) -> None:
    p = phase(youth=10**6, pool=4)
    until_full(p)
    p.step([False] * 7)
    lost = {int(place) for place in p.passing._drawn_old}
    content = tree.map(torch.clone, p.passing.old.content)
    drawn: list[tuple[int, int]] = []
    while not drawn:
        start, _plan, states = p.step(ALL)
        drawn = [(row, place) for row, place in enumerate(p.passing._drawn_old.tolist(), start=4) if place in lost]
        assert (p.passing.old.age >= 0).all()
    row, place = drawn[0]
    # The memory of nothing was told the story, and waits for the question now.
    torch.testing.assert_close(start.state[row], content.state[place])
    story = content.story[place]
    assert torch.equal(start.batch.input_ids[row][story >= 0], story[story >= 0])
    assert p.passing.old.content.waits[place] == 1
    torch.testing.assert_close(p.passing.old.content.state[place], states[-1][row])
    told = int((story >= 0).any(dim=1).int().argmax())
    assert p.passing.old.age[place] == 2 - told


def test_old_memories_of_nothing_are_told_facts(phase: Callable[..., Phase]) -> None:
    p = phase()
    until_full(p)
    before, ages, told = p.passing.blank.content.clone(), p.passing.blank.age.clone(), p.passing.counts["told"]
    start, plan, states = p.step([True, False, False, False, False, False, False])
    drawn = p.passing._drawn_blank
    assert len(drawn) == 2
    torch.testing.assert_close(start.state[:2], before[drawn])
    first = plan.first_told
    assert p.passing.blank.age[drawn].tolist() == [ages[drawn[0]] + first[0], -1]
    torch.testing.assert_close(p.passing.blank.content[drawn[0]], states[first[0]][0])
    assert (p.passing.counts["missed"], p.passing.counts["told"] - told) == (1, 2)


def test_the_other_samples_start_from_the_trained_memory_and_teach_it(phase: Callable[..., Phase]) -> None:
    p = phase()
    until_full(p)
    start, _plan, _ = p.step(ALL)
    own = p.model.memory
    torch.testing.assert_close(start.state[2:4], own.expand(2, -1, -1))
    (gradient,) = torch.autograd.grad(start.state.sum(), own)
    assert (gradient == 2).all()


def test_each_order_of_age_is_as_frequent_in_the_pool(phase: Callable[..., Phase]) -> None:
    p = phase(youth=4, pool=64)
    ages = []
    for step in range(600):
        p.step(ALL)
        if step >= 200:
            ages.append(p.passing.old.age[p.passing.old.age >= 0])
    # Age plus youth doubles from 8 to 16 and from 16 to 32.
    counts = torch.histogram(torch.cat(ages).float(), torch.tensor([3.5, 11.5, 27.5])).hist
    assert 0.7 < counts[0] / counts[1] < 1.4


def test_jitter_disturbs_old_memories_alone(phase: Callable[..., Phase]) -> None:
    p = phase(jitter=0.5, pool=64)
    until_full(p)
    before = p.passing.old.content.state.clone()
    start, _plan, _ = p.step(ALL)
    noise = start.state[4:] - before[p.passing._drawn_old]
    assert 0.3 < noise.std() < 0.7
    torch.testing.assert_close(start.state[2:4], p.model.memory.expand(2, -1, -1))


def test_pools_travel_in_checkpoints_as_far_as_there_is_room(phase: Callable[..., Phase]) -> None:
    p = phase()
    until_full(p)
    saved = p.passing.tensors()
    for size in (32, 20, 40):
        resumed = phase(pool=size)
        resumed.passing.load_tensors([part.clone() for part in saved])
        kept = min(size, 32)
        assert torch.equal(resumed.passing.old.age[:kept], p.passing.old.age[:kept])
        assert (resumed.passing.old.age >= 0).sum() == kept
        torch.testing.assert_close(resumed.passing.old.content.state[:kept], p.passing.old.content.state[:kept])
    # What version 0.1 kept of answers: their numbers.
    number = torch.tensor([[PLACES.index(p.text(row)) for row in rows] for rows in saved[6]])
    resumed = phase()
    resumed.passing.load_tensors([*(part.clone() for part in saved[:6]), number, *saved[7:]])
    assert torch.equal(resumed.passing.old.content.answers, saved[6])


def test_pools_of_another_kind_fill_anew(phase: Callable[..., Phase], make_model: Callable[..., RMTEncoder]) -> None:
    p = phase()
    until_full(p)
    other = Phase(p.placement, make_model(38, 5, double=False))
    other.passing.load_tensors(p.passing.tensors())
    assert (other.passing.old.age < 0).all()
    other.step(ALL)
    assert (other.passing.old.age >= 0).any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"curriculum": 1}, r"curriculum\.max_segments=1: leaves no memory to carry; give 2 or more"),
        ({"batch_size": 1}, r"data\.batch_size=1: hold=state_passing shares a batch .*; give 2 or more"),
        ({"memory_size": 0}, r"hold=state_passing: this model has no memory to hold; leave it out"),
    ],
)
def test_where_nothing_can_be_carried(
    settings: dict[str, int], message: str, placement: Placement, make_model: Callable[..., RMTEncoder]
) -> None:
    memory_size = settings.get("memory_size", 4)
    model = make_model(33 + memory_size, memory_size, double=False)
    curriculum = SegmentCurriculum(settings.get("curriculum", 3), steps=10)
    phases = Phases([curriculum, StatePassing(steps=10, lr=1e-3)], WarmupDecay(steps=10, lr=1e-3), seed=0)
    data = FactDataModule(placement, phases, segment_length=37, batch_size=settings.get("batch_size", 4))
    with pytest.raises(UserError, match=message):
        phases.prepare(FactClassifier(model, PLACES), data)


def held_at(folder: Path) -> list[int]:
    """The steps at which the losses of old memories were counted."""
    with (folder / "hold.csv").open() as file:
        return [int(row["step"]) for row in csv.DictReader(file)]


def test_a_run_with_old_memories_that_was_interrupted_ends_with_the_same_weights(train: Run, tmp_path: Path) -> None:
    whole = train(*HELD, "hydra.run.dir=whole")
    assert whole.returncode == 0, whole.stderr
    assert "State passing" in whole.stdout
    # A screen of 80 columns has room for each number.
    assert not [line for line in whole.stdout.splitlines() if line.startswith("│") and "…" in line]
    assert held_at(tmp_path / "whole") == [21, 24]
    # In the middle of the phase's second epoch, then to its end.
    assert train(*HELD, "trainer.max_steps=22").returncode == 0
    resumed = train("resume=run", "trainer.max_steps=-1", small=False)
    assert resumed.returncode == 0, resumed.stderr
    assert_identical(final(tmp_path / "whole"), final(tmp_path / "run"))


@pytest.mark.soak
def test_the_phase_can_be_added_to_a_run_that_has_ended(train: Run, tmp_path: Path) -> None:
    assert train("hydra.run.dir=run").returncode == 0
    added = train("resume=run", "hold=state_passing", "hold.steps=6", "hold.pool=8", "hold.until_rate=1", small=False)
    assert added.returncode == 0, added.stderr
    assert held_at(tmp_path / "run") == [21, 24]
    again = train("resume=run", small=False)
    assert "has finished training; testing it again" in again.stderr + again.stdout
    more = train("resume=run", "curriculum.max_segments=4", small=False)
    assert more.returncode == 0, more.stderr
    assert held_at(tmp_path / "run") == [21, 24, 33, 36]


@pytest.mark.parametrize(
    ("followed", "verdicts", "stuck"),
    [
        # Two validations a round. The 95% intervals end at 9.2e-5 for 0 in 40,000, at 9.2e-4 for 0 in 4,000.
        ([LossRate(0, 40_000)], ["go on", "end"], False),
        ([LossRate(1, 4_000), LossRate(0, 40_000)], ["go on", "restart", "go on", "end"], False),
        ([LossRate(1, 4_000), LossRate(0, 4_000)], ["go on", "restart", "go on", "end"], True),
        ([LossRate(0, 0), LossRate(0, 0)], ["go on", "restart", "go on", "end"], True),
    ],
    ids=["holds", "holds after a second round", "does not hold", "nothing is answered"],
)
def test_rounds_follow_until_memory_holds(
    followed: list[LossRate],
    verdicts: list[str],
    stuck: bool,
    make_model: Callable[..., RMTEncoder],
    placement: Placement,
) -> None:
    measured = iter(followed)

    def made() -> StatePassing:
        hold = StatePassing(steps=20, lr=1e-3, until_rate=1e-4, rounds=2)
        phases = Phases([SegmentCurriculum(3, steps=10), hold], WarmupDecay(steps=10, lr=1e-3), seed=0)
        data = FactDataModule(placement, phases, segment_length=37, batch_size=4)
        phases.prepare(FactClassifier(make_model(37, 4, double=False), PLACES), data)
        hold._measure = lambda total: next(measured)
        return hold

    hold, given = made(), []
    hold.begin(100)
    for number in range(1, len(verdicts) + 1):
        # What is lost amid the fragments of training does not count.
        hold.counts |= {"lost": 500, "segments": 10_000}
        given.append(hold.validate(100 + 10 * number, {}, lambda counts: counts))
        restored = made()
        restored.load_state_dict(json.loads(json.dumps(hold.state_dict())))
        for name in ("finished", "stuck", "begins", "last_step", "rate"):
            assert getattr(restored, name) == getattr(hold, name), name
        hold = restored
    assert given == verdicts and next(measured, None) is None
    assert (hold.finished, hold.stuck) == (True, stuck)
    last = hold.rows()[-1]
    assert (last["followed"], last["followed_lost"]) == (followed[-1].exposure, followed[-1].lost)
    if stuck:
        what = "0 memories were lost in 4,000 segments of validation text, 0 to 0.00092 a segment"
        what = what if followed[-1].exposure else "fewer than half of the validation samples were answered even at once"
        assert hold.advice("resume=run").startswith(f"memory does not hold yet: {what}, and hold.until_rate=0.0001 is ")


@pytest.mark.fault("memory that does not hold", "more rounds, then a line that says so and exit code 1")
def test_a_run_whose_memory_does_not_hold_says_so(train: Run, tmp_path: Path) -> None:
    never = train(*SHORT, "backbone=tiny_bert", "hold.until_rate=1e-6", "hold.rounds=2", "hold.lr=1e-9")
    assert never.returncode == 1
    assert held_at(tmp_path / "run") == [21, 24, 27, 30]
    assert "another round of 6 steps" in never.stdout
    assert re.search(
        r"does not hold yet: .* hold.until_rate=1e-06 is asked for; raise hold.rounds or hold.steps", never.stdout
    )
    phases = json.loads((tmp_path / "run" / "phases.json").read_text())
    assert [phase["stuck"] for phase in phases] == [False, True]
    # One round more, from the beginning of a schedule on, not from the end of the last one.
    more = train("resume=run", "hold.rounds=3", small=False)
    assert more.returncode == 1, more.stderr
    assert held_at(tmp_path / "run") == [21, 24, 27, 30, 33, 36]


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
    dataset, numbers = FactDataset(placement, "test"), early(placement, "test", 4)
    told = [dataset[Key(4, number)] for number in numbers]
    assert all(sample.last_told < 3 for sample in told)
    texts = [placement.tokenizer.decode(sample.answers[0][sample.answers[0] >= 0]).strip() for sample in told]
    answers = torch.tensor([PLACES.index(text) for text in texts])
    # Four memories: two last for ever, one is lost after 3 segments, one after 9.
    model = Forgetful(torch.tensor([99, 3, 9, 99]), answers)

    def found(every: int) -> Any:
        def right(end: Reading[Any], answer: torch.Tensor) -> torch.Tensor:
            assert torch.equal(answer, torch.stack([sample.answers[0] for sample in told]))
            return model.readout(end.hidden, end.segment).argmax(dim=1) == answers

        return list(follow(model, right, placement, "test", numbers, 12, every, torch.device("cpu")))[-1]

    result = found(every=2)
    assert (result.written, result.lost) == (4, 2)
    # Asked after reading 1, 3, 5, … segments: the second is found lost at the third question, the third at the sixth.
    assert result.right == {2: 4, 4: 4, 6: 3, 8: 3, 10: 3, 12: 2}
    assert result.exposure == 2 * (4 + 4 + 4 + 3 + 3 + 3)
    # Asking leaves no trace in the memory.
    assert found(every=4).right == {4: 4, 8: 3, 12: 2}


class Deaf(Forgetful):
    """Hears an answer while it is young, and remembers it for ever."""

    def __init__(self, lifetimes: torch.Tensor, answers: torch.Tensor, words: torch.Tensor) -> None:
        super().__init__(lifetimes, answers)
        self.words = words

    def initial_state(self, batch_size: int) -> torch.Tensor:
        return torch.zeros(batch_size, 2)

    def read_segment(self, segment: Segment, memory: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        age, heard = memory.unbind(dim=1)
        hears = (segment.input_ids == self.words[:, None]).any(dim=1) & (age < self.lifetimes)
        heard = torch.maximum(heard, hears.float())
        # What `readout` compares with lifetimes.
        return (1 - heard) * 1e6, torch.stack([age + 1, heard], dim=1)


class Answering:
    """What `measure` needs of a module under a trainer, with a `Forgetful` model whose memories last so long."""

    device, training = torch.device("cpu"), True

    def __init__(self, placement: Placement, lifetimes: list[int], deaf: bool = False) -> None:
        self.numbers = early(placement, "validation", 64)
        samples = [FactDataset(placement, "validation")[Key(4, number)] for number in self.numbers]
        texts = [placement.tokenizer.decode(sample.answers[0][sample.answers[0] >= 0]).strip() for sample in samples]
        self.answers = torch.tensor([PLACES.index(text) for text in texts])
        self.model = Forgetful(torch.tensor((lifetimes * 64)[:64]), self.answers)
        if deaf:
            words = torch.stack([sample.answers[0, 0] for sample in samples])
            self.model = Deaf(self.model.lifetimes, self.answers, words)
        self.trainer = SimpleNamespace(precision_plugin=SimpleNamespace(val_step_context=nullcontext))
        self.steps = 0

    def eval(self) -> None:
        self.training = False

    def train(self, mode: bool) -> None:
        self.training = mode

    def judge(self, end: Reading[Any], answer: torch.Tensor) -> Any:
        assert not self.training and not torch.is_grad_enabled()
        self.steps += 1
        return SimpleNamespace(right=self.model.readout(end.hidden, end.segment).argmax(dim=1) == self.answers)


@pytest.mark.parametrize(
    ("lifetimes", "deaf", "rate", "asked"),
    [
        # None is lost: 3.69 / 0.002 = 1,845 segments prove the bound, and 64 memories read 512 between two questions.
        ([999], False, LossRate(0, 2_048), [4, 4]),
        # Half of them are lost at once, which is beyond the bound for sure.
        ([5, 999], False, LossRate(32, 512), [1]),
        # One of 64 after 10 segments: neither below the bound nor above it until 5.57 / 0.002 = 2,786 have been read.
        ([999] * 63 + [10], False, LossRate(1, 3_040), [6, 6]),
        # Fewer than half answer at all, and those may do so by chance.
        ([-3, -3, 999], False, LossRate(0, 0), [1]),
        # Facts are never lost, but half of those who have read that much without one take in none any more.
        ([5, 999], True, LossRate(32, 512), [4, 1]),
    ],
    ids=["none", "half", "one", "nothing to lose", "deaf when old"],
)
def test_memories_are_followed_until_it_is_known_whether_they_hold(
    lifetimes: list[int], deaf: bool, rate: LossRate, asked: list[int], placement: Placement
) -> None:
    module = Answering(placement, lifetimes, deaf)
    data: Any = SimpleNamespace(placement=placement, rank=0, world_size=1)
    assert measure(module, data, 2e-3, lambda counts: counts) == rate  # type: ignore[arg-type]
    # Once at the start.
    assert module.steps == sum(asked) + len(asked) and module.training


def test_devices_follow_different_memories(placement: Placement, monkeypatch: pytest.MonkeyPatch) -> None:
    followed = []
    monkeypatch.setattr(
        "rmt_lightning.training.retention.follow", lambda *given, **noise: followed.append((given[4], noise)) or ()
    )
    for rank in range(2):
        data: Any = SimpleNamespace(placement=placement, rank=rank, world_size=2)
        measure(Answering(placement, [9]), data, 0.1, lambda counts: counts)  # type: ignore[arg-type]
    (one, read_by_one), (other, read_by_other) = followed
    assert sorted([*one, *other]) == early(placement, "validation", 64) and len(one) == 32
    assert (read_by_one["first_noise"], read_by_other["first_noise"]) == (0, 32)


def test_the_interval_of_a_rate_is_that_of_a_poisson_count() -> None:
    # Exact limits for counts of 0, 3 and 20: Garwood 1936.
    for lost, low, high in ((0, 0.0, 3.69), (3, 0.62, 8.77), (20, 12.22, 30.89)):
        assert LossRate(lost, 1).interval == pytest.approx((low, high), abs=5e-3)
    assert LossRate(20, 1000).rate == 0.02
    assert math.isnan(LossRate(0, 0).rate)
