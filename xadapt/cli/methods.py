"""List the installed methods: what each reads and writes, and where it was published."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from xadapt import registry
from xadapt.contract import Method

NAME = "methods"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON for a program instead of a table")


def run(arguments: argparse.Namespace) -> int:
    """Prints every method; one that does not work is named on stderr (in JSON: has an "error")."""
    working, broken = registry.load_all()
    if arguments.json:
        rows = [_row(method) for method in working.values()]
        rows += [{"name": name, "error": str(error)} for name, error in broken.items()]
        print(json.dumps(rows, indent=2))
        return 0
    Console(markup=False, highlight=False).print(_table(working))  # a summary may hold brackets
    for error in broken.values():
        print(f"not usable: {error}", file=sys.stderr)
    return 0


def _row(method: Method) -> dict[str, object]:
    return {
        "name": method.name,
        "summary": method.summary,
        "reads": [kind.name for kind in method.reads],
        "writes": method.writes.name,
        "paper": method.paper,
    }


def _table(methods: Mapping[str, Method]) -> Table:
    table = Table(title="installed methods", title_justify="left")
    table.add_column("name", no_wrap=True)
    table.add_column("summary")
    table.add_column("reads → writes")
    table.add_column("paper", overflow="fold")
    for method in methods.values():
        reads = ", ".join(kind.name for kind in method.reads)
        table.add_row(method.name, method.summary, f"{reads} → {method.writes.name}", method.paper)
    return table
