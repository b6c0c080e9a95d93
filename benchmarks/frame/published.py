"""The numbers that the papers print: `published.csv`, typed from their tables."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache
from pathlib import Path

FILE = Path(__file__).parent / "published.csv"


@dataclass(frozen=True)
class Published:
    """One number of one table. `adaptation` is param, input, output …; `side` is source or target."""

    table: str
    model_pair: str
    base_method: str
    adaptation: str
    side: str
    metric: str
    value: float | None
    std: float | None
    rank: int | None
    note: str | None


@cache
def all_published() -> tuple[Published, ...]:
    with FILE.open(newline="", encoding="utf-8") as file:
        return tuple(
            Published(
                **{key: row[key] for key in ("table", "model_pair", "base_method", "adaptation", "side", "metric")},
                value=float(row["value"]) if row["value"] else None,
                std=float(row["std"]) if row["std"] else None,
                rank=int(row["rank"]) if row["rank"] else None,
                note=row["note"] or None,
            )
            for row in csv.DictReader(file)
        )


def published(table: str, **wanted: str | int) -> list[Published]:
    """The numbers of a table, `published("6", side="target", adaptation="input")`; "A4A-1" is A4A's Table 1.

    Raises ValueError if there is no such table.
    """
    of_table = [each for each in all_published() if each.table == table]
    if not of_table:
        known = ", ".join(dict.fromkeys(each.table for each in all_published()))
        raise ValueError(f"no table {table!r}. Tables: {known}.")
    return [each for each in of_table if all(getattr(each, key) == value for key, value in wanted.items())]
