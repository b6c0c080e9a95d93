"""What holds and what does not of what is asked of auto and of verify."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.zoo.policies import ALLOWED, PolicyLine
from benchmarks.zoo.results import Results

MEAN_REGRET, WORST_REGRET, BELOW_BARE, RANK = 1.0, 5.0, 0.5, 0.8  # what is asked, in points but the last


def sentences(
    results: Results,
    policies: Mapping[str, Sequence[PolicyLine]],
    ranks: Mapping[str, Mapping[str, float]],
    points: Mapping[str, int],
) -> list[str]:
    """In words. `points`: how many carried adapters each rank correlation is over."""
    if results["preset"] == "short":
        return ["A short run: a few steps of everything, to see that it runs. Its scores mean nothing."]
    said = []
    done = results["cells"]
    if done["finished"] < done["planned"]:
        said.append(f"Incomplete: {done['finished']} of {done['planned']} cells are finished.")
    for part, lines in policies.items():
        named = {line.name: line for line in lines}
        for name in ("auto", ALLOWED):
            if name in named:
                said += _asked(part, named[name], named["copy if shapes fit"])
        if "auto" not in named:
            said.append(f"{part}: auto has not been run.")
    for part, found in ranks.items():
        if found:
            verdict = "holds" if found["trust"] >= RANK else "does not hold"
            said.append(
                f"{part}: verify's score ranks {points[part]} carried adapters as their scores do with Spearman's ρ = {found['trust']:.2f}; "
                f"at least {RANK} is asked: {verdict}."
            )
    return said


def _asked(part: str, line: PolicyLine, copy: PolicyLine) -> list[str]:
    """The line against what is asked of it."""
    held_out = line.held_out
    shown = [("over all cells", line.everywhere)] + ([("on the half held out", held_out)] if held_out else [])
    said = []
    for where, found in shown:
        parts = [
            _holds(f"mean regret {found.mean:.2f} (asked: at most {MEAN_REGRET:g})", found.mean <= MEAN_REGRET),
            _holds(f"worst cell {found.worst:.1f} (at most {WORST_REGRET:g})", found.worst <= WORST_REGRET),
            _holds(
                f"below bare by {found.below_bare:.1f} at most (asked: {BELOW_BARE:g})", found.below_bare <= BELOW_BARE
            ),
        ]
        said.append(f"{part}, {line.name}, {where} ({found.cells} cells), points: {'; '.join(parts)}.")
    if not line.trained:
        said.append(
            f"{part}: a plain copy wherever the shapes fit has a mean regret of {copy.everywhere.mean:.2f} and a worst of "
            f"{copy.everywhere.worst:.1f}. With the seeds averaged first, {line.name} has {line.over_seeds[0]:.2f} and "
            f"{line.over_seeds[1]:.1f}."
        )
    return said


def _holds(text: str, holds: bool) -> str:
    return f"{text}: {'holds' if holds else 'does not hold'}"
