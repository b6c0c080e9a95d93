"""Measure what an adapter would meet on another base, before it is carried there: coverage, drift, bases that changed.

Without --data only headers and weights are read, a pair of tensors at a time. Exit code 3 if the verdict is to refuse.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from xadapt.cli.options import (
    add_component,
    add_data,
    add_json,
    add_map,
    add_pickle,
    add_report,
    add_variant,
    amount_of,
    check_report_place,
    in_flags,
    print_json,
    show_progress,
)
from xadapt.cli.tables import WHOLE, Names, narrowed, numbers, table_of, too_wide
from xadapt.layer_names import grouped, merged, pattern_of, plainly, wording_of

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from xadapt.checking.decisions import LayerVerdict
    from xadapt.checking.measures import LayerMeasures
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

    check_report_place(arguments)

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
    console.print()
    judged = list(zip(found.layers, found.decision.layers, strict=True))
    for group in grouped(judged, lambda one: (one[1].way, one[1].doubtful, wording_of(one[1].why))):
        count = "1 layer" if len(group) == 1 else f"{len(group)} layers"
        console.print(f"{count} {_way(group[0][1])}: {merged([verdict.why for _, verdict in group])}")
    _print_tables(console, judged)


def _print_tables(console: Console, judged: Sequence[tuple[LayerMeasures, LayerVerdict]]) -> None:
    """A line for layers that differ in their numbers and have one verdict; what was measured of weights, and of features."""
    names = Names([(layer.source, layer.target) for layer, _ in judged])
    several = len({_way(verdict) for _, verdict in judged}) > 1
    alike = grouped(judged, lambda one: (pattern_of(one[0].source), pattern_of(one[0].target or ""), _way(one[1])))
    groups = [part for group in alike for part in plainly(group, lambda one: (one[0].source, one[0].target))]
    together = len(groups) < len(judged)

    def table(measures: Mapping[str, str], spread: bool, width: int) -> Table:
        rows = []
        for group in groups:
            layers = [layer for layer, _ in group]
            row = [*names.of([(layer.source, layer.target) for layer in layers], width)]
            row += [_way(group[0][1]) if several else "", str(len(group)) if together else ""]
            rows.append(row + [numbers((getattr(layer, name) for layer in layers), spread) for name in measures])
        return table_of(["layer", "target", "carried", "", *measures.values()], rows, texts=3)

    def show(measures: Mapping[str, str]) -> None:
        whole = table(measures, spread=True, width=WHOLE)
        if not too_wide(console, whole):
            console.print(whole)
            return
        console.print(narrowed(console, lambda width: table(measures, spread=False, width=width)))
        if together:
            console.print("means over a line's layers; a wider terminal shows from where to where, --json each layer")

    show(_OF_WEIGHTS)
    if any(getattr(layer, name) is not None for layer, _ in judged for name in _OF_FEATURES):
        show(_OF_FEATURES)
    if names.legend:
        console.print(names.legend)


_OF_WEIGHTS = {
    "weight_drift": "drift",
    "weight_cosine": "cosine",
    "inputs_overlap": "inputs\n∩",
    "outputs_overlap": "outputs\n∩",
    "update_share": "‖ΔW‖\n/‖W‖",
    "update_change": "ΔW\nchanges",
}
_OF_FEATURES = {
    "inputs_moved": "inputs\nmoved",
    "outputs_moved": "outputs\nmoved",
    "inputs_cka": "inputs'\nCKA",
    "outputs_cka": "outputs'\nCKA",
}


def _way(verdict: LayerVerdict) -> str:
    return verdict.way + (", doubtful" if verdict.doubtful else "")
