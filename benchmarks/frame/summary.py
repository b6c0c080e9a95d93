"""Means over seeds, and paired differences with an interval."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

Unit = TypeVar("Unit")
RESAMPLES = 10_000


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation of one value per seed."""

    mean: float
    std: float | None  # None of one value
    count: int

    def text(self, digits: int = 2) -> str:
        return f"{self.mean:.{digits}f}" + (f" ± {self.std:.{digits}f}" if self.std is not None else "")


@dataclass(frozen=True)
class Difference:
    """Mean of a − b over pairs, with a bootstrap interval."""

    mean: float
    low: float | None  # None of one pair, or one group of them
    high: float | None
    count: int

    def text(self, digits: int = 2) -> str:
        interval = "" if self.low is None else f" [{self.low:+.{digits}f}, {self.high:+.{digits}f}]"
        return f"{self.mean:+.{digits}f}{interval}"


def spread(values: Sequence[float]) -> Spread:
    """Raises ValueError where there is none."""
    if not values:
        raise ValueError("the mean of no values was asked for.")
    return Spread(float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None, len(values))


def paired(
    a: Mapping[Unit, float],
    b: Mapping[Unit, float],
    *,
    group: Callable[[Unit], Hashable] = lambda unit: unit,
    level: float = 0.95,
    seed: int = 0,
) -> Difference | None:
    """a − b over the units (seeds, or seed and subject, or seed and question) that both have; None if they share none.

    The interval is the percentile bootstrap (Efron and Tibshirani 1993, ch. 13), seeded, over the groups that `group` puts the
    units into: one question's answers under three seeds are not three independent ones, so they are drawn together. With
    three groups there are ten different resamples, so the ends are then the smallest and the largest difference: read it as
    a range.
    """
    shared = [unit for unit in a if unit in b]
    if not shared:
        return None
    mean = float(np.mean([a[unit] - b[unit] for unit in shared]))
    groups: dict[Hashable, list[float]] = {}
    for unit in shared:
        groups.setdefault(group(unit), []).append(a[unit] - b[unit])
    if len(groups) == 1:
        return Difference(mean, None, None, len(shared))
    sums, counts = (np.array([measure(each) for each in groups.values()]) for measure in (sum, len))
    draws = np.random.default_rng(seed).integers(0, len(groups), size=(RESAMPLES, len(groups)))
    means = sums[draws].sum(axis=1) / counts[draws].sum(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Difference(mean, float(low), float(high), len(shared))
