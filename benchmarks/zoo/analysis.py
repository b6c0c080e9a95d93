"""From the records to tables, policies, fitted thresholds and sentences: what every view of the results shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from benchmarks.zoo.carry import BARE, CHOOSERS, RETRAINED
from benchmarks.zoo.fit import Fit, fit, grid
from benchmarks.zoo.policies import PolicyLine, lines_of
from benchmarks.zoo.results import Results, examples_of, records_of
from benchmarks.zoo.rules import CHECK_GRID, POLICY_GRID, Limits, by_check, by_trust
from benchmarks.zoo.sentences import sentences
from benchmarks.zoo.settings import Halves
from benchmarks.zoo.stats import Example, retention, spearman

MEAN_REGRET, WORST_REGRET, BELOW_BARE, RANK = (
    1.0,
    5.0,
    0.5,
    0.8,
)  # what is asked of `auto` and of verify, in points but the last
MEASURES = {"trust": "verify's score", "direction": "direction", "same": "same next word"}


@dataclass(frozen=True)
class Entry:
    """Mean over tasks and seeds, the spread of the seeds' means, and how many scores."""

    mean: float
    std: float | None
    count: int
    refused: int = 0  # of them, refusals, which count as the bare target

    def text(self) -> str:
        spread = "" if self.std is None else f" ± {self.std:.2f}"
        return f"{self.mean:.2f}{spread}" + ("*" if self.refused == self.count else "")


@dataclass(frozen=True)
class Grid:
    """Scores of one part and one space of adapters: by sibling, then by row."""

    part: str
    space: str
    columns: tuple[str, ...]
    rows: Mapping[str, Mapping[str, Entry]]


@dataclass(frozen=True)
class TrustPoint:
    """One carried adapter: what verify says without labels, and what is left of its score."""

    part: str
    row: str
    sibling: str
    trust: Mapping[str, float]
    retention: float


@dataclass(frozen=True)
class Analysis:
    """Everything that the views show."""

    grids: Sequence[Grid]
    policies: Mapping[str, Sequence[PolicyLine]]  # by part
    fits: Mapping[str, Mapping[str, Fit[Any]]]  # by part, by rule
    points: Sequence[TrustPoint]
    ranks: Mapping[str, Mapping[str, float]]  # by part and "all", by measure
    kept: Mapping[str, Mapping[str, Entry]]  # by part, by row: old tasks with the adapter on
    sentences: Sequence[str]


def analyse(results: Results) -> Analysis:
    """The whole of it. Parts without finished cells are left out."""
    records, examples = records_of(results), examples_of(results)
    halves = Halves(**{name: tuple(value) for name, value in results["settings"]["halves"].items()})
    parts = [part for part in ("lm", "denoiser") if any(example.part == part for example in examples)]
    grids = [grid for part in parts for grid in _grids(part, records, results["rows"])]
    policies = {part: lines_of([one for one in examples if one.part == part], halves) for part in parts}
    fits = {part: _fits([one for one in examples if one.part == part], halves) for part in parts}
    points = _points(examples)
    ranks = {part: _ranks([point for point in points if point.part == part]) for part in parts}
    if len(parts) > 1:
        ranks["all"] = _ranks(points)
    kept = {part: _kept(part, records, results["rows"]) for part in parts}
    counts = {part: sum(part in ("all", point.part) for point in points) for part in ranks}
    said = sentences(results, policies, ranks, counts)
    return Analysis(grids, policies, fits, points, ranks, kept, said)


def _grids(part: str, records: Sequence[Mapping[str, Any]], rows: Mapping[str, Any]) -> list[Grid]:
    mine = [record for record in records if record["part"] == part]
    bare = {_place(record): record["score"] for record in mine if record["row"] == BARE}
    spaces = dict.fromkeys(record["space"] for record in mine if record.get("space"))
    found = []
    for space in spaces:
        columns = (
            BARE,
            *(name for name in rows if any((r["row"], r.get("space")) == (name, space) for r in mine)),
            RETRAINED,
        )
        table: dict[str, dict[str, Entry]] = {}
        for sibling in dict.fromkeys(record["sibling"] for record in mine):
            entries = {}
            for column in columns:
                chosen = [
                    record
                    for record in mine
                    if (record["sibling"], record["row"]) == (sibling, column)
                    and record.get("space") in ((space,) if column in rows else ("", None))
                ]
                scored = [(r["seed"], r.get("score", bare.get(_place(r), 0.0)), "refused" in r) for r in chosen]
                if scored:
                    entries[column] = _entry(scored)
            if entries:
                table[sibling] = entries
        found.append(Grid(part, space, columns, table))
    return found


def _kept(part: str, records: Sequence[Mapping[str, Any]], rows: Mapping[str, Any]) -> dict[str, Entry]:
    found = {}
    for row in (BARE, *rows, RETRAINED):
        scored = [
            (r["seed"], r["kept"], False)
            for r in records
            if r["part"] == part and r["row"] == row and r["sibling"] != "source" and "kept" in r
        ]
        if scored:
            found[row] = _entry(scored)
    return found


def _entry(scored: Sequence[tuple[int, float, bool]]) -> Entry:
    by_seed = [
        mean(score for other, score, _ in scored if other == seed) for seed in dict.fromkeys(s for s, _, _ in scored)
    ]
    spread = stdev(by_seed) if len(by_seed) > 1 else None
    return Entry(mean(by_seed), spread, len(scored), sum(refused for _, _, refused in scored))


def _place(record: Mapping[str, Any]) -> tuple[Any, ...]:
    return record["seed"], record["sibling"], record["task"]


def _fits(examples: Sequence[Example], halves: Halves) -> dict[str, Fit[Any]]:
    if not any(halves.fitted(one.part, one.sibling, one.task) for one in examples):
        return {}
    found: dict[str, Fit[Any]] = {}
    if any(example.layers for example in examples):
        from xadapt.checking.thresholds import Thresholds

        measured = [example for example in examples if example.layers]
        found["check's verdicts"] = fit(measured, by_check, grid(Thresholds(), **CHECK_GRID), halves)
    if any(example.trust for example in examples):
        found["verify's score, as auto chooses"] = fit(examples, by_trust, grid(Limits(), **POLICY_GRID), halves)
    return found


def _points(examples: Sequence[Example]) -> list[TrustPoint]:
    return [
        TrustPoint(example.part, row, example.sibling, told, retention(example.scores[row], example.home))
        for example in examples
        for row, told in example.trust.items()
        if "trust" in told and example.home > 0 and row not in CHOOSERS
    ]


def _ranks(points: Sequence[TrustPoint]) -> dict[str, float]:
    if len(points) < 2:
        return {}
    left = [point.retention for point in points]
    return {name: spearman([point.trust[name] for point in points], left) for name in MEASURES}
