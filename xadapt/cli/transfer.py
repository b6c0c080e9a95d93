"""Carry an adapter to another base and write it there, by a method of your choice or one chosen layer by layer.

`xadapt transfer --method NAME --help` lists that method's options. Exit code 3 where the adapter is not the source's, or
layers would be left out (--partial); of a plan, whatever the transfer would be refused for.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xadapt import registry
from xadapt.cli.options import (
    add_component,
    add_data,
    add_json,
    add_map,
    add_pickle,
    add_report,
    add_variant,
    amount_of,
    as_flags,
    check_report_place,
    in_flags,
    print_json,
    show_progress,
    size,
)
from xadapt.cli.tables import Names, narrowed, table_of
from xadapt.layer_names import grouped, merged, pattern_of, plainly, wording_of
from xadapt.method_options import fields_of, help_of, of_others, parse, type_of
from xadapt.progress import showing
from xadapt.refused import Refused

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from xadapt.contract import Method
    from xadapt.transferring.result import PlannedLayer, TransferPlan

NAME = "transfer"
_PREFIX = "method_"  # as the Python function takes an option whose name it has itself


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", help="a PEFT folder, a LoRA file, or what an installed plug-in reads")
    parser.add_argument(
        "--source", help="the base it was trained on: a checkpoint's folder or hub id; some methods need none"
    )
    parser.add_argument(
        "--target",
        action="append",
        required=True,
        help="the base to carry it to; several get folders of their own in --out",
    )
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--method", default="auto", help="one of `xadapt methods` (default: auto)")
    parser.add_argument("--partial", action="store_true", help="write what can be carried, and list what cannot")
    parser.add_argument(
        "--trust-source", action="store_true", help="go on although the fingerprint is another base's than --source"
    )
    parser.add_argument("--plan", action="store_true", help="say what would be done and how large it is; write nothing")
    parser.add_argument("--overwrite", action="store_true", help="replace an adapter that lies at --out")
    add_data(
        parser, "for methods that learn or measure: a text or JSONL file, a folder of pictures, 'random' for denoisers"
    )
    parser.add_argument(
        "--neutral",
        metavar="FILE",
        help="inputs that are not its business: methods learn from them too, auto does not judge by them",
    )
    add_map(parser)
    add_component(parser)
    add_variant(parser)
    add_pickle(parser)
    add_report(parser)
    add_json(parser)


def add_typed(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """The options of the method that is asked for. ValueError, which is told before its options are taken for misspelt flags, where
    there is no such method."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--method", default="auto")
    try:
        method = registry.get(finder.parse_known_args(list(argv))[0].method)
    except ValueError:
        if {"-h", "--help"} & set(argv):
            return
        raise
    group = parser.add_argument_group(f"options of the method {method.name}")
    told = help_of(method)
    for field in fields_of(method):
        if field.name != "seed":
            _add_option(group, parser, method, field, told.get(field.name, ""))


def of_other_methods(flag: str) -> str:
    """What is said of a flag that is not the verb's: which methods have it. Empty where none has."""
    return as_flags(of_others(flag.removeprefix("--").removeprefix("no-").replace("-", "_").removeprefix(_PREFIX)))


def _add_option(group: Any, parser: argparse.ArgumentParser, method: Method, field: Any, text: str) -> None:
    simple, optional = type_of(method, field)
    flag = f"--{field.name.replace('_', '-')}"
    if flag in parser._option_string_actions:  # the verb has one of that name
        flag = f"--method-{field.name.replace('_', '-')}"
    shown = f"{text} (default: {field.default!r})".strip().replace("%", "%%")
    settings: dict[str, Any] = {"dest": f"{_PREFIX}{field.name}", "default": argparse.SUPPRESS, "help": shown}
    if simple is bool:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, **settings)
        return

    def read(given: str) -> Any:
        return parse(given, simple, optional)

    read.__name__ = simple.__name__
    group.add_argument(flag, type=read, metavar=simple.__name__.upper(), **settings)


@in_flags
def run(arguments: argparse.Namespace) -> int:
    """Carries to every target; the adapter and the source are read once."""
    with showing(show_progress(arguments)):
        return _run(arguments)


