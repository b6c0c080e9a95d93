"""The policies that the zoo asks about, and their regret over all cells and over those held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

from benchmarks.zoo.carry import BARE, CHOOSERS, ROWS
from benchmarks.zoo.settings import Halves
from benchmarks.zoo.stats import Example, Policy, Regret, always, copy_if_it_fits, over_seeds, regret

ALLOWED = "auto, training allowed"


@dataclass(frozen=True)
class PolicyLine:
    """A policy's regret over all cells and over those held out. `over_seeds`: mean and worst with the seeds averaged first."""

    name: str
    everywhere: Regret
    held_out: Regret | None
    over_seeds: tuple[float, float]
    trained: bool = False


def policies_of(examples: Sequence[Example]) -> dict[str, tuple[Policy, str]]:
    """Every policy that the cells can be asked about, with the row that must have been run for it, if any."""
    rows = dict.fromkeys(row for example in examples for row in example.ran)
    named = {BARE: (always(BARE), ""), "copy if shapes fit": (copy_if_it_fits, "copy")}
    free = [name for name, row in ROWS.items() if not row.trains and name not in CHOOSERS]
    named |= {f"always {row}": (always(row), row) for row in free if row in rows}
    if "auto" in rows:
        named["auto"] = (always("auto"), "auto")
    return named


def lines_of(examples: Sequence[Example], halves: Halves) -> list[PolicyLine]:
    """A line per policy."""
    lines = []
    for name, (policy, row) in policies_of(examples).items():
        where = [example for example in examples if not row or row in example.ran]
        lines.append(_line(name, where, policy, halves))
    for name, row in (("always distil, training allowed", "distil"), (ALLOWED, "auto_train")):
        if where := [example for example in examples if row in example.ran]:
            lines.append(_line(name, where, always(row), halves, trained=True))
    return lines


def _line(
    name: str, examples: Sequence[Example], policy: Policy, halves: Halves, *, trained: bool = False
) -> PolicyLine:
    held_out = [one for one in examples if halves.held_out(one.part, one.sibling, one.task)]
    averaged = over_seeds(examples, policy, trained=trained)
    return PolicyLine(
        name,
        regret(examples, policy, trained=trained),
        regret(held_out, policy, trained=trained) if held_out else None,
        (mean(averaged), max(averaged)),
        trained,
    )
