"""A phase after the curriculum that makes memory hold: training on memories far older than any input.

Shapes: B batch, T segments, S text tokens of a segment, P memories in the pool.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from functools import partial
from typing import Annotated, Any, cast

import lightning as L
import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from rmt_lightning.core.errors import UserError
from rmt_lightning.tasks.datamodule import data_of
from rmt_lightning.training.classification import FactClassifier
from rmt_lightning.training.optimization import WarmupDecay
from rmt_lightning.training.phases.curriculum import Curriculum, SegmentCurriculum

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
    """

    step: int
    segments: int
    lost: int
    age: float
    told: int
    missed: int


class Pool:
    """Memories on their way, each with whatever else is known of it. Places are kept; age -1 marks a free one.

    Args:
        size: P.
        like: what is to be kept, for some batch: a tree of tensors (B, …).
    """

    def __init__(self, size: int, like: Any) -> None:
        self.content = tree_map(lambda part: part.detach().new_zeros(size, *part.shape[1:]), like)
        self.age = torch.full((size,), -1, device=tree_leaves(like)[0].device)

    @classmethod
    def restored(cls, content: Any, age: Tensor) -> Pool:
        pool = cls(0, content)
        pool.content, pool.age = content, age
        return pool

    def draw(self, count: int, random: torch.Generator, among: Tensor | bool = True) -> Tensor:
        """The places of at most `count` memories, of all or `among` some (P,)."""
        wanted = (self.age >= 0) & among
        order = torch.randperm(len(self.age), generator=random).to(self.age.device)
        return order[wanted[order]][:count]

    def take(self, places: Tensor) -> Any:
        return tree_map(lambda part: part[places], self.content)

    def put_back(self, places: Tensor, content: Any, age: Tensor, kept: Tensor) -> None:
        """Give places what is in them now, or free those that are not kept."""
        tree_map(lambda part, new: part.__setitem__(places, new.to(part)), self.content, content)
        self.age[places] = torch.where(kept, age, -1)

    def admit(self, content: Any, age: Tensor, wanted: Tensor) -> None:
        """Let in what is wanted, as far as there is room."""
        free = torch.nonzero(self.age < 0).flatten()
        rows = torch.nonzero(wanted).flatten()[: len(free)]
        self.put_back(free[: len(rows)], tree_map(lambda part: part[rows], content), age[rows], wanted[rows])


