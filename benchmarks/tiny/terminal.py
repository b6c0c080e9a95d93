"""The tables in the terminal."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable

from benchmarks.tiny.results import Results, said, tables
from benchmarks.tiny.summary import COLUMNS, is_source


def show(results: Results, console: Console) -> None:
    """Print every part: its table, the best training-free cells in green, and what it says."""
    for summary in tables(results):
        part = summary.part
        direction = "higher is better" if part.higher_is_better else "lower is better"
        grid = RichTable(
            title=f"{part.title}\n{part.score}, {direction}",
            title_justify="left",
            box=SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
        )
        grid.add_column("sibling")
        for column in summary.columns:
            grid.add_column(COLUMNS.get(column, column), justify="right")
        for sibling, cells in summary.rows.items():
            texts = []
            for column in summary.columns:
                text = (
                    cells[column].text(part.digits).replace(" ± 0", "±").replace(" ± ", "±") if column in cells else ""
                )
                texts.append(f"[bold green]{text}[/]" if column in cells and cells[column].best else text)
            grid.add_row(part.heading(sibling), *texts, end_section=is_source(sibling))
        console.print()
        console.print(grid)
        for sentence in said(results, summary):
            console.print(f"· {sentence}", highlight=False)
    for note in results["notes"]:
        console.print(f"! {note}", highlight=False)
    console.print("\ngreen: the best adapter of the row that needs no training on the target", highlight=False)
