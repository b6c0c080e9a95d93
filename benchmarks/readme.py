"""python -m benchmarks.readme: puts measured tables into README.md, from the committed results and by measuring.

`tests/test_readme.py` says when one of them no longer is what the results say.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from benchmarks.methods.__main__ import table as methods_table

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"


def tables_of(results: Path) -> str:
    """The tables of a Markdown result file, without its text."""
    blocks = results.read_text().split("\n\n")
    return "\n\n".join(block.strip() for block in blocks if block.lstrip().startswith("|"))


def _tiny() -> str:
    return tables_of(ROOT / "benchmarks/tiny/results/full.md")


def _cost() -> str:
    return tables_of(ROOT / "benchmarks/cost/results/cpu.md")


SECTIONS: dict[str, Callable[[], str]] = {"tiny": _tiny, "methods": methods_table, "cost": _cost}


def markers(name: str) -> tuple[str, str]:
    """The lines between which a section's table stands."""
    return f"<!-- {name}: begin (python -m benchmarks.readme) -->\n", f"<!-- {name}: end -->"


def section(name: str) -> str:
    """What README.md has now."""
    begin, end = markers(name)
    return README.read_text().split(begin)[1].split(end)[0].strip()


def main() -> None:
    text = README.read_text()
    for name, table in SECTIONS.items():
        begin, end = markers(name)
        before, rest = text.split(begin)
        text = f"{before}{begin}{table()}\n{end}{rest.split(end)[1]}"
    part = README.with_suffix(".part")
    part.write_text(text)
    os.replace(part, README)


if __name__ == "__main__":
    main()
