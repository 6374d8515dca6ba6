"""One of each part that can be added from outside: a task, a noise, a model, an update, a metric, a callback, a phase.

Shapes: B batch, S text tokens of a segment, M memory tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torchmetrics import Metric

from rmt_lightning import Example, Phase, Progress, Segment, SegmentModel, Update, WarmupDecay


class Colors:
    """A task: what color a door has."""

    name = "colors"
    answers = ("red", "green", "dark blue")
    # "start": in the first segment; "apart": each fact in a segment of its own.
    where = "anywhere"

    def draw(self, rng: np.random.Generator, split: str) -> Example:
        """What is told, what is asked, and the answer. `support` numbers the facts that are needed."""
        color = self.answers[rng.integers(len(self.answers))]
        return Example((f"The door is {color}.",), "What color is the door?", color, support=(0,))

    def sentences(self) -> Iterator[str]:
        """All that it may say, for tokenizers that are trained on it."""
        yield "What color is the door?"
        yield from (f"The door is {color}." for color in self.answers)


class Rain:
    """A noise: nothing but rain.

    Args:
        days: how many documents there are for each split.
    """

    def __init__(self, days: int = 50) -> None:
        self.days = days

    def documents(self, split: str) -> Iterator[list[str]]:
        """Documents, as lists of sentences; each split has its own."""
        for day in range(self.days):
            yield [f"It rained on {split} day {day}." for _ in range(9)]

    def fingerprint(self) -> str:
        """Names the content: text that has this name is tokenized once."""
        return f"rain-{self.days}"


class Bag(SegmentModel[Tensor]):
    """A model: a running mean of word embeddings, (B, D).

    Args:
        tokenizer: of the backbone, which it is given by this name.
        segment_length: S.
        width: D.
    """

    def __init__(self, tokenizer: Any, segment_length: int, width: int = 8) -> None:
        super().__init__(segment_length, width)
        self.tokenizer = tokenizer
        self.words = nn.Embedding(len(tokenizer), width)

    def initial_state(self, batch_size: int) -> Tensor:
        return self.words.weight.new_zeros(batch_size, self.width)

    def read_segment(self, segment: Segment, state: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.words(segment.input_ids) + state[:, None]
        return hidden, hidden.mean(dim=1)


class Mix(Update):
    """An update: the next memory is so much of what was written and so much of what was there, (B, M, D).

    Args:
        width: D, which it is given by this name.
        share: of what was written.
    """

    def __init__(self, width: int, share: float = 0.5) -> None:
        super().__init__()
        self.share = share

    def forward(self, written: Tensor, memory: Tensor) -> Tensor:
        return self.share * written + (1 - self.share) * memory


class Wrong(Metric):
    """A metric: how many answers were wrong."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, right: Tensor) -> None:
        """Asks by name for what it counts: right, num_segments, distance, preds or target."""
        self.count += (~right).sum()

    def compute(self) -> Tensor:
        return self.count


class Count(Callback):
    """A callback: counts batches, also of a run that has been resumed, and tells at the end.

    Args:
        what: what it calls them.
    """

    def __init__(self, what: str = "batches") -> None:
        self.what = what
        self.count = 0

    def on_train_batch_end(self, *_: Any) -> None:
        self.count += 1

    def on_train_end(self, *_: Any) -> None:
        print(f"{self.count} {self.what}")

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.count = state_dict["count"]


class Cooldown(Phase):
    """A phase: the samples of the phase before it, at a small learning rate.

    Args:
        steps: optimizer steps.
        lr: the learning rate.
    """

    name, title, table = "cooldown", "Cooldown", "cooldown.csv"

    def __init__(self, steps: int, lr: float) -> None:
        self.steps = steps
        self.lr = lr
        self.accuracy: list[tuple[int, float]] = []

    def prepare(self, module: Any, data: Any, before: Phase | None) -> None:
        assert before is not None
        self.before, self.num_segments = before, before.longest

    def training_keys(self, data: Any, batch: int) -> list[Any]:
        return self.before.training_keys(data, batch)

    def validation_keys(self, data: Any) -> Iterator[list[Any]]:
        return self.before.validation_keys(data)

    def optimization(self, default: WarmupDecay) -> tuple[WarmupDecay, int]:
        return WarmupDecay(10**6, self.lr, warmup=0), 1

    @property
    def finished(self) -> bool:
        return bool(self.accuracy) and self.accuracy[-1][0] - (self.first_step or 0) >= self.steps

    def validate(self, step: int, metrics: Mapping[str, Tensor], total: Callable[[Tensor], Tensor]) -> Any:
        self.accuracy.append((step, float(metrics["val/accuracy"])))
        return "end" if self.finished else "go on"

    def progress(self, step: int, metrics: Mapping[str, Tensor]) -> Progress:
        return Progress(self.title, step - (self.first_step or 0), self.steps)

    def rows(self) -> list[dict[str, Any]]:
        return [{"step": step, "accuracy": accuracy} for step, accuracy in self.accuracy]

    def state_dict(self) -> dict[str, Any]:
        return {"first_step": self.first_step, "accuracy": self.accuracy}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.first_step, self.accuracy = state["first_step"], state["accuracy"]
