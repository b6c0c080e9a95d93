"""Show what an adapter is: kind, space, ranks, layers, norms; with --base, whether it was trained on that base."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from xadapt.cli.options import (
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
    from rich.table import Table

    from xadapt.inspection import Inspection

NAME = "inspect"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "adapter", help="a PEFT folder, a LoRA file of diffusers or kohya, or what an installed plug-in reads"
    )
    parser.add_argument("--base", help="a checkpoint's folder or hub id to hold it against")
    add_component(parser)
    add_variant(parser)
    add_pickle(parser)
    add_json(parser)


@in_flags
def run(arguments: argparse.Namespace) -> int:
    """Prints the inspection."""
    from rich.console import Console

    from xadapt.inspection import inspect

    found = inspect(
        arguments.adapter,
        arguments.base,
        component=arguments.component,
        allow_pickle=arguments.allow_pickle,
        variant=arguments.variant,
        progress=show_progress(arguments),
    )
    if arguments.json:
        print_json(found.as_dict())
        return 0
    console = Console(markup=False, highlight=False)
    for line in _head(found):
        console.print(line)
    console.print(_table(found))
    return 0


def _head(found: Inspection) -> list[str]:
    sizes = f"{found.parameters:,} parameters, {size(found.bytes)}, {', '.join(found.dtypes)}"
    if not found.method:  # a format of its own, with no layers of a base in it
        return [
            f"{found.source}: kind {found.kind}"
            + (f", written by xadapt {found.xadapt_version}" if found.xadapt_version else ""),
            sizes,
            *(f"{name}: {value}" for name, value in found.facts.items()),
        ]
    ranks = ", ".join(map(str, found.ranks)) or "none"
    lines = [
        f"{found.source}: {found.method} in {found.space} space (kind {found.kind}), rank {ranks}",
        f"{sizes}, {len(found.layers)} layers",
        f"trained on {found.trained_on or 'a base it does not name'}"
        + (f" at {found.revision}" if found.revision else "")
        + (f", written by xadapt {found.xadapt_version}" if found.xadapt_version else ""),
    ]
    if found.modules_to_save:
        lines.append(f"brings along whole: {', '.join(found.modules_to_save)}")
    if found.base is not None:
        matches = [layer.match for layer in found.layers if layer.match is not None]
        told = {match: matches.count(match) for match in dict.fromkeys(matches)}
        summary = ", ".join(f"{match} in {count}" for match, count in told.items())
        lines.append(f"held against {found.base}: {summary or 'no fingerprint of its base is recorded'}")
    return lines


def _table(found: Inspection) -> Table:
    from rich.table import Table

    held = found.base is not None
    table = Table()
    if not found.method:
        table.add_column("part", overflow="fold")
        for column in ("parameters", "norm"):
            table.add_column(column, justify="right")
        for layer in found.layers:
            table.add_row(layer.path, f"{layer.parameters:,}", f"{layer.norm:.3g}")
        return table
    table.add_column("layer", overflow="fold")
    for column in ("rank", "scaling", "parameters", "norm", *(("base", "‖ΔW‖/‖W‖") if held else ())):
        table.add_column(column, justify="right")
    for layer in found.layers:
        row = [
            layer.path,
            "" if layer.rank is None else str(layer.rank),
            "" if layer.scaling is None else f"{layer.scaling:.3g}",
            f"{layer.parameters:,}",
            f"{layer.norm:.3g}",
        ]
        if held:
            row += [layer.match or "", "" if layer.update is None else f"{layer.update:.2e}"]
        table.add_row(*row)
    return table
