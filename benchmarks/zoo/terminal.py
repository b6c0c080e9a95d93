"""The tables in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks.zoo.analysis import Analysis, Grid, analyse
from benchmarks.zoo.headings import (
    FIT_COLUMNS,
    POLICY_COLUMNS,
    SCORES,
    fit_cells,
    policy_cells,
    row_heading,
    sibling_heading,
)
from benchmarks.zoo.policies import PolicyLine
from benchmarks.zoo.results import Results


def show(results: Results, console: Console) -> Analysis:
    """Print every table, and what they say."""
    found = analyse(results)
    for grid in found.grids:
        console.print(_scores(grid))
    for part, lines in found.policies.items():
        console.print(_policies(part, lines))
    for part, fits in ((part, fits) for part, fits in found.fits.items() if fits):
        table = Table(title=f"{part}: thresholds fitted on one half", title_justify="left", box=SIMPLE_HEAD)
        for column in ("rule", *FIT_COLUMNS):
            table.add_column(column, justify="left" if column in ("rule", "thresholds") else "right")
        for name, one in fits.items():
            table.add_row(name, *fit_cells(one))
        console.print(table)
    for sentence in found.sentences:
        console.print(f"· {sentence}", highlight=False, soft_wrap=True)
    return found


def _scores(grid: Grid) -> Table:
    title = f"{grid.part}: adapters in {grid.space} space. {SCORES[grid.part]}; * every method call was refused"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("sibling")
    for column in grid.columns:
        table.add_column(row_heading(column), justify="right")
    for sibling, entries in grid.rows.items():
        texts = [entries[column].text().replace(" ± ", "±") if column in entries else "" for column in grid.columns]
        table.add_row(sibling_heading(grid.part, sibling), *texts, end_section=sibling == "source")
    return table


def _policies(part: str, lines: Sequence[PolicyLine]) -> Table:
    table = Table(
        title=f"{part}: regret of policies, in points", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    table.add_column("policy")
    for column in POLICY_COLUMNS:
        table.add_column(column, justify="right")
    for line in lines:
        table.add_row(line.name, *policy_cells(line))
    return table
