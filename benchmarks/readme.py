"""python -m benchmarks.readme: puts measured tables into README.md, from the committed results and by measuring.

`tests/test_readme.py` says when one of them no longer is what the results say.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path

from benchmarks.methods.__main__ import table as methods_table

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"


def tables_of(results: Path) -> dict[str, str]:
    """The tables of a Markdown result file by the heading that they stand under."""
    tables: dict[str, str] = {}
    heading = ""
    for block in results.read_text().split("\n\n"):
        if block.startswith("#"):
            heading = block.lstrip("# ").strip()
        elif block.startswith("|"):
            tables[heading] = block.strip()
    return tables


def _tiny() -> str:
    """Both language-model settings and the denoiser; the file has the learning rates too."""
    tables = tables_of(ROOT / "benchmarks/tiny/results/full.md")
    models = [heading for heading in tables if "language model" in heading]
    denoisers = [heading for heading in tables if "denoiser" in heading]
    return "\n\n".join(f"*{heading}*\n\n{tables[heading]}" for heading in (*models, *denoisers))


def _cost() -> str:
    return "\n\n".join(tables_of(ROOT / "benchmarks/cost/results/cpu.md").values())


def _methods() -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # methods comment on the size of the layer and on torch's sparse tensors
        return methods_table()


def _export() -> str:
    return "\n\n".join(tables_of(ROOT / "benchmarks/export/results/1b.md").values())


SECTIONS: dict[str, Callable[[], str]] = {"tiny": _tiny, "methods": _methods, "export": _export, "cost": _cost}


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
