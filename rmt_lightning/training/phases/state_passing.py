"""A phase after the curriculum that makes memory hold: training on memories far older than any input.

Shapes: B batch, T segments, S text tokens of a segment, P memories in the pool, L segments of the longest inputs, Q
questions about a sample, A tokens of the longest answer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Annotated, Any

import lightning as L
import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor, nn

from rmt_lightning.core.errors import UserError
from rmt_lightning.core.run_folder import HOLD
from rmt_lightning.core.statistics import LossRate
from rmt_lightning.models import state as tree
from rmt_lightning.models.machine import check_room
from rmt_lightning.models.segment_model import SegmentModel
from rmt_lightning.tasks.datamodule import FactBatch, FactDataModule, FactDataset
from rmt_lightning.tasks.placement import Key
from rmt_lightning.training.answering import FactModule
from rmt_lightning.training.optimization import Rate, WarmupDecay
from rmt_lightning.training.phases.curriculum import draw_length, validated
from rmt_lightning.training.phases.phase import Outcome, Phase, Progress, Start, Verdict
from rmt_lightning.training.phases.pool import Memories, Plan, Pool
from rmt_lightning.training.retention import LEAD, early, measure

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Losses:
    """How many memories were lost between two validations.

    Attributes:
        step: optimizer step of the run.
        segments: how many segments were read by memories from the pool.
        lost: how many of these memories then gave a wrong answer.
        age: mean age of the memories in the pool, in segments.
        told: how many old memories that knew no fact, or not all, were told the others.
        missed: how many of these then gave a wrong answer.
        followed: at the end of a round, how many segments of validation text were read by memories that held; 0 if
            fewer than half of them answered at all.
        followed_lost: how many of these were lost.
    """

    step: int
    segments: int
    lost: int
    age: float
    told: int
    missed: int
    followed: int | None = None
    followed_lost: int | None = None


class StatePassing(Phase):
    """Carries memories over from step to step, so that they grow old at the price of short inputs.

    ```
    fresh    [first memory] noise … fact … noise question        as in the curriculum, 1 … n segments
    blank    [old memory, of nothing] noise … fact … noise question
    carried  [old memory, of all facts] noise … noise question
             [old memory, of some facts] noise … fact … noise question
    ```

    In a share of each batch, noise is read by memories from a pool, and what they wait for stands after it: any
    question about its facts, or facts that are still to come and the question. If the answer was right, a memory goes
    back as it was before that, or as it was before the question alone. If it was wrong, the memory is lost, and its
    place is taken by one of nothing that waits for the same facts: what is hard to remember is told more often. Fresh
    memories take the free places. Half of the other samples begin with an old memory that has read noise alone, for a
    fact may be told late. So ages grow without limit, while a step costs what it did in the curriculum, and gradients
    still flow through up to n segments. Training on states that are passed on is enough for recurrent models to go far
    beyond their training length (Buitrago Ruiz and Gu 2025, arXiv 2507.02782); asking them, keeping those that still
    answer and telling the others again is what is added here.

    Args:
        steps: optimizer steps of a round.
        lr: highest learning rate; in each round it rises over the first 20 steps and falls linearly to 0.
        weight_decay: of all weights.
        share: part of each batch that is carried on.
        pool: P, how many memories of facts are kept on each device; beside them an eighth as many of nothing.
        youth: age in segments up to which memories are most frequent in the pool. Beyond it each doubling of age is as
            frequent as the one before, for memories are lost when they are young as well as when they are old.
        jitter: standard deviation of the noise that is added to memories from the pool, so that the model learns to
            pull them back to where they belong.
        fragments: how many pieces of facts stand on average in a segment that neither tells nor asks. What destroys
            memory is text that looks like a fact: "the kitchen cabinet", "I walked to the door". Memories of nothing
            take it for one, too, and then take in no other.
        until_rate: memory holds if no more memories than these are lost a segment. At the end of a round, memories of
            validation samples are followed through validation text, without fragments, until the 95% interval of the
            rate lies below this one or above it; so are memories of nothing, which are lost if they take in no facts
            any more. That takes 3.7 / until_rate segments each if none is lost, and three times as many at most. 1
            measures nothing, and is met by any memory.
        rounds: how many there are at most until then.

    Raises:
        UserError: by `prepare`, if there is no memory to carry, nowhere to carry it, or none that can be followed.
    """

    name = "state_passing"
    title = "State passing"
    table = HOLD

    def __init__(
        self,
        steps: Annotated[int, Ge(1)],
        lr: Rate,
        weight_decay: Annotated[float, Ge(0), Le(1e30)] = 1e-3,
        share: Annotated[float, Gt(0), Lt(1)] = 0.5,
        pool: Annotated[int, Ge(1)] = 256,
        youth: Annotated[int, Ge(1)] = 10,
        jitter: Annotated[float, Ge(0), Le(100)] = 0.0,
        fragments: Annotated[float, Ge(0)] = 1.0,
        until_rate: Annotated[float, Ge(1e-6), Le(1)] = 1e-4,
        rounds: Annotated[int, Ge(1)] = 3,
    ) -> None:
        self.steps = steps
        self.own = WarmupDecay(steps, lr, weight_decay, warmup=min(1.0, 20 / steps))
        self.share = share
        self.size = pool
        self.youth = youth
        self.jitter = jitter
        self.fragments = fragments
        self.until_rate = until_rate
        self.rounds = rounds
        # The present round, and the optimizer step of the run at which it began.
        self.round = 0
        self.round_step = 0
        self.history: list[Losses] = []
        self.counts = dict.fromkeys(_COUNTS, 0)

    def prepare(self, module: L.LightningModule, data: FactDataModule, before: Phase | None) -> None:
        if not isinstance(data, FactDataModule) or not isinstance(module, FactModule):
            raise UserError(
                "hold=state_passing: asks about facts amid noise, which neither running text nor labeled texts have; "
                "leave it out"
            )
        model = module.model
        if not any(leaf.numel() for leaf in tree.leaves(model.initial_state(1))):
            raise UserError("hold=state_passing: this model has no memory to hold; leave it out")
        if model.grows:
            raise UserError("hold=state_passing: the state of this model grows with each segment; leave it out")
        if data.batch_size < 2:
            raise UserError(
                f"data.batch_size={data.batch_size}: hold=state_passing shares a batch between old memories and new "
                "ones; give 2 or more"
            )
        self.num_segments = before.longest if before else 1
        if self.num_segments < 2:
            raise UserError("curriculum.max_segments=1: leaves no memory to carry; give 2 or more, or leave out hold=")
        if self.fragments > data.placement.text_length:
            raise UserError(
                f"hold.fragments={self.fragments:g}: more pieces than a segment of {data.placement.text_length} tokens "
                "has room for; give less"
            )
        if self.until_rate < 1 and not early(data.placement, "validation", 1):
            raise UserError(
                f"hold.until_rate={self.until_rate:g}: no memory can be followed, for no validation sample tells all "
                f"its facts within {LEAD - 1} segments; raise data.segment_length, or give hold.until_rate=1"
            )
        self._measure = partial(measure, module, data, self.until_rate)
        self.carried = min(data.batch_size - 1, max(1, round(self.share * data.batch_size)))
        sample, state = FactDataset(data.placement, "train")[Key(1, 0)], model.initial_state(1)
        batch = FactBatch(*(part[None].to(tree.leaves(state)[0].device) for part in sample))
        # (C, A)
        self.answers = torch.stack(
            [torch.from_numpy(data.placement.answer_ids(a)) for a in data.placement.task.answers]
        )
        self.like = self._memories(self._plan(batch), state, waits=batch.border)
        check_room(f"hold.pool={self.size}: that many memories take", self.size * tree.size(self.like), "give less")
        self._empty_pools()

    def _empty_pools(self) -> None:
        self.old = Pool(self.size, self.like)
        # Those of nothing are much alike; fewer of them grow older.
        self.blank = Pool(max(1, self.size // 8), self.like.state)

    @property
    def begins(self) -> bool:
        # A run that had come to its end may have been resumed for one more round.
        return self.first_step is None or self._goes_on

    def begin(self, step: int) -> None:
        if self.first_step is None:
            super().begin(step)
            # The pools of an earlier phase are those of shorter inputs.
            self._empty_pools()
            log.info("%s: %d samples of each batch go on with old memories", self.title, self.carried)
        else:
            log.info("%s: another round of %d steps", self.title, self.steps)
        self.round += 1
        self.round_step = step

    def training_keys(self, data: FactDataModule, batch: int) -> list[Key]:
        num_segments = draw_length(data.placement.seed, batch, self.num_segments)
        fresh, noise = data.numbers(batch)[: -self.carried], data.numbers(batch)[-self.carried :]
        return [
            *(Key(num_segments, number, fragments=self.fragments) for number in fresh),
            *(Key(num_segments, number, facts=False, fragments=self.fragments) for number in noise),
        ]

    def validation_keys(self, data: FactDataModule) -> Iterator[list[Key]]:
        for num_segments, samples in validated(self.num_segments, "uniform", data.validation_samples):
            yield from data.shared("validation", samples, Key(num_segments, 0))

    def optimization(self, default: WarmupDecay) -> tuple[WarmupDecay, int]:
        return self.own, 1

    @property
    def last_step(self) -> int:
        return self.round_step + self.steps

    @property
    def _over(self) -> bool:
        """Whether the present round is."""
        return self.first_step is not None and bool(self.history) and self.history[-1].step >= self.last_step

    @property
    def rate(self) -> LossRate | None:
        """How many memories were lost in validation text after the last round; None if that was not measured."""
        last = self.history[-1] if self.history else None
        if last is None or last.followed is None or last.followed_lost is None:
            return None
        return LossRate(last.followed_lost, last.followed)

    @property
    def _lost_too_many(self) -> bool:
        # A model that cannot answer has no memory to lose.
        return self.rate is not None and not self.rate.interval[1] <= self.until_rate

    @property
    def _goes_on(self) -> bool:
        """Whether another round follows."""
        return self._over and self._lost_too_many and self.round < self.rounds

    @property
    def finished(self) -> bool:
        return self._over and not self._goes_on

    @property
    def stuck(self) -> bool:
        return self.finished and self._lost_too_many

    @property
    def _told_rate(self) -> str:
        rate = self.rate
        if rate is None or not rate.exposure:
            return "fewer than half of the validation samples were answered even at once"
        return (
            f"{rate.lost} memories were lost in {rate.exposure:,} segments of validation text, "
            f"{rate.interval[0]:.2g} to {rate.interval[1]:.2g} a segment"
        )

    def advice(self, again: str) -> str:
        return (
            f"memory does not hold yet: {self._told_rate}, and hold.until_rate={self.until_rate:g} is asked for; "
            f"raise hold.rounds or hold.steps and go on with {again}"
        )

    def validate(self, step: int, metrics: Mapping[str, Tensor], total: Callable[[Tensor], Tensor]) -> Verdict:
        counts = dict(zip(_COUNTS, total(torch.tensor(list(self.counts.values()))).tolist(), strict=True))
        ages = self.old.age[self.old.age >= 0].float()
        losses = Losses(step=step, age=float(ages.mean()) if len(ages) else 0.0, **counts)
        self.counts = dict.fromkeys(_COUNTS, 0)
        log.info(
            "%s: step %d of %d, lost %d memories in %d segments, missed %d of %d late facts, mean age %.0f",
            self.title, step - self.round_step, self.steps, losses.lost, losses.segments, losses.missed,
            losses.told, losses.age,
        )  # fmt: skip
        if step >= self.last_step and self.until_rate < 1:
            rate = self._measure(total)
            losses = replace(losses, followed=rate.exposure, followed_lost=rate.lost)
        self.history.append(losses)
        if self.rate is not None:
            log.info("%s: %s", self.title, self._told_rate)
        if self._goes_on:
            self.begin(step)
            return "restart"
        return "end" if self.finished else "go on"

    def progress(self, step: int, metrics: Mapping[str, Tensor]) -> Progress:
        rate = f"{self.history[-1].lost} lost in {self.history[-1].segments:,} segments" if self.history else "–"
        return Progress(f"{self.title} · {rate}", step - self.round_step, self.steps)

    def rows(self) -> list[dict[str, Any]]:
        return [asdict(losses) | LossRate(losses.lost, losses.segments).row() for losses in self.history]

    # Rows of a batch: blank, fresh, carried, and the noise that finds no memory while the pool is filling.

    def start(self, batch: FactBatch, model: SegmentModel[Any], random: torch.Generator) -> Start:
        """Give old memories to the batch, and ask the questions of those that know a fact."""
        self.old.to(batch.input_ids.device)
        self.blank.to(batch.input_ids.device)
        samples, num_segments, _ = batch.input_ids.shape
        first = samples - self.carried
        self._drawn_blank = self.blank.draw(first // 2, random)
        self._drawn_old = self._draw_old(num_segments, random)
        asked, noise = slice(first, first + len(self._drawn_old)), slice(first + len(self._drawn_old), None)
        old = self.old.take(self._drawn_old)
        told, plan_of_old = self._tell(batch.input_ids[asked], old, random)
        plan = self._plan(batch)
        self._planned = tree.concat([tree.take(plan, slice(first)), plan_of_old, tree.take(plan, noise)])
        state = tree.map(
            lambda new, blank, memory: torch.cat(
                [self._disturbed(blank, random), new[len(blank) : first], self._disturbed(memory, random), new[noise]]
            ),
            model.initial_state(samples), self.blank.take(self._drawn_blank), old.state,
        )  # fmt: skip
        batch = batch._replace(
            input_ids=torch.cat([batch.input_ids[:first], told, batch.input_ids[noise]]),
            questions=self._planned.questions,
            answers=self._planned.answers,
        )
        return Start(batch, state)

    def _plan(self, batch: FactBatch) -> Plan:
        """What would become of the samples without old memories."""
        return Plan(
            story=_ending(batch.told, batch.first_told, self.num_segments),
            gap=batch.input_ids.shape[1] - 1 - batch.last_told,
            questions=batch.questions,
            answers=batch.answers,
            first_told=batch.first_told,
            border=batch.border,
            late=torch.zeros_like(batch.border, dtype=torch.bool),
        )

    @staticmethod
    def _memories(plan: Plan, state: Any, waits: Tensor) -> Memories:
        return Memories(state, waits, plan.story, plan.gap, plan.questions, plan.answers)

    def _draw_old(self, num_segments: int, random: torch.Generator) -> Tensor:
        """The places of memories this batch is long enough for; at least half know all facts, if there are as many."""
        waits, gap = self.old.content.waits, self.old.content.gap
        ready = waits <= num_segments
        whole = self.old.draw(self.carried // 2, random, among=ready & (waits <= gap))
        ready[whole] = False
        return torch.cat([whole, self.old.draw(self.carried - len(whole), random, among=ready)])

    def _tell(self, ids: Tensor, old: Memories, random: torch.Generator) -> tuple[Tensor, Plan]:
        """Write what old memories wait for over the ends of noise (B, T, S), and choose where to keep them from.

        That is where they begin to wait; or the question, of which they need to know nothing else: always for those who
        know nothing, and nine times in ten for those who know some facts.
        """
        num_segments = ids.shape[1]
        self._ask_anything(old, random)
        begin = num_segments - old.waits
        told = _ending(old.story[:, -num_segments:], begin, num_segments)
        knows_nothing = old.waits == _length(old.story)
        chosen = torch.rand(len(begin), generator=random).to(begin.device) < 0.9
        goes_on = (knows_nothing | chosen) & (old.gap > 0)
        plan = Plan(
            old.story, old.gap, old.questions, old.answers,
            first_told=torch.where(knows_nothing, begin, 0),
            border=torch.where(goes_on, num_segments - 1, begin),
            late=old.gap < old.waits,
        )  # fmt: skip
        return torch.where(told >= 0, told, ids), plan

    @staticmethod
    def _ask_anything(old: Memories, random: torch.Generator) -> None:
        """Put some question about the same facts at the end of stories that tell nothing else there, and first in line.

        A memory that was always asked the same would not have to hold the rest.
        """
        rows = torch.nonzero(old.gap > 0).flatten()
        chosen = torch.randint(old.answers.shape[1], (len(rows),), generator=random).to(rows.device)
        for of_all in (old.questions, old.answers):
            of_all[rows, chosen], of_all[rows, 0] = of_all[rows, 0], of_all[rows, chosen]
        old.story[rows, -1] = old.questions[rows, 0]

    def _disturbed(self, memories: Tensor, random: torch.Generator) -> Tensor:
        if not self.jitter or not memories.is_floating_point():
            return memories
        return memories + self.jitter * torch.randn(memories.shape, generator=random).to(memories)

    def step(self, start: Start, outcome: Outcome, model: SegmentModel[Any], random: torch.Generator) -> None:
        """Put back the memories whose answers were right, tell the others again, and take in new ones."""
        samples, num_segments, _ = start.batch.input_ids.shape
        first, num_blank, num_old = samples - self.carried, len(self._drawn_blank), len(self._drawn_old)
        plan, right, states = self._planned, outcome.right, outcome.states
        early, border = plan.first_told, plan.border

        # Memories of facts, as they were before the segment with what they wait for. What was lost is told again. A
        # story whose last fact stands beside the question is told once and dropped: no memory lies between the two.
        alone = plan.gap > 0
        again = ~right & alone
        state = tree.where(again, model.initial_state(samples), tree.at(states, border))
        waits = torch.where(again, _length(plan.story), num_segments - border)
        memories = self._memories(plan, state, waits)
        old = slice(first, first + num_old)
        age = border - early
        age[old] += self.old.age[self._drawn_old]
        kept = alone & ~self._retired(age, border, random)
        age = age.masked_fill(again, 0)
        self.old.put_back(self._drawn_old, tree.take(memories, old), age[old], kept[old])
        admitted = ((right | again) & (border > 0))[:first]
        self.old.admit(tree.take(memories, slice(first)), age[:first], admitted)

        # Memories of nothing, as they were before the segment with the first fact.
        nothing = tree.at(states, early)
        blank, fresh = slice(num_blank), slice(num_blank, first)
        age = self.blank.age[self._drawn_blank] + early[blank]
        kept = right[blank] & ~self._retired(age, early[blank], random)
        self.blank.put_back(self._drawn_blank, tree.take(nothing, blank), age, kept)
        self.blank.admit(tree.take(nothing, fresh), early[fresh], (right & (early > 0))[fresh])

        late = plan.late[old]
        self.counts["segments"] += num_segments * int((~late).sum())
        self.counts["lost"] += int((~late & ~right[old]).sum())
        self.counts["told"] += num_blank + int(late.sum())
        self.counts["missed"] += int((~right[blank]).sum()) + int((late & ~right[old]).sum())

    def _retired(self, age: Tensor, segments: Tensor, random: torch.Generator) -> Tensor:
        """Which memories, that have come to some age by reading some more segments, make room now."""
        return torch.rand(len(age), generator=random).to(age.device) < segments / (age + self.youth)

    def state_dict(self) -> dict[str, Any]:
        history = [asdict(losses) for losses in self.history]
        reached = {"first_step": self.first_step, "round": self.round, "round_step": self.round_step}
        return reached | {"counts": self.counts, "history": history}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.first_step, self.counts = state["first_step"], state["counts"]
        # Version 0.1 knew one round.
        begun = self.first_step is not None
        self.round = state.get("round", self.rounds if begun else 0)
        self.round_step = state.get("round_step", self.first_step or 0)
        self.history = [Losses(**losses) for losses in state["history"]]

    def tensors(self) -> list[Tensor]:
        return [*self.old.tensors(), *self.blank.tensors()]

    def load_tensors(self, tensors: list[Tensor]) -> None:
        old = len(self.old.tensors())
        if (number := tensors[old - 1]).dim() == 2:
            # Version 0.1 kept the number of an answer among those of the task.
            texts = self.answers.to(number.device)[number]
            tensors[old - 1] = texts.masked_fill(number[:, :, None] < 0, -1)
        self.old.load(tensors[:old])
        self.blank.load(tensors[old:])


_COUNTS = ("segments", "lost", "told", "missed")


def _ending(told: Tensor, border: Tensor, longest: int) -> Tensor:
    """What `told` (B, T, S) holds from segment `border` (B,) on: (B, longest, S), its end at the end."""
    ahead = longest - told.shape[1]
    ending = nn.functional.pad(told, (0, 0, ahead, 0), value=-1)
    before = torch.arange(longest, device=told.device) < ahead + border[:, None]
    return ending.masked_fill(before[:, :, None], -1)


def _length(story: Tensor) -> Tensor:
    """How many segments (B,) each story (B, longest, S) takes."""
    return story.shape[1] - (story >= 0).any(dim=2).int().argmax(dim=1)