def _run(arguments: argparse.Namespace) -> int:
    from xadapt.transferring.transfer import plan_transfer, transfer

    if arguments.plan and arguments.report:
        raise ValueError("--plan writes nothing, so no --report either: leave one of the two out.")
    check_report_place(arguments)
    outs = _outs(arguments.target, arguments.out)
    adapter, source = _open(arguments, len(outs))
    settings = _settings(arguments)
    amount = amount_of(arguments, "seed")
    done: list[dict[str, Any]] = []
    errors: list[ValueError] = []
    for target, out in outs.items():
        try:
            if arguments.plan:
                plan = plan_transfer(
                    adapter,
                    source,
                    target,
                    arguments.method,
                    out=out,
                    neutral=arguments.neutral,
                    partial=arguments.partial,
                    trust_source=arguments.trust_source,
                    **settings,
                )
                done.append(plan.as_dict())
                errors += [Refused(plan.refused)] if plan.refused else []
                if not arguments.json:
                    _print_plan(plan)
                continue
            result = transfer(
                adapter,
                source,
                target,
                arguments.method,
                out=out,
                partial=arguments.partial,
                trust_source=arguments.trust_source,
                amount=amount,
                neutral=arguments.neutral,
                **settings,
            )
        except ValueError as error:
            if len(outs) == 1:
                raise
            errors.append(error)
            done.append({"target": target, "error": as_flags(str(error)), "refused": isinstance(error, Refused)})
            if not arguments.json:
                print(f"{target}: {done[-1]['error']}")
            continue
        done.append(result.as_dict())
        if not arguments.json:
            print(result.summary())
    if arguments.report:
        from xadapt.report import write_report

        write_report(arguments.report, transfers=[one for one in done if "error" not in one])
    if arguments.json:
        print_json(done[0] if len(outs) == 1 else done)
    if not errors:
        return 0
    return 3 if all(isinstance(error, Refused) for error in errors) else 2


def _open(arguments: argparse.Namespace, targets: int) -> tuple[Any, Any]:
    """For several targets, opened here once."""
    if targets == 1:
        return arguments.adapter, arguments.source
    from xadapt.adapter_files import Opened, open_adapter
    from xadapt.opening import check_choices, open_for

    component, pickles = arguments.component, arguments.allow_pickle
    given = arguments.source
    check_choices(component, arguments.variant, [arguments.adapter], [given, *arguments.target])
    source = None if given is None else open_for(given, component, pickles, arguments.variant)
    return Opened(open_adapter(arguments.adapter, component, pickles), arguments.adapter), source


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    names = ("data", "map", "component", "variant", "allow_pickle", "overwrite")
    options = {name: value for name, value in vars(arguments).items() if name.startswith(_PREFIX)}
    return {name: getattr(arguments, name) for name in names} | {"seed": arguments.seed or 0} | options


def _outs(targets: Sequence[str], out: Path) -> dict[str, Path]:
    """Where each target's adapter goes."""
    if len(targets) == 1:
        return {targets[0]: out}
    names = {target: os.path.basename(os.path.abspath(target)) for target in targets}
    if len(set(names.values())) < len(targets):
        raise ValueError(f"The targets {', '.join(targets)} end in the same name; carry to them one by one.")
    return {target: out / name for target, name in names.items()}


def _print_plan(plan: TransferPlan) -> None:
    from rich.console import Console

    console = Console(markup=False, highlight=False)
    learns = ", after learning from data" if plan.learns else ""
    console.print(f"{plan.out}: {plan.adapter} from {plan.source} to {plan.target} by {plan.method}{learns}")
    console.print(
        f"{plan.reads} → {plan.writes}; the adapter is {size(plan.adapter_bytes)}, the weights of its layers in both bases "
        f"{size(plan.weight_bytes)}" + (f"; {' and '.join(plan.loads)} would be loaded" if plan.loads else "")
    )
    if plan.layers:  # formats of a plug-in's own have none that could be told
        _print_layers(console, plan.layers)
    if plan.refused:
        console.print(f"It would be refused: {as_flags(plan.refused)}")
    if plan.untested:
        console.print(f"Not tested: {plan.untested}.")
    console.print("A plan: nothing is written.")


def _print_layers(console: Console, layers: Sequence[PlannedLayer]) -> None:
    """Why each goes where, and where; those that differ in their numbers in one line."""
    for group in _plainly(layers, lambda one: (one.relation, wording_of(one.reason))):
        count = "1 layer" if len(group) == 1 else f"{len(group)} layers"
        console.print(f"{count}: {merged([layer.reason for layer in group])}")
    names = Names([(layer.source, layer.target) for layer in layers])
    groups = _plainly(layers, lambda one: (pattern_of(one.source), pattern_of(one.target or "none")))

    def table(width: int) -> Table:
        rows = []
        for group in groups:
            here, there = names.of([(layer.source, layer.target) for layer in group], width)
            count = str(len(group)) if len(groups) < len(layers) else ""
            rows.append([here, "none" if group[0].target is None else there, count])
        return table_of(["layer", "target", ""], rows, texts=2)

    console.print(narrowed(console, table))
    if names.legend:
        console.print(names.legend)


def _plainly(layers: Sequence[PlannedLayer], key: Callable[[PlannedLayer], Hashable]) -> list[list[PlannedLayer]]:
    """Those with one key together, unless that would hide which goes where."""
    return [part for group in grouped(layers, key) for part in plainly(group, lambda one: (one.source, one.target))]
