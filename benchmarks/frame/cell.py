"""A cell: one training or one evaluation, named by the hash of its settings."""

from __future__ import annotations

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from benchmarks.frame.worker import Worker

Result = dict[str, Any]
"""What a cell found, JSON-able. Its "rows", if it has any, become the rows of the tables."""


HOW = {"identity": False}
"""Metadata of a field that says how a cell is computed, not what: batch of an evaluation, processes. It is no part of the name."""


def how(default: Any) -> Any:
    """A field with HOW and a default."""
    return field(default=default, metadata=HOW)


@dataclass(frozen=True)
class Estimate:
    """What a cell will take. `benchmarks/README.md` says how the hours of the presets were arrived at."""

    hours: float = 0.0
    megabytes: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Cell(ABC):
    """Subclass as a frozen dataclass at module level: engines send cells to other processes.

    A field may be a cell itself: an evaluation holds the training whose adapter it evaluates, so that its name covers
    the training's settings. Equal settings mean the same cell, in whichever table or run it appears.
    """

    packages: ClassVar[tuple[str, ...]] = ()
    """Distributions whose versions a result holds beside those of `benchmarks/provenance.py`."""

    @abstractmethod
    def run(self, worker: Worker) -> Result:
        """Do the work. Files to keep go to `worker.out`. Runs in `processes` processes at once if there are several."""

    def needs(self) -> tuple[Cell, ...]:
        """Cells that must be finished before; here the cells among the fields."""
        values = (getattr(self, each.name) for each in fields(self))
        return tuple(value for value in values if isinstance(value, Cell))

    def estimate(self) -> Estimate:
        return Estimate()

    def base(self) -> str:
        """What the worker keeps loaded for this cell. Cells of one base run after one another."""
        return ""

    def describe(self) -> str:
        """One line for `--plan`."""
        return ""

    def process_count(self) -> int:
        """How many processes work on this cell together, through accelerate."""
        return 1

    @property
    def kind(self) -> str:
        return type(self).__name__.lower()

    @cached_property
    def name(self) -> str:
        return f"{self.kind}-{hashlib.sha256(canonical(self).encode()).hexdigest()[:16]}"


def canonical(cell: Cell) -> str:
    """The settings as the one JSON text that equal settings have."""
    return json.dumps({"kind": cell.kind, "settings": plain(cell)}, sort_keys=True, separators=(",", ":"))


def plain(value: Any, *, identity_only: bool = True) -> Any:
    """Dataclasses as dictionaries, tuples as lists: what JSON can hold.

    Raises:
        TypeError: `value` holds something that has no single form in JSON.
        ValueError: a number is not finite.
    """
    if is_dataclass(value) and not isinstance(value, type):
        chosen = (each for each in fields(value) if each.metadata.get("identity", True) or not identity_only)
        return {each.name: plain(getattr(value, each.name), identity_only=identity_only) for each in chosen}
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise TypeError(f"keys of settings are strings, not {list(value)}.")
        return {key: plain(item, identity_only=identity_only) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, identity_only=identity_only) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"settings hold {value}; give a finite number.")
    if isinstance(value, float) and value.is_integer() and identity_only:
        return int(value)  # 2 and 2.0 are one setting
    if value is None or isinstance(value, str | int | float):
        return value
    raise TypeError(
        f"settings hold {value!r} of type {type(value).__name__}; allowed are numbers, strings, None, tuples, "
        "dictionaries and dataclasses of these."
    )


def with_needs(cells: Iterable[Cell]) -> list[Cell]:
    """The cells and all that they need, each once, what is needed first."""
    found: dict[str, Cell] = {}

    def add(cell: Cell) -> None:
        for needed in cell.needs():
            add(needed)
        found.setdefault(cell.name, cell)

    for cell in cells:
        add(cell)
    return list(found.values())


def levels(cells: Iterable[Cell]) -> list[list[Cell]]:
    """The cells and all that they need, in groups of cells that can run at once; within a group one base after another."""
    ordered = with_needs(cells)
    depth: dict[str, int] = {}
    for cell in ordered:
        depth[cell.name] = 1 + max((depth[needed.name] for needed in cell.needs()), default=-1)
    groups: Sequence[list[Cell]] = [[] for _ in range(max(depth.values(), default=-1) + 1)]
    for cell in ordered:
        groups[depth[cell.name]].append(cell)
    return [sorted(group, key=lambda cell: cell.base()) for group in groups]
