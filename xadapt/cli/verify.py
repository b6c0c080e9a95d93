"""Compare what a carried adapter does on the target with what it did on its source: no labels are needed.

Bare target and plain copy stand beside it; a result that loses to either is shown as such. Exit code 3 then, and where the
transferred adapter does not load onto the target.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING

from xadapt.cli.options import (
    add_component,
    add_data,
    add_json,
    add_pickle,
    add_report,
    add_variant,
    amount_of,
    check_report_place,
    in_flags,
    print_json,
    show_progress,
)
from xadapt.cli.tables import table_of

if TYPE_CHECKING:
    from rich.table import Table

    from xadapt.verifying.report import VerifyReport

NAME = "verify"
REFUSED = 3


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", help="the adapter as it was on the source")
    parser.add_argument("transferred", help="what `xadapt transfer` wrote for the target")
    parser.add_argument("--source", required=True, help="the base it was trained on: a checkpoint's folder or hub id")
    parser.add_argument("--target", required=True, help="the base it was carried to")
    add_data(
        parser,
        "inputs of the adapter's kind: a text or JSONL file, a folder of pictures, or 'random' for denoisers",
        True,
    )
    parser.add_argument("--neutral", metavar="FILE", help="inputs that are not its business, to see what it breaks")
    parser.add_argument(
        "--metric", metavar="MODULE:FUNCTION", help="your own measure: from a model to a number or a dict"
    )
    parser.add_argument(
        "--task", action="append", default=[], help="of lm-eval, by name or file; may be given several times"
    )
    parser.add_argument("--task-limit", type=int, help="documents of each task; all by default")
    parser.add_argument(
        "--prompt", action="append", default=[], help="let all models draw this, for a pipeline's component"
    )
    parser.add_argument(
        "--continue-tokens",
        type=int,
        default=0,
        metavar="N",
        help="of prompts without answers: let the adapted source say N tokens more, and compare on these",
    )
    add_component(parser)
    add_variant(parser)
    add_pickle(parser)
    add_report(parser)
    add_json(parser)


@in_flags
def run(arguments: argparse.Namespace) -> int:
    """Verifies, and says what was found."""
    from xadapt.verifying.verify import verify

    check_report_place(arguments)

    found = verify(
        arguments.source,
        arguments.target,
        arguments.adapter,
        arguments.transferred,
        arguments.data,
        neutral=arguments.neutral,
        metric=arguments.metric,
        tasks=arguments.task,
        task_limit=arguments.task_limit,
        prompts=arguments.prompt,
        continue_tokens=arguments.continue_tokens,
        component=arguments.component,
        amount=amount_of(arguments),
        variant=arguments.variant,
        allow_pickle=arguments.allow_pickle,
        progress=show_progress(arguments),
    )
    if arguments.report:
        from xadapt.report import write_report

        write_report(arguments.report, verify=found.as_dict())
    if arguments.json:
        print_json(found.as_dict())
    else:
        _print(found)
    return REFUSED if found.refused else 0


def _print(found: VerifyReport) -> None:
    from rich.console import Console

    console = Console(markup=False, highlight=False)
    console.print(f"{found.transferred} on {found.target}, beside {found.adapter} on {found.source}")
    console.print(f"on {found.data}" + (f"; neutral: {found.neutral}" if found.neutral else ""))
    console.print(found.verdict)
    for table in _tables(found):
        console.print(table)
    for row in found.rows:
        if row.error:
            console.print(f"{row.name}: {row.error}")
    for note in found.notes:
        console.print(note)


def _tables(found: VerifyReport) -> Iterator[Table]:
    """A line for each model; of metrics there may be many, so a line for each of these."""
    rows = []
    for row in found.rows:
        name = row.name if row.error is None else f"{row.name} (cannot be loaded)"
        one = row.agreement
        agreed = (None, None, None) if one is None else (one.score, one.direction, one.strength)
        rows.append([name, *map(_number, (*agreed, row.retention))])
    yield table_of(["model", "score", "direction", "strength", "retention"], rows)
    names = list(dict.fromkeys(name for row in found.rows for name in row.metrics))
    if names:
        shown = [row for row in found.rows if row.metrics]
        measured = [[name, *(_number(row.metrics.get(name)) for row in shown)] for name in names]
        yield table_of(["metric", *(row.name.replace(" ", "\n") for row in shown)], measured)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
