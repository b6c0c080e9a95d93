"""What the cells say: regret of a choice among methods, and how well one ranking follows another. Pure functions of numbers.

Scores are shares, 0 to 1; regrets are points, 0 to 100.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean

BARE = "bare"


@dataclass(frozen=True, kw_only=True)
class Example:
    """One adapter on one sibling, and what each way of carrying it gave there."""

    part: str
    seed: int
    sibling: str
    task: str
    space: str
    scores: Mapping[str, float]  # by row, bare among them; a row whose method refused is not
    left_out: Mapping[str, int] = field(default_factory=dict)  # by row, layers that were not carried
    free: frozenset[str] = frozenset()  # the rows that train nothing, without bare and those that choose among others
    trained: frozenset[str] = frozenset()  # the rows that train, without those that choose
    ran: frozenset[str] = frozenset()  # the rows that were run, those that refused included
    trust: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # by row, what was measured without labels
    layers: Sequence[Mapping[str, object]] = ()  # what check measured
    home: float = 1.0  # the adapter's score on the source

    @property
    def bare(self) -> float:
        return self.scores[BARE]

    def score(self, row: str) -> float:
        """Of the target with the adapter carried by that row; of the bare target where the method refused."""
        return self.scores.get(row, self.bare)

    def best(self, *, trained: bool = False) -> float:
        """The best in hindsight, and leaving the target bare counts as a choice; with `trained`, rows that train do too."""
        return max(self.score(row) for row in self.choices(trained))

    def choices(self, trained: bool) -> frozenset[str]:
        """What there is to choose from, with training or without."""
        return self.free | {BARE} | (self.trained if trained else frozenset())


Policy = Callable[[Example], str]
"""From what is known without labels to the row that is taken."""


@dataclass(frozen=True)
class Regret:
    """A policy over many examples. All in points."""

    cells: int
    mean: float
    worst: float
    worst_cell: tuple[str, ...]
    below_bare: float  # how far it falls below the bare target at most
    hurts: int  # cells in which it falls by more than half a point
    mean_score: float


def always(row: str) -> Policy:
    """The same row everywhere."""
    return lambda example: row


def copy_if_it_fits(example: Example) -> str:
    """What people do today: take the adapter as it is if all of it can be loaded."""
    return "copy" if "copy" in example.scores and not example.left_out.get("copy") else BARE


def regret(examples: Iterable[Example], policy: Policy, *, trained: bool = False) -> Regret:
    """Of a policy against the best choice in hindsight, cell by cell.

    Raises:
        ValueError: there is no example.
    """
    found = [(example, example.score(policy(example))) for example in examples]
    if not found:
        raise ValueError("No cell to take a regret over: none is finished, or none is in this half.")
    regrets = [100 * (example.best(trained=trained) - score) for example, score in found]
    losses = [100 * (example.bare - score) for example, score in found]
    worst = max(range(len(found)), key=lambda index: regrets[index])
    example = found[worst][0]
    return Regret(
        cells=len(found),
        mean=mean(regrets),
        worst=regrets[worst],
        worst_cell=(example.part, f"seed {example.seed}", example.sibling, example.task, example.space),
        below_bare=max(0.0, max(losses)),
        hurts=sum(loss > 0.5 for loss in losses),
        mean_score=100 * mean(score for _, score in found),
    )


def over_seeds(examples: Iterable[Example], policy: Policy, *, trained: bool = False) -> list[float]:
    """Regret per cell with the scores of its seeds averaged first: the best row is then the best on average."""
    groups: dict[Hashable, list[Example]] = defaultdict(list)
    for example in examples:
        groups[example.part, example.sibling, example.task, example.space].append(example)
    regrets = []
    for group in groups.values():
        rows = frozenset[str]().union(*(example.choices(trained) for example in group))
        best = max(mean(example.score(row) for example in group) for row in rows)
        regrets.append(100 * (best - mean(example.score(policy(example)) for example in group)))
    return regrets


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """Rank correlation, ties at their mean rank; 0 where one of the two is constant.

    Raises:
        ValueError: they differ in length or have fewer than two entries.
    """
    if len(one) != len(other) or len(one) < 2:
        raise ValueError(
            f"Spearman's correlation is of two lists of one length from 2 on, not of {len(one)} and {len(other)}."
        )
    a, b = ranks(one), ranks(other)
    middle = (len(one) + 1) / 2
    product = sum((x - middle) * (y - middle) for x, y in zip(a, b, strict=True))
    size = (sum((x - middle) ** 2 for x in a) * sum((y - middle) ** 2 for y in b)) ** 0.5
    return product / size if size else 0.0


def ranks(values: Sequence[float]) -> list[float]:
    """From 1 on; equal values share the mean of their ranks."""
    order = sorted(range(len(values)), key=lambda index: values[index])
    found = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end < len(order) and values[order[end]] == values[order[start]]:
            end += 1
        for index in order[start:end]:
            found[index] = (start + 1 + end) / 2
        start = end
    return found


def retention(score: float, home: float) -> float:
    """What is left on the target of the score that the adapter has on the source, 0 to 1; 0 if it had none."""
    return min(1.0, score / home) if home > 0 else 0.0
