"""From rows to tables: mean and spread per cell, which training-free cell is best in its row, and what that says in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import mean, stdev
from typing import Any

COLUMNS = {  # adapter -> heading, in the order of the table
    "bare": "bare",
    "copy": "LoRA copy",
    "input": "input",
    "output": "output",
    "tied": "tied input",
    "choice": "by layer",
    "retrained": "retrained",
}
REAL = "real"  # pictures of what the concept looks like, which no adapter has drawn
TRAINING_FREE = ("copy", "input", "output", "tied", "choice")
ONE_SPACE = ("input", "output", "tied")
FEATURE = (*ONE_SPACE, "choice")


@dataclass(frozen=True, kw_only=True)
class Part:
    """One table of the benchmark: which rows belong to it and how to read its score."""

    name: str  # the "part" of its rows
    title: str
    score: str  # what the number is
    higher_is_better: bool = True
    digits: int = 2
    margin: float = 0.05  # differences below this are called equal, whatever the spread
    headings: dict[str, str] = field(default_factory=dict)  # sibling -> heading of its row
    note: str = ""  # what a reader has to know before the table

    def heading(self, sibling: str) -> str:
        return self.headings.get(sibling, sibling)


def is_source(sibling: str) -> bool:
    """A check of what a result rests on brings rows of its own: "held out: source"."""
    return sibling.rpartition(": ")[2] == "source"


@dataclass(frozen=True)
class Cell:
    """One entry: mean and sample standard deviation over the seeds (None for a single one)."""

    mean: float
    std: float | None
    values: tuple[float, ...]
    best: bool = False

    def text(self, digits: int) -> str:
        spread = "" if self.std is None else f" ± {self.std:.{digits}f}"
        return f"{self.mean:.{digits}f}{spread}"


@dataclass(frozen=True)
class Table:
    """The table of one part; `rows` maps sibling -> adapter -> cell, both in the order of the results."""

    part: Part
    columns: tuple[str, ...]
    rows: dict[str, dict[str, Cell]]
    seeds: tuple[int, ...]


def table(part: Part, rows: Sequence[dict[str, Any]]) -> Table:
    """The table of `part`, from rows with the keys part, seed, adapter, sibling and score."""
    mine = [row for row in rows if row["part"] == part.name and row["score"] is not None]
    adapters = {row["adapter"] for row in mine}
    columns = [name for name in COLUMNS if name in adapters]
    columns += sorted(adapters - set(COLUMNS))
    cells: dict[str, dict[str, Cell]] = {}
    for sibling in dict.fromkeys(row["sibling"] for row in mine):
        found = {}
        for adapter in columns:
            values = tuple(row["score"] for row in mine if (row["sibling"], row["adapter"]) == (sibling, adapter))
            if values:
                found[adapter] = Cell(mean(values), stdev(values) if len(values) > 1 else None, values)
        cells[sibling] = found if is_source(sibling) else _with_best(found, part)
    return Table(part, tuple(columns), cells, tuple(sorted({row["seed"] for row in mine})))


def ahead(a: Cell, b: Cell, part: Part) -> bool:
    """Whether `a` is better than `b` by more than the margin and more than the spread of either."""
    gain = a.mean - b.mean if part.higher_is_better else b.mean - a.mean
    return gain > max(part.margin, a.std or 0.0, b.std or 0.0)


def verdict(summary: Table, sibling: str) -> str:
    """What a row says of feature space against the copied LoRA: "feature", "copy", "even" (neither is `ahead`), or "nothing".

    Nothing: no adapter gets half-way from bare to what is possible there, which is what retraining reaches or, without it, what the
    adapters reach on the source.
    """
    part, cells = summary.part, summary.rows[sibling]
    possible = _possible(summary, sibling)
    if "bare" in cells and possible is not None:
        sign = 1.0 if part.higher_is_better else -1.0
        bare, best = cells["bare"].mean, cells[best_of(cells, TRAINING_FREE, part)].mean
        if sign * (best - bare) < 0.5 * sign * (possible - bare):
            return "nothing"
    if ahead(cells[best_of(cells, FEATURE, part)], cells["copy"], part):
        return "feature"
    return "copy" if ahead(cells["copy"], cells[best_of(cells, ONE_SPACE, part)], part) else "even"


def findings(summary: Table) -> list[str]:
    """The table in sentences, the ones that speak against adapting in feature space included."""
    part = summary.part
    groups: dict[str, list[str]] = {"feature": [], "copy": [], "even": [], "nothing": []}
    chosen: list[bool] = []
    for sibling, cells in summary.rows.items():
        if is_source(sibling) or "copy" not in cells or not any(name in cells for name in ONE_SPACE):
            continue
        says = verdict(summary, sibling)
        feature = best_of(cells, FEATURE if says == "feature" else ONE_SPACE, part)
        scores = f"{COLUMNS[feature]} {cells[feature].mean:.{part.digits}f}, copy {cells['copy'].mean:.{part.digits}f}"
        groups[says].append(f"{part.heading(sibling)} ({scores})")
        if "choice" in cells and says != "nothing":
            others = [cells[name] for name in TRAINING_FREE if name in cells]
            chosen.append(not any(ahead(other, cells["choice"], part) for other in others))
    heads = {
        "feature": "Feature space is ahead of the copied LoRA on",
        "copy": "The copied LoRA is ahead on",
        "even": f"Level, within {part.margin:g} or the spread over seeds, on",
        "nothing": "No adapter gets half-way on",
    }
    sentences = [f"{heads[key]}: {'; '.join(found)}." for key, found in groups.items() if found]
    if chosen:
        sentences.append(
            f"Choosing the space layer by layer is best, or level with the best, in {sum(chosen)} of the {len(chosen)} rows in "
            "which any adapter gets half-way."
        )
    return sentences


def best_of(cells: dict[str, Cell], names: Sequence[str], part: Part) -> str:
    """Which of the adapters that the row has is best; the first of equals."""
    sign = 1.0 if part.higher_is_better else -1.0
    return max((name for name in names if name in cells), key=lambda name: sign * cells[name].mean)


def _possible(summary: Table, sibling: str) -> float | None:
    cells = summary.rows[sibling]
    if "retrained" in cells:
        return cells["retrained"].mean
    source = summary.rows.get(sibling.rpartition(": ")[0] + ": source" if ": " in sibling else "source", {})
    reached = [source[name].mean for name in TRAINING_FREE if name in source]
    if not reached:
        return None
    return max(reached) if summary.part.higher_is_better else min(reached)


def _best_feature(cells: dict[str, Cell], part: Part) -> str:
    sign = 1.0 if part.higher_is_better else -1.0
    return max((name for name in FEATURE if name in cells), key=lambda name: sign * cells[name].mean)


def _with_best(cells: dict[str, Cell], part: Part) -> dict[str, Cell]:
    """Mark the best training-free cells: all that print alike, and none where even the best is no better than the bare target."""
    sign = 1.0 if part.higher_is_better else -1.0
    free = {key: sign * round(cells[key].mean, part.digits) for key in TRAINING_FREE if key in cells}
    best = max(free.values(), default=-math.inf)
    if "bare" in cells and best < sign * cells["bare"].mean + part.margin:
        return cells
    return {key: replace(cell, best=free.get(key) == best) for key, cell in cells.items()}