class StatePassing(Curriculum):
    """Carries memories over from step to step, so that they grow old at the price of short inputs.

    ```
    fresh    [first memory] noise … fact … noise question        as in the curriculum, 1 … n segments
    blank    [old memory, of nothing] noise … fact … noise question
    carried  [old memory, of all facts] noise … noise question
             [old memory, of some facts] noise … fact … noise question
    ```

    In a share of each batch, noise is read by memories from a pool, and what they wait for stands behind it: any
    question about its facts, or facts that are still to come and the question. If the answer was right, a memory goes
    back as it was before that, or as it was before the question alone. If it was wrong, the memory is lost, and its
    place is taken by one of nothing that waits for the same facts: what is hard to remember is told more often. Fresh
    memories take the free places. Half of the other samples begin with an old memory that has read noise alone, for a
    fact may be told late. So ages grow without limit, while a step costs what it did in the curriculum, and gradients
    still flow through up to n segments. Training on states that are passed on is enough for recurrent models to go far
    beyond their training length (Buitrago Ruiz and Gu 2025, arXiv 2507.02782); asking them, keeping those that still
    answer and telling the others again is what is added here.

    Args:
        curriculum: what comes before.
        steps: optimizer steps of the phase.
        lr: highest learning rate; it rises over the first 20 steps and falls linearly to 0.
        weight_decay: of all weights.
        share: part of each batch that is carried on.
        pool: P, how many memories of facts are kept on each device; beside them an eighth as many of nothing.
        youth: age in segments up to which memories are most frequent in the pool. Beyond it each doubling of age is as
            frequent as the one before, for memories are lost when they are young as well as when they are old.
        jitter: standard deviation of the noise that is added to memories from the pool, so that the model learns to
            pull them back to where they belong.
        fragments: how many pieces of facts stand in a segment of noise on average. What destroys memory is text that
            looks like a fact: "the kitchen cabinet", "I walked to the door".

    Raises:
        UserError: if the curriculum ends with one segment, which leaves nothing to carry.
    """

    def __init__(
        self,
        curriculum: SegmentCurriculum,
        steps: Annotated[int, Ge(1)],
        lr: Annotated[float, Gt(0)],
        weight_decay: Annotated[float, Ge(0)] = 1e-3,
        share: Annotated[float, Gt(0), Lt(1)] = 0.5,
        pool: Annotated[int, Ge(1)] = 256,
        youth: Annotated[int, Ge(1)] = 10,
        jitter: Annotated[float, Ge(0)] = 0.0,
        fragments: Annotated[float, Ge(0)] = 1.0,
    ) -> None:
        super().__init__()
        if curriculum.max_segments < 2:
            raise UserError("curriculum.max_segments=1: leaves no memory to carry; give 2 or more, or leave out hold=")
        self.curriculum = curriculum
        self.steps = steps
        self.optimization = WarmupDecay(steps, lr, weight_decay, warmup=min(1.0, 20 / steps))
        self.share = share
        self.size = pool
        self.youth = youth
        self.jitter = jitter
        self.fragments = fragments
        self.first_step: int | None = None
        self.history: list[Losses] = []
        self.counts = dict.fromkeys(_COUNTS, 0)

    @property
    def finished(self) -> bool:
        if not self.curriculum.finished or self.first_step is None or not self.history:
            return False
        return self.history[-1].step - self.first_step >= self.steps

    def progress(self, trainer: L.Trainer) -> tuple[str, int, int]:
        if self.first_step is None:
            return self.curriculum.progress(trainer)
        rate = f"{self.history[-1].lost} lost in {self.history[-1].segments:,} segments" if self.history else "–"
        return f"holding · {rate}", trainer.global_step - self.first_step, self.steps

    # The phase begins when the curriculum ends, or when a run that has ended is resumed with it.

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        data_of(trainer).fragments = self.fragments

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.curriculum.finished:
            # A run that was held has been resumed with more stages, and is held again behind them.
            self.first_step, data_of(trainer).carried = None, 0
            self._begins_now = False
            return
        self._begins_now = self.first_step is None
        if self._begins_now:
            self._begin(trainer)
        else:
            # What Lightning is about to restore belongs to the optimizer of this phase.
            self._restart_optimization(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._begins_now:
            # Only now has Lightning restored the number of steps.
            self.first_step = trainer.global_step
            self._restart_optimization(trainer)

    def _begin(self, trainer: L.Trainer) -> None:
        data = data_of(trainer)
        self.first_step = trainer.global_step
        if hasattr(self, "old"):
            # The pools of an earlier phase are those of shorter inputs.
            del self.old, self.blank
        data.lengths = "uniform"
        data.carried = min(data.batch_size - 1, max(1, round(self.share * data.batch_size)))
        log.info("holding: %d of %d samples of a batch go on with old memories", data.carried, data.batch_size)

    def _restart_optimization(self, trainer: L.Trainer) -> None:
        cast(FactClassifier, trainer.lightning_module).optimization = self.optimization
        trainer.strategy.setup_optimizers(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.curriculum.finished:
            return
        if self.first_step is None:
            trainer.should_stop = False
            self._begin(trainer)
            self._restart_optimization(trainer)
            return
        counts = torch.tensor(list(self.counts.values()), device=pl_module.device)
        summed = dict(zip(_COUNTS, trainer.strategy.reduce(counts, reduce_op="sum").tolist(), strict=True))
        ages = self.old.age[self.old.age >= 0].float()
        losses = Losses(step=trainer.global_step, age=float(ages.mean()) if len(ages) else 0.0, **summed)
        self.history.append(losses)
        self.counts = dict.fromkeys(_COUNTS, 0)
        log.info(
            "holding: step %d of %d, lost %d memories in %d segments, missed %d of %d late facts, mean age %.0f",
            losses.step - self.first_step, self.steps, losses.lost, losses.segments, losses.missed, losses.told,
            losses.age,
        )  # fmt: skip
        trainer.should_stop = self.finished

    # Rows of a batch: blank, fresh, carried, and the noise that finds no memory while the pool is filling.

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: dict[str, Tensor], batch_idx: int
    ) -> None:
        """Give old memories to the batch, and ask the questions of those that know a fact."""
        carried = data_of(trainer).carried
        if not carried:
            return
        classifier = cast(FactClassifier, pl_module)
        samples, num_segments, _ = batch["input_ids"].shape
        initial = classifier.model.initial_state(samples)
        batch["story"] = _ending(batch["told"], batch["first_told"], self.curriculum.max_segments)
        batch["gap"] = num_segments - 1 - batch["last_told"]
        batch["late"] = torch.zeros_like(batch["border"], dtype=torch.bool)
        if not hasattr(self, "old"):
            self.old = Pool(self.size, _memories(batch, initial, _length(batch["story"])))
            # Those of nothing are much alike; fewer of them grow older.
            self.blank = Pool(max(1, self.size // 8), initial)
        self._random = torch.Generator().manual_seed(_mix(classifier.seed, trainer.global_step, trainer.global_rank))
        first = samples - carried
        self._drawn_blank = self.blank.draw(first // 2, self._random)
        self._drawn_old = self._draw_old(carried, num_segments)
        rows = slice(first, first + len(self._drawn_old))
        old = self.old.take(self._drawn_old)
        self._tell(_rows(batch, rows), old)
        batch["state"] = tree_map(
            lambda new, blank, memory: torch.cat(
                [self._disturbed(blank), new[len(blank) : first], self._disturbed(memory), new[rows.stop :]]
            ),
            initial, self.blank.take(self._drawn_blank), old["state"],
        )  # fmt: skip

    def _draw_old(self, count: int, num_segments: int) -> Tensor:
        """The places of memories this batch is long enough for; at least half know all facts, if there are as many."""
        waits, gap = self.old.content["waits"], self.old.content["gap"]
        ready = waits <= num_segments
        whole = self.old.draw(count // 2, self._random, among=ready & (waits <= gap))
        ready[whole] = False
        return torch.cat([whole, self.old.draw(count - len(whole), self._random, among=ready)])

    def _tell(self, batch: dict[str, Tensor], old: dict[str, Any]) -> None:
        """Write what old memories wait for over the ends of some rows, and choose before which segment to keep them.

        That is where they begin to wait; or the question, of which they need to know nothing else: always for those who
        know nothing, and nine times in ten for those who know some facts.
        """
        num_segments = batch["input_ids"].shape[1]
        self._ask_anything(old)
        for name in _STORY:
            batch[name].copy_(old[name])
        begin = num_segments - old["waits"]
        told = _ending(old["story"][:, -num_segments:], begin, num_segments)
        batch["input_ids"].copy_(torch.where(told >= 0, told, batch["input_ids"]))
        batch["late"].copy_(old["gap"] < old["waits"])
        knows_nothing = old["waits"] == _length(old["story"])
        chosen = torch.rand(len(begin), generator=self._random).to(begin.device) < 0.9
        goes_on = (knows_nothing | chosen) & (old["gap"] > 0)
        batch["border"].copy_(torch.where(goes_on, num_segments - 1, begin))
        batch["first_told"].copy_(torch.where(knows_nothing, begin, 0))

    def _ask_anything(self, old: dict[str, Any]) -> None:
        """Put some question about the same facts at the end of stories that tell nothing else there, and first in line.

        A memory that was always asked the same would not have to hold the rest.
        """
        rows = torch.nonzero(old["gap"] > 0).flatten()
        chosen = torch.randint(old["answers"].shape[1], (len(rows),), generator=self._random).to(rows.device)
        for of_all in (old["questions"], old["answers"]):
            of_all[rows, chosen], of_all[rows, 0] = of_all[rows, 0], of_all[rows, chosen]
        old["story"][rows, -1] = old["questions"][rows, 0]
        old["label"][rows] = old["answers"][rows, 0]

    def _disturbed(self, memories: Tensor) -> Tensor:
        if not self.jitter or not memories.is_floating_point():
            return memories
        return memories + self.jitter * torch.randn(memories.shape, generator=self._random).to(memories)

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: dict[str, Tensor], batch_idx: int
    ) -> None:
        """Put back the memories whose answers were right, tell the others again, and take in new ones."""
        carried = data_of(trainer).carried
        if not carried:
            return
        samples, num_segments, _ = batch["input_ids"].shape
        first, num_blank, num_old = samples - carried, len(self._drawn_blank), len(self._drawn_old)
        right, early, border, states = outputs["right"], batch["first_told"], batch["border"], outputs["states"]

        # Memories of facts, as they were before the segment with what they wait for. What was lost is told again. A
        # story whose last fact stands beside the question is told once and dropped: no memory lies between the two.
        initial = cast(FactClassifier, pl_module).model.initial_state(samples)
        alone = batch["gap"] > 0
        again = ~right & alone
        state = tree_map(partial(_where, again), initial, _before(border, states))
        waits = torch.where(again, _length(batch["story"]), num_segments - border)
        memories = _memories(batch, state, waits)
        old = slice(first, first + num_old)
        age = border - early
        age[old] += self.old.age[self._drawn_old]
        kept = alone & ~self._retired(age, border)
        age = age.masked_fill(again, 0)
        self.old.put_back(self._drawn_old, _rows(memories, old), age[old], kept[old])
        self.old.admit(_rows(memories, slice(first)), age[:first], ((right | again) & (border > 0))[:first])

        # Memories of nothing, as they were before the segment with the first fact.
        nothing = _before(early, states)
        blank, fresh = slice(num_blank), slice(num_blank, first)
        age = self.blank.age[self._drawn_blank] + early[blank]
        kept = right[blank] & ~self._retired(age, early[blank])
        self.blank.put_back(self._drawn_blank, _rows(nothing, blank), age, kept)
        self.blank.admit(_rows(nothing, fresh), early[fresh], (right & (early > 0))[fresh])

        late = batch["late"][old]
        self.counts["segments"] += num_segments * int((~late).sum())
        self.counts["lost"] += int((~late & ~right[old]).sum())
        self.counts["told"] += num_blank + int(late.sum())
        self.counts["missed"] += int((~right[blank]).sum()) + int((late & ~right[old]).sum())

    def _retired(self, age: Tensor, segments: Tensor) -> Tensor:
        """Which memories, that have come to some age by reading some more segments, make room now."""
        return torch.rand(len(age), generator=self._random).to(age.device) < segments / (age + self.youth)

    # Checkpoints hold the pools of all ranks, so that a resumed run goes on as an uninterrupted one does.

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if hasattr(self, "old"):
            checkpoint["memories"] = tree_map(
                lambda part: trainer.strategy.all_gather(part).view(trainer.world_size, *part.shape).cpu(),
                [(pool.content, pool.age) for pool in (self.old, self.blank)],
            )

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if "memories" in checkpoint:
            own = tree_map(
                lambda parts: parts[trainer.global_rank % len(parts)].to(pl_module.device), checkpoint["memories"]
            )
            old, blank = (Pool.restored(content, age) for content, age in own)
            # Pools from before all questions were kept fill anew.
            if "questions" in old.content:
                self.old, self.blank = old, blank

    def state_dict(self) -> dict[str, Any]:
        history = [asdict(losses) for losses in self.history]
        return {"first_step": self.first_step, "counts": self.counts, "history": history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.first_step, self.counts = state_dict["first_step"], state_dict["counts"]
        self.history = [Losses(**losses) for losses in state_dict["history"]]


# What the pool knows of a memory beside its state: all that its sample tells, from the first fact on (longest, S); how
# many segments the question stands behind the last fact; the answer; and all questions (Q, S) with their answers (Q,).
_STORY = ("story", "gap", "label", "questions", "answers")
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


def _memories(batch: dict[str, Tensor], state: Any, waits: Tensor) -> dict[str, Any]:
    """What the pool keeps of a batch; memories wait for as many of the last segments of their stories (B,)."""
    return {"state": state, "waits": waits} | {name: batch[name] for name in _STORY}


def _before(segment: Tensor, states: list[Any]) -> Any:
    """The state before some segment (B,) of each row."""
    rows = torch.arange(len(segment), device=segment.device)
    return tree_map(lambda *parts: torch.stack(parts)[segment, rows], *states)


def _where(condition: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """Rows of `one` (B, …) where the condition (B,) holds, else those of `other`."""
    return torch.where(condition.view(-1, *[1] * (one.dim() - 1)), one, other.to(one))


def _rows(tree: Any, rows: slice) -> Any:
    return tree_map(lambda part: part[rows], tree)


def _mix(seed: int, step: int, rank: int) -> int:
    return (seed * 1_000_003 + step) * 1_009 + rank
