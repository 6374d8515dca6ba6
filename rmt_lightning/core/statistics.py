"""Counts, and the intervals that they leave."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import NormalDist, fmean
from typing import Any


@dataclass(frozen=True)
class Proportion:
    """Right answers among all.

    Attributes:
        right: right answers.
        samples: answers in all, at least 1.
        questions: how many different questions were asked; None if that is not known.
        finite: whether these are a sample of all that could be asked, each of which counts once for the interval.
    """

    right: int
    samples: int
    questions: int | None = field(default=None, kw_only=True)
    finite: bool = field(default=False, kw_only=True)

    @property
    def accuracy(self) -> float:
        return self.right / self.samples

    @property
    def interval(self) -> tuple[float, float]:
        """95% Wilson score interval of the accuracy (Wilson 1927)."""
        trials = (self.finite and self.questions) or self.samples
        share = NormalDist().inv_cdf(0.975) ** 2 / trials
        middle = (self.accuracy + share / 2) / (1 + share)
        half = math.sqrt(share * self.accuracy * (1 - self.accuracy) + share**2 / 4) / (1 + share)
        # At both ends, rounding is kept out.
        return middle - half if self.right else 0.0, middle + half if self.right < self.samples else 1.0

    def row(self) -> dict[str, Any]:
        """The columns of a csv file."""
        low, high = self.interval
        counts = {"right": self.right, "samples": self.samples, "questions": self.questions}
        return counts | {"accuracy": self.accuracy, "low": low, "high": high}


def wilson(share: float, samples: object) -> tuple[float, float]:
    """The interval of a share of so many samples, as a file has them; not numbers if they are no number of samples."""
    if not isinstance(samples, int) or samples < 1 or math.isnan(share):
        return math.nan, math.nan
    return Proportion(min(max(round(share * samples), 0), samples), samples).interval


@dataclass(frozen=True)
class LossRate:
    """Memories lost on the way.

    Attributes:
        lost: how many were lost.
        exposure: segments read by memories that were not lost yet.
    """

    lost: int
    exposure: int

    @property
    def rate(self) -> float:
        """Memories lost for each that reads a segment; not a number if none has."""
        return self.lost / self.exposure if self.exposure else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """95% interval of the rate: the exact one of a Poisson count (Garwood 1936)."""
        if not self.exposure:
            return math.nan, math.nan
        # Imported here, for it takes a second.
        from scipy.stats import chi2

        low = chi2.ppf(0.025, 2 * self.lost) / 2 if self.lost else 0.0
        high = chi2.ppf(0.975, 2 * (self.lost + 1)) / 2
        return float(low) / self.exposure, float(high) / self.exposure

    def row(self) -> dict[str, float]:
        """The columns of a csv file."""
        low, high = self.interval
        return {"lost": self.lost, "exposure": self.exposure, "rate": self.rate, "rate_low": low, "rate_high": high}


@dataclass(frozen=True)
class Mean:
    """A mean over seeds.

    Attributes:
        value: the mean.
        half: half of its 95% interval, by Student's t distribution; None with a single seed.
    """

    value: float
    half: float | None

    @property
    def interval(self) -> tuple[float, float]:
        """Both ends; not numbers with a single seed."""
        half = math.nan if self.half is None else self.half
        return self.value - half, self.value + half


def mean(values: Sequence[float]) -> Mean:
    """The mean of some values, and how far it may be off, if they are drawn from a normal distribution."""
    from scipy import stats

    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values) if len(values) > 1 else None
    return Mean(fmean(values), None if half is None else float(half))


def kept(rate: float, segments: int) -> float:
    """The share of memories that are left after so many segments, if each of them costs the same `rate`."""
    return math.exp(-rate * segments)
