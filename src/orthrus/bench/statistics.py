"""Medians with their spread, and geometric means with an interval over prompts."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
from numpy.typing import NDArray

NUM_DRAWS = 10_000
_PERCENTILES = (2.5, 97.5)
# Numbers drawn at a time: bounds the memory of large sets.
_CHUNK = 4_000_000


@dataclass(frozen=True, slots=True)
class Spread:
    """A median with the smallest and the largest value."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        listed = list(values)
        return cls(median(listed), min(listed), max(listed)) if listed else cls(0.0, 0.0, 0.0)

    @property
    def value(self) -> float:
        return self.median


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its 95 % interval over prompts; None where one prompt says nothing of the others."""

    value: float
    low: float | None
    high: float | None

    @classmethod
    def geometric_mean(cls, groups: Sequence[Sequence[float]]) -> "Interval":
        """Of groups of ratios, one a prompt: geometric mean within a group, then over groups.

        The interval holds 95 % of bootstrap draws (10,000, seed 0), which take prompts anew within each group.
        There is none where a group has a single prompt.
        """
        if not (logs := _logs(groups)):
            return cls(0.0, None, None)
        if min(map(len, logs)) < 2:
            return cls(geometric_mean(groups), None, None)
        rng = np.random.default_rng(0)
        means = np.mean([_drawn_means(rng, values) for values in logs], axis=0)
        low, high = np.exp(np.percentile(means, _PERCENTILES))
        return cls(geometric_mean(groups), float(low), float(high))


def geometric_mean(groups: Sequence[Sequence[float]]) -> float:
    """Of groups of ratios: geometric mean within a group, then over groups; 0 where there are no ratios."""
    logs = _logs(groups)
    return float(np.exp(np.mean([values.mean() for values in logs]))) if logs else 0.0


def _logs(groups: Sequence[Sequence[float]]) -> list[NDArray[np.float64]]:
    return [np.log(np.asarray(group, dtype=np.float64)) for group in groups if len(group)]


def _drawn_means(rng: np.random.Generator, values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Means of NUM_DRAWS samples of the values, as many as there are, with replacement."""
    at_once = max(1, _CHUNK // len(values))
    parts = [
        rng.choice(values, (min(at_once, NUM_DRAWS - first), len(values))).mean(axis=1)
        for first in range(0, NUM_DRAWS, at_once)
    ]
    return np.concatenate(parts)
