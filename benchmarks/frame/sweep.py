"""All cells of a preset, stage after stage: what is finished is kept, what fails is recorded and does not stop the rest."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

from benchmarks.frame.cell import Cell, Estimate, Result, levels
from benchmarks.frame.engines import Engine
from benchmarks.frame.progress import Board
from benchmarks.frame.store import Store, versions
from benchmarks.frame.worker import Outcome

C = TypeVar("C", bound=Cell)
POLL = 5.0
"""Seconds between two looks at a cell that another run is working on."""


class Finished:
    """The results that a stage may look at to make its cells."""

    def __init__(self, store: Store, *, planning: bool = False) -> None:
        self.store, self.planning = store, planning

    def result(self, cell: Cell) -> Result | None:
        return self.store.result(cell)

    def best(self, candidates: Sequence[C], score: Callable[[Result], float]) -> C | None:
        """The finished candidate with the lowest score; None if all have failed, and then what hangs on it cannot be made.

        In a plan, where nothing has run yet, the first stands for it.
        """
        found = [(score(result), index) for index, cell in enumerate(candidates) if (result := self.result(cell))]
        if not found:
            return candidates[0] if self.planning else None
        return candidates[min(found)[1]]


Stages: TypeAlias = Callable[[Any, Finished], Iterator[Sequence[Cell]]]
"""(settings, finished) -> groups of cells. A generator: what comes after a `yield` may look at the results of what was
yielded. What the cells need is run before them and need not be yielded."""


@dataclass(frozen=True)
class Plan:
    """What would run."""

    cells: tuple[Cell, ...]
    kept: int

    def estimate(self, of: Iterable[Cell] | None = None) -> Estimate:
        each = [cell.estimate() for cell in (self.cells if of is None else of)]
        return Estimate(sum(one.hours for one in each), sum(one.megabytes for one in each))


@dataclass
class Summary:
    """What became of the cells of a run."""

    outcomes: dict[str, Outcome] = field(default_factory=dict)

    def names(self, *states: str) -> list[str]:
        return [name for name, outcome in self.outcomes.items() if outcome.state in states]


def plan(stages: Stages, settings: Any, store: Store) -> Plan:
    """All cells, those of later stages as far as they can be known."""
    cells: dict[str, Cell] = {}
    for stage in stages(settings, Finished(store, planning=True)):
        for cell in (cell for level in levels(stage) for cell in level):
            cells.setdefault(cell.name, cell)
    return Plan(tuple(cells.values()), sum(map(store.is_finished, cells.values())))


def sweep(stages: Stages, settings: Any, store: Store, engine: Engine, board: Board) -> Summary:
    """Run everything. Failed cells of earlier runs are tried again.

    Raises:
        DiskFull: after the cells that were finished before it.
    """
    summary = Summary()
    try:
        with board.run(plan(stages, settings, store)):
            for stage in stages(settings, Finished(store)):
                for level in levels(stage):
                    fresh = [cell for cell in level if cell.name not in summary.outcomes]
                    for outcome in _level(fresh, engine):
                        summary.outcomes[outcome.name] = outcome
                        board.ended(outcome, store)
    finally:
        engine.close()
    return summary


def _level(cells: Sequence[Cell], engine: Engine) -> Iterator[Outcome]:
    """One outcome per cell; what another run has at the moment is waited for, and done here if that run dies."""
    by_name = {cell.name: cell for cell in cells}
    while by_name:
        busy: list[Cell] = []
        for outcome in engine.run(list(by_name.values())):
            if outcome.state == "busy":
                busy.append(by_name[outcome.name])
            else:
                yield outcome
        by_name = {cell.name: cell for cell in busy}
        if busy:
            time.sleep(POLL)


def version_mix(records: Iterable[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Packages that were not the same for all records: package -> version -> how many results have it."""
    counts: dict[str, Counter[str]] = {}
    for record in records:
        for package, number in record["versions"].items():
            counts.setdefault(package, Counter())[str(number)] += 1
    return {package: dict(numbers) for package, numbers in counts.items() if len(numbers) > 1}


def changed_versions(plan: Plan, store: Store) -> dict[str, dict[str, int]]:
    """As `version_mix`, of the finished cells of a plan together with what they would be made with now."""
    finished = {cell.kind: cell for cell in plan.cells if store.is_finished(cell)}
    records = [record for cell in plan.cells if (record := store.record(cell))]
    return version_mix([*records, *({"versions": versions(cell)} for cell in finished.values())])
