"""What the views call things, and the cells of the tables that all of them show."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from benchmarks.zoo.carry import ROWS
from benchmarks.zoo.fit import Fit
from benchmarks.zoo.policies import PolicyLine
from benchmarks.zoo.rules import CHECK_GRID, POLICY_GRID
from benchmarks.zoo.settings import DENOISER_SIBLINGS, LM_SIBLINGS
from benchmarks.zoo.stats import Regret

TITLES = {"lm": "A tiny language model", "denoiser": "A tiny denoiser"}
SCORES = {
    "lm": "Exact match on lines of the new tasks that nothing was trained on",
    "denoiser": "Share of generated digits that a classifier takes for the digit asked for, in the style asked for",
}
SPACES = {"lora": "LoRA", "input": "input adapters", "output": "output adapters"}
SIBLINGS = {"lm": LM_SIBLINGS, "denoiser": DENOISER_SIBLINGS}
POLICY_COLUMNS = (
    "mean score",
    "mean regret",
    "worst",
    "held out: mean",
    "worst",
    "seeds averaged: mean",
    "worst",
    "hurts",
    "below bare",
)
FIT_COLUMNS = ("thresholds", "tried", "fitted half: mean", "worst", "held out: mean", "worst", "below bare")


def row_heading(row: str) -> str:
    return ROWS[row].heading if row in ROWS else row


def sibling_heading(part: str, sibling: str) -> str:
    return SIBLINGS[part].get(sibling, (sibling, ""))[0]


def policy_cells(line: PolicyLine) -> list[str]:
    """As POLICY_COLUMNS. `hurts`: cells in which the policy is more than half a point below the bare target."""
    everywhere = line.everywhere
    return [
        f"{everywhere.mean_score:.1f}",
        f"{everywhere.mean:.2f}",
        f"{everywhere.worst:.1f}",
        *_both(line.held_out),
        f"{line.over_seeds[0]:.2f}",
        f"{line.over_seeds[1]:.1f}",
        f"{everywhere.hurts} of {everywhere.cells}",
        f"{everywhere.below_bare:.1f}",
    ]


def fit_cells(one: Fit[Any]) -> list[str]:
    """As FIT_COLUMNS."""
    varied = {**CHECK_GRID, **POLICY_GRID}
    chosen = ", ".join(f"{name} {value:g}" for name, value in asdict(one.thresholds).items() if name in varied)
    below = "" if one.held_out is None else f"{one.held_out.below_bare:.1f}"
    return [chosen, str(one.tried), *_both(one.fitted), *_both(one.held_out), below]


def _both(found: Regret | None) -> list[str]:
    return ["", ""] if found is None else [f"{found.mean:.2f}", f"{found.worst:.1f}"]
