"""Batches, lengths, sharding and workers."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from rmt_lightning.core.errors import UserError
from rmt_lightning.models.rmt import RMTEncoder
from rmt_lightning.models.tiny import TinyBert
from rmt_lightning.tasks.corpus import Corpus
from rmt_lightning.tasks.datamodule import FactDataModule, FactDataset
from rmt_lightning.tasks.facts import PLACES, Carried, Detect, Reasoning, Split, Task, Whereabouts
from rmt_lightning.tasks.placement import Key, Placement, side_by_side
from rmt_lightning.training.optimization import WarmupDecay
from rmt_lightning.training.phases.curriculum import SegmentCurriculum, draw_length
from rmt_lightning.training.phases.lessons import draw_form, lessons_of
from rmt_lightning.training.phases.phase import Phases


def module(placement: Placement, rank: int = 0, world_size: int = 1, **options: int) -> FactDataModule:
    """Data in the hands of a curriculum that has begun."""
    settings = {"batch_size": 4, "steps_per_epoch": 6, "validation_samples": 50} | options
    phases = Phases([SegmentCurriculum(9, steps=10)], WarmupDecay(steps=10, lr=1e-3), seed=7)
    data = FactDataModule(placement, phases, segment_length=43, **settings)
    data.trainer = SimpleNamespace(global_rank=rank, world_size=world_size)
    phases.prepare(cast(Any, None), data)
    return data


def phases_of(data: FactDataModule) -> Phases:
    return cast(Phases, data.keys)


def curriculum_of(data: FactDataModule) -> SegmentCurriculum:
    return cast(SegmentCurriculum, phases_of(data).current)


def test_a_batch(placement: Placement) -> None:
    data = module(placement)
    curriculum_of(data).stage, curriculum_of(data).lengths = 3, "exact"
    batches = list(data.train_dataloader())
    assert len(batches) == 6
    for batch in batches:
        assert batch.input_ids.shape == (4, 3, 30)
        assert batch.distance.shape == (4,) and batch.distance.max() < 3
        for answer in batch.answer:
            assert data.placement.tokenizer.decode(answer[answer >= 0]).strip() in PLACES


def test_validation_samples_are_made_once(placement: Placement) -> None:
    samples = FactDataset(placement, "validation", kept=2**20)
    again = FactDataset(placement, "validation", kept=0)
    keys = [Key(segments, number) for segments in (1, 3) for number in range(4)]
    first = [samples[key] for key in keys]
    for key, before in zip(keys, first, strict=True):
        assert samples[key] is before
        assert all(map(torch.equal, again[key], before))


@pytest.mark.fault("a loader worker meets what the user has done wrong", "the same line as without workers")
def test_what_a_worker_tells(placement: Placement, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_data: FactDataset, _key: Key) -> None:
        raise UserError("task.path=qa.txt: line 3 is no line")

    monkeypatch.setattr(FactDataset, "__getitem__", refuse)
    with pytest.raises(UserError, match=r"^task\.path=qa\.txt: line 3 is no line$"):
        next(iter(module(placement, num_workers=2).train_dataloader()))


def test_no_more_samples_are_kept_than_there_is_room_for(placement: Placement) -> None:
    one = sum(part.nbytes for part in FactDataset(placement, "validation")[Key(2, 0)])
    samples = FactDataset(placement, "validation", kept=3 * one)
    for number in range(20):
        assert samples[Key(2, number)] is samples[Key(2, number)]
        assert len(samples._made) <= 3
    # One that is too large by itself is made each time.
    assert samples[Key(9, 0)] is not samples[Key(9, 0)]


def test_uniform_lengths_cover_all_up_to_the_stage(placement: Placement) -> None:
    lengths = [draw_length(7, batch, longest=5) for batch in range(1000)]
    shares = torch.bincount(torch.tensor(lengths))[1:]
    assert len(shares) == 5 and shares.min() > 150
    assert lengths == [draw_length(7, batch, longest=5) for batch in range(1000)]
    assert draw_length(7, 3, longest=5, lengths="exact") == 5


# With which of the easier forms later stages begin, if with any.
LATER: list[tuple[Task, list[int | None]]] = [
    (Detect(), []),
    (Reasoning(), [0, None]),
    (Carried(), [6, 7, 8, None]),
    (Whereabouts(), [0, 1, None]),
    (Whereabouts(moves=1), []),
]


@pytest.mark.parametrize(("task", "forms"), LATER, ids=[f"{task.name}-{len(forms)}" for task, forms in LATER])
def test_lessons_go_from_easy_samples_without_noise_to_the_task_as_it_is(
    task: Task, forms: list[int | None], corpora: dict[Split, Corpus], tokenizer: PreTrainedTokenizerBase
) -> None:
    data = module(Placement(task, corpora, tokenizer, text_length=60, seed=3))
    curriculum, placement = curriculum_of(data), data.placement
    full, tightest = placement.text_length, placement.tightest

    def shown(loader: DataLoader) -> tuple[set[int | None], list[int]]:
        keys = [key for batch in loader.batch_sampler for key in batch]
        return {key.easier for key in keys}, sorted({key.text_length or full for key in keys})

    # First without noise.
    plain = list(zip((*range(len(tightest) - 1), None), tightest, strict=True))
    for lesson, (form, room) in enumerate(plain, start=1):
        curriculum.lesson = lesson
        assert shown(data.train_dataloader()) == shown(data.val_dataloader()) == ({form}, [room])
        assert next(iter(data.train_dataloader())).input_ids.shape == (4, 1, room)
    # Then with more and more, in training up to as much as in validation.
    asked = []
    for lesson in range(len(plain) + 1, lessons_of(placement, 1) + 1):
        curriculum.lesson = lesson
        form, (longest,) = shown(data.val_dataloader())
        asked.append(longest)
        drawn = [draw_form(placement, 1, lesson, batch) for batch in range(1000)]
        assert form == {None} and set(drawn) == {(None, room) for room in range(tightest[-1], longest + 1)}
        assert drawn == [draw_form(placement, 1, lesson, batch) for batch in range(1000)]
    assert asked == sorted(set(asked)) and asked[0] > tightest[-1] and asked[-1] == full
    # And after them, the task as it is.
    curriculum.lesson = None
    assert shown(data.train_dataloader()) == shown(data.val_dataloader()) == ({None}, [full])
    # Later stages begin with the last of the easier forms, amid all the noise.
    curriculum.stage = 2
    assert lessons_of(placement, 2) == len(forms)
    for lesson, form in enumerate(forms, start=1):
        curriculum.lesson = lesson
        assert shown(data.train_dataloader()) == shown(data.val_dataloader()) == ({form}, [full])


def test_epochs_go_on_where_the_last_one_ended(placement: Placement) -> None:
    """Whatever interrupts training, the batches that follow are those that would have followed."""
    whole = module(placement)
    sequence = []
    for _ in range(3):
        keys = list(whole.train_dataloader().batch_sampler)
        sequence += keys
        phases_of(whole).consumed += len(keys)
    assert len(sequence) == 18
    assert len({key for batch in sequence for key in batch}) == 72
    for stopped_after in (0, 4, 6, 11):
        resumed = module(placement)
        phases_of(resumed).load({"global_step": stopped_after, "phases": {"consumed": stopped_after}})
        rest = list(resumed.train_dataloader().batch_sampler)
        assert rest == sequence[stopped_after : stopped_after - stopped_after % 6 + 6]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_no_sample_is_seen_twice_or_missed(placement: Placement, world_size: int) -> None:
    ranks = [module(placement, rank, world_size) for rank in range(world_size)]
    for data in ranks:
        curriculum_of(data).stage = 3
    training = [[key for batch in data.train_dataloader().batch_sampler for key in batch] for data in ranks]
    assert sorted(key.number for keys in training for key in keys) == list(range(24 * world_size))
    # At every step all ranks have inputs of one length.
    for batches in zip(*(data.train_dataloader().batch_sampler for data in ranks), strict=True):
        assert len({key.num_segments for batch in batches for key in batch}) == 1
    validation = [key for data in ranks for batch in data.val_dataloader().batch_sampler for key in batch]
    expected = [Key(3, n) for n in range(50)] + [Key(length, n) for length in (1, 2) for n in range(7)]
    assert sorted(validation) == sorted(expected)


@pytest.mark.parametrize(("workers", "persistent"), [(1, True), (2, True), (2, False)])
def test_workers_give_the_same_and_never_a_stale_length(placement: Placement, workers: int, persistent: bool) -> None:
    plain, parallel = module(placement), module(placement, num_workers=workers)
    loaders = [plain.train_dataloader(), parallel.train_dataloader()]
    if not persistent:
        own = loaders[1]
        loaders[1] = DataLoader(own.dataset, batch_sampler=own.batch_sampler, num_workers=workers)
    for num_segments in (1, 3, 2):
        for data in (plain, parallel):
            curriculum_of(data).stage, curriculum_of(data).lengths = num_segments, "exact"
        for one, other in zip(*loaders, strict=True):
            assert one.input_ids.shape[1] == num_segments
            assert all(map(torch.equal, one, other))
        for data in (plain, parallel):
            phases_of(data).consumed += 6


def test_a_stream_gives_the_samples_of_the_data_set(placement: Placement) -> None:
    samples = [placement.sample("validation", Key(4, number)) for number in range(3)]
    segments = list(side_by_side([(sample.num_segments, sample.segments) for sample in samples]))
    assert all(mask is None for _, mask in segments)
    stacked = torch.stack([ids for ids, _ in segments], dim=1)
    for row in range(3):
        assert torch.equal(stacked[row], FactDataset(placement, "validation")[Key(4, row)].input_ids)


def test_producing_a_batch_costs_less_than_a_twentieth_of_a_training_step(
    corpora: dict[Split, Corpus], tokenizer: PreTrainedTokenizerBase
) -> None:
    """With the model of the default run, the smallest that is shipped; in processor time, whatever else is running."""
    model = RMTEncoder(TinyBert().encoder(tokenizer), segment_length=64)
    data = module(Placement(Detect(), corpora, tokenizer, model.text_length, seed=1), batch_size=32, steps_per_epoch=40)
    curriculum_of(data).stage, curriculum_of(data).lengths = 2, "exact"
    loader = iter(data.train_dataloader())
    producing, training = [], []
    # The first batches find nothing in the processor's cache, and others share it.
    while len(producing) < 40 and not (producing and min(producing) < 0.05 * min(training)):
        began = time.process_time()
        batch = next(loader)
        produced = time.process_time()
        model(batch.input_ids)[0][:, 0].sum().backward()
        producing.append(produced - began)
        training.append(time.process_time() - produced)
    assert min(producing) < 0.05 * min(training)
