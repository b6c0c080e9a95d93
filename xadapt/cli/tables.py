"""Tables that can be read in a terminal of 80 columns: many layers in few rows, empty columns left out."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Literal

from xadapt.layer_names import differing, needless_parts, together

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

WHOLE = 10_000
"""A width in which no name is broken."""

_NARROWEST = 12  # of a name: what it takes beyond that, the terminal has to break


class Names:
    """How one table calls its layers, each a source path and the target's: what tells none from another is left out, and said once."""

    def __init__(self, layers: Iterable[tuple[str, str | None]]) -> None:
        self.left_out = needless_parts(path for pair in layers for path in pair if path is not None)

    def of(self, layers: Sequence[tuple[str, str | None]], width: int = WHOLE) -> tuple[str, str]:
        """Some layers whose paths are of one pattern on either side: their name, and what it is on the target if another."""
        sources, targets = [source for source, _ in layers], [target for _, target in layers if target is not None]
        there = differing(sources, targets, self.left_out) if targets else ""
        return _broken(together(sources, self.left_out), width), _broken(there, width)

    @property
    def legend(self) -> str | None:
        return f"left out of the layers' names: {', '.join(self.left_out)}" if self.left_out else None


def numbers(values: Iterable[float | None], spread: bool) -> str:
    """Some layers' measures in one cell: from the lowest to the highest, or their mean."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    low, mean, high = (_number(value) for value in (min(known), sum(known) / len(known), max(known)))
    if not spread:
        return mean
    return low if low == high else f"{low}–{high}"


def _number(value: float) -> str:
    return f"{round(value, 3) + 0.0:.3f}"  # -0.0004 is no -0.000


def table_of(columns: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> Table:
    """A table without the columns that are empty in every row. The first `texts` columns are text, the others numbers."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.Box("    \n    \n ── \n    \n    \n    \n    \n    \n"), pad_edge=False, padding=0)
    kept = [index for index in range(len(columns)) if any(row[index] for row in rows)]
    for index in kept:
        side: Literal["left", "right"] = "left" if index < texts else "right"
        table.add_column(columns[index], justify=side, overflow="fold", no_wrap=side == "right")
    for row in rows:
        table.add_row(*(row[index] for index in kept))
    return table


def too_wide(console: Console, table: Table) -> int:
    """By how many columns a table is wider than the terminal; 0 if it fits."""
    from rich.measure import Measurement

    unbounded = console.options.update(width=WHOLE)
    return max(0, Measurement.get(console, unbounded, table).maximum - console.width)


def narrowed(console: Console, table: Callable[[int], Table]) -> Table:
    """The table whose names are the least broken that fits; `table` makes it for a width of its names."""
    made = table(WHOLE)
    for width in range(min(WHOLE, console.width), _NARROWEST, -2):
        if not too_wide(console, made):
            break
        made = table(width)
    return made


def _broken(name: str, width: int) -> str:
    """A layer's name on several lines of at most this width, between its parts, as far as these allow it."""
    lines = [""]
    for part in re.split(r"(?<=[.…])", name):
        if lines[-1].strip() and len(lines[-1]) + len(part) > width:
            lines.append(" ")
        lines[-1] += part
    return "\n".join(lines)
