"""Write a checkpoint with an adapter in its weights, file by file, without loading the model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from xadapt.cli.options import (
    add_adapters,
    add_component,
    add_json,
    add_pickle,
    add_variant,
    in_flags,
    print_json,
    show_progress,
    size,
)

if TYPE_CHECKING:
    from xadapt.merging import MergePlan

NAME = "merge"


def add(parser: argparse.ArgumentParser) -> None:
    add_adapters(parser)
    parser.add_argument("--base", required=True, help="a checkpoint's folder, a pipeline's folder, or a hub id")
    parser.add_argument("--out", type=Path, required=True, help="a folder that does not exist yet")
    add_component(parser)
    add_variant(parser)
    add_pickle(parser)
    parser.add_argument("--plan", action="store_true", help="say what would be read and written, and write nothing")
    add_json(parser)


@in_flags
def run(arguments: argparse.Namespace) -> int:
    """Merges, or plans to."""
    from xadapt.merging import merge, plan_merge

    options = {
        "component": arguments.component,
        "weights": arguments.weight,
        "variant": arguments.variant,
        "allow_pickle": arguments.allow_pickle,
    }
    if arguments.plan:
        plan = plan_merge(arguments.adapter, arguments.base, arguments.out, **options)
    else:
        progress = show_progress(arguments)
        plan = merge(arguments.adapter, arguments.base, arguments.out, **options, progress=progress)
    if arguments.json:
        print_json(plan.as_dict())
    else:
        _print(plan, arguments.plan)
    return 0


def _print(plan: MergePlan, only_planned: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, highlight=False)
    console.print(
        f"{plan.out}: {plan.base} with the adapter in {len(plan.layers)} layers; {size(plan.bytes_changed)} changed of "
        f"{size(plan.bytes_written)}" + (" (a plan: nothing is written)" if only_planned else "")
    )
    if not only_planned:
        return
    table = Table()
    table.add_column("file", overflow="fold")
    for column in ("what", "size", "of it changed"):
        table.add_column(column, justify="right")
    for file in plan.files:
        changed = size(file.bytes_changed) if file.action == "merge" else ""
        table.add_row(str(file.path), file.action, size(file.size), changed)
    console.print(table)
