"""Counts, and the intervals that they leave."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Proportion:
    """Right answers among all.

    Attributes:
        right: right answers.
        samples: answers in all, at least 1.
    """

    right: int
    samples: int

    @property
    def accuracy(self) -> float:
        return self.right / self.samples

    @property
    def interval(self) -> tuple[float, float]:
        """95% Wilson score interval of the accuracy (Wilson 1927)."""
        z, n, p = 1.959964, self.samples, self.accuracy
        centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
        half = z * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5 / (1 + z**2 / n)
        # Rounding must not leave the accuracy outside of its interval.
        return max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half))

    def row(self) -> dict[str, float]:
        """The columns of a csv file."""
        low, high = self.interval
        return {"right": self.right, "samples": self.samples, "accuracy": self.accuracy, "low": low, "high": high}


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
        """95% interval of the rate: Byar's approximation to the Poisson interval (Breslow and Day 1987, p. 69)."""
        if not self.exposure:
            return math.nan, math.nan
        z, n = 1.959964, self.lost
        low = n * (1 - 1 / (9 * n) - z / (3 * n**0.5)) ** 3 if n else 0.0
        high = (n + 1) * (1 - 1 / (9 * (n + 1)) + z / (3 * (n + 1) ** 0.5)) ** 3
        return low / self.exposure, high / self.exposure

    def row(self) -> dict[str, float]:
        """The columns of a csv file."""
        low, high = self.interval
        return {"lost": self.lost, "exposure": self.exposure, "rate": self.rate, "rate_low": low, "rate_high": high}
