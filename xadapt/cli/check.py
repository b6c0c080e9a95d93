"""Measure what an adapter would meet on another base, before it is carried there: coverage, drift, bases that changed.

Without --data only headers and weights are read, a pair of tensors at a time. Exit code 3 if the verdict is to refuse.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from xadapt.cli.options import (
    add_component,
    add_data,
    add_json,
    add_map,
    add_pickle,
    add_report,
    add_variant,
    amount_of,
    in_flags,
    print_json,
    show_progress,
)

if TYPE_CHECKING:
    from rich.table import Table

    from xadapt.checking.report import CheckReport

NAME = "check"
REFUSED = 3


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", help="a PEFT folder, or a LoRA file of diffusers or kohya")
    parser.add_argument("--source", required=True, help="the base it was trained on: a checkpoint's folder or hub id")
    parser.add_argument("--target", required=True, help="the base it is meant for")
    add_data(
        parser, "measure activations too, on a text or JSONL file, a folder of pictures, or 'random' for denoisers"
    )
    add_map(parser)
    add_component(parser)
    add_variant(parser)
    add_pickle(parser)
    add_report(parser)
    add_json(parser)


@in_flags
def run(arguments: argparse.Namespace) -> int:
    """Checks, and says what was found."""
    from xadapt.checking.check import check

    found = check(
        arguments.adapter,
        arguments.source,
        arguments.target,
        arguments.data,
        component=arguments.component,
        map=arguments.map,
        amount=amount_of(arguments),
        variant=arguments.variant,
        allow_pickle=arguments.allow_pickle,
        progress=show_progress(arguments),
    )
    if arguments.report:
        from xadapt.report import write_report

        write_report(arguments.report, check=found.as_dict())
    if arguments.json:
        print_json(found.as_dict())
    else:
        _print(found)
    return REFUSED if found.refused else 0


def _print(found: CheckReport) -> None:
    from rich.console import Console

    console = Console(markup=False, highlight=False)
    similarity = found.weight_similarity
    lines = [
        f"{found.adapter} ({found.kind}): {found.source} → {found.target}",
        f"verdict: {found.verdict}: {found.decision.why}",
        f"recommended method: {found.recommended or 'none that is installed'}",
        f"coverage: {found.coverage}",
    ]
    if similarity["all layers"] is not None:
        lines.append(
            f"weights' cosine: {similarity['all layers']:.3f} over all layers, {similarity['lowest 20 %']:.3f} over the lowest fifth"
        )
    for line in [*lines, *found.notes, *([f"activations on {found.data}"] if found.data else [])]:
        console.print(line)
    console.print(_table(found))


def _table(found: CheckReport) -> Table:
    from rich.table import Table

    columns: dict[str, str] = {"drift": "weight_drift", "cosine": "weight_cosine"}
    columns |= {"inputs ∩": "inputs_overlap", "outputs ∩": "outputs_overlap", "‖ΔW‖/‖W‖": "update_share"}
    columns |= {"ΔW changes": "update_change"}
    if found.data:
        columns |= {"inputs moved": "inputs_moved", "outputs moved": "outputs_moved", "CKA in": "inputs_cka"}
        columns |= {"CKA out": "outputs_cka"}
    table = Table()
    table.add_column("layer", overflow="fold")
    table.add_column("carried")
    for name in columns:
        table.add_column(name, justify="right")
    table.add_column("why", overflow="fold")
    for layer, verdict in zip(found.layers, found.decision.layers, strict=True):
        row = [layer.source if layer.target in (layer.source, None) else f"{layer.source} → {layer.target}"]
        row.append(verdict.way + (", doubtful" if verdict.doubtful else ""))
        row += [_number(getattr(layer, name)) for name in columns.values()]
        table.add_row(*row, verdict.why)
    return table


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.3f}"
