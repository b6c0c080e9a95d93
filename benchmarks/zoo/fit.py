"""Thresholds fitted on one half of the zoo, from stored cells: no model is opened.

A rule looks at an example with some thresholds and names a row. `fit` takes the thresholds with the least mean regret:

    fit(examples, by_check, grid(Thresholds(), clearly=(2.0, 3.0, 5.0), drifted=(0.2, 0.3, 0.5)))
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Generic, TypeVar

from benchmarks.zoo.settings import Halves
from benchmarks.zoo.stats import Example, Regret, regret

T = TypeVar("T")
Rule = Callable[[Example, T], str]


@dataclass(frozen=True)
class Fit(Generic[T]):
    """The thresholds chosen, and the rule's regret with them on both halves."""

    thresholds: T
    fitted: Regret
    held_out: Regret | None  # None where no cell of that half is finished
    tried: int


def grid(start: T, **values: Sequence[Any]) -> list[T]:
    """`start`, a dataclass, with every combination of these values of its fields; `start` itself comes first."""
    made = [
        replace(start, **dict(zip(values, chosen, strict=True)))  # type: ignore[type-var]  # T is a dataclass
        for chosen in product(*values.values())
    ]
    return [start, *(one for one in made if one != start)]


def fit(
    examples: Iterable[Example], rule: Rule[T], candidates: Iterable[T], halves: Halves, *, trained: bool = False
) -> Fit[T]:
    """The candidate with the least mean regret on the half that is fitted on; of equals that with the least worst, then the first.

    Raises:
        ValueError: there is no candidate, or no example in that half.
    """
    all_of_them = list(examples)
    ours = [one for one in all_of_them if halves.fitted(one.part, one.sibling, one.task)]
    theirs = [one for one in all_of_them if halves.held_out(one.part, one.sibling, one.task)]
    tried = [(one, regret(ours, _bind(rule, one), trained=trained)) for one in candidates]
    if not tried:
        raise ValueError("No candidate to choose from: give grid(Thresholds(), field=(values…)).")
    best, found = min(tried, key=lambda pair: (round(pair[1].mean, 9), round(pair[1].worst, 9)))
    held_out = regret(theirs, _bind(rule, best), trained=trained) if theirs else None
    return Fit(best, found, held_out, len(tried))


def _bind(rule: Rule[T], thresholds: T) -> Callable[[Example], str]:
    return lambda example: rule(example, thresholds)
