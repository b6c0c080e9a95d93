"""The results as Markdown: what holds and what does not first, then the tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.zoo.analysis import MEASURES, Analysis, analyse
from benchmarks.zoo.headings import (
    FIT_COLUMNS,
    POLICY_COLUMNS,
    SCORES,
    SIBLINGS,
    SPACES,
    TITLES,
    fit_cells,
    policy_cells,
    row_heading,
    sibling_heading,
)
from benchmarks.zoo.notes import notes, provenance_line
from benchmarks.zoo.results import Results
from benchmarks.zoo.sentences import RANK


def markdown(results: Results) -> str:
    """The whole page."""
    found = analyse(results)
    blocks = [
        "# The zoo: how far an adapter, and a choice among ways of carrying it, may be trusted",
        provenance_line(results),
    ]
    blocks += ["## What holds and what does not", _list(found.sentences)]
    blocks += ["## How it was measured", _list(notes(results))]
    for part, lines in found.policies.items():
        blocks += [
            f"## {TITLES[part]}: policies",
            "Regret in points, against the best choice in hindsight of each cell.",
        ]
        blocks.append(_table(("policy", *POLICY_COLUMNS), ([line.name, *policy_cells(line)] for line in lines)))
        if found.fits[part]:
            blocks.append(f"### {TITLES[part]}: thresholds fitted on one half of siblings and tasks")
            blocks.append(
                _table(("rule", *FIT_COLUMNS), ([name, *fit_cells(one)] for name, one in found.fits[part].items()))
            )
    blocks += ["## verify without labels against the true scores", _ranks(found)]
    for grid in found.grids:
        blocks.append(f"## {TITLES[grid.part]}: {SPACES[grid.space]}")
        blocks.append(
            f"{SCORES[grid.part]}; mean over the tasks ± deviation of the seeds. *: every call was refused, which counts as bare."
        )
        table = []
        for sibling, entries in grid.rows.items():
            table.append(
                [
                    sibling_heading(grid.part, sibling),
                    *(entries[c].text() if c in entries else "" for c in grid.columns),
                ]
            )
        blocks.append(_table(("sibling", *map(row_heading, grid.columns)), table))
    blocks += ["## What the models could do before", _kept(found)]
    blocks += ["## The siblings", *(_siblings(part) for part in found.policies)]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _ranks(found: Analysis) -> str:
    heads = ("part", *MEASURES.values())
    lines = [[part, *(f"{ranks[name]:.2f}" for name in MEASURES)] for part, ranks in found.ranks.items() if ranks]
    return f"Spearman’s ρ with what is left of the score on the source; {RANK} is asked of the first.\n\n" + _table(
        heads, lines
    )


def _kept(found: Analysis) -> str:
    text = "Mean score on the tasks, or the plain style, of pre-training with the adapter on, over all siblings and spaces."
    blocks = []
    for part, rows in found.kept.items():
        blocks.append(
            _table((part, *map(row_heading, rows)), [["old tasks", *(entry.text() for entry in rows.values())]])
        )
    return "\n\n".join([text, *blocks])


def _siblings(part: str) -> str:
    return f"{TITLES[part]}:\n\n" + _list(f"**{heading}**: {what}" for heading, what in SIBLINGS[part].values())


def _table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    return "\n".join([*rows, *("| " + " | ".join(cells) + " |" for cells in lines)])


def _list(sentences: Iterable[str]) -> str:
    return "\n".join(f"* {sentence}" for sentence in sentences)
