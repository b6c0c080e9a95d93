"""Options and output that several verbs share."""

from __future__ import annotations

import argparse
import functools
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xadapt.refused import Refused
from xadapt.strict_json import as_json

if TYPE_CHECKING:
    from xadapt.data.amount import Amount

_SWITCHES = ("overwrite", "allow_pickle", "drop_bias", "partial", "trust_source", "allow_training")
_VALUES = (
    "component",
    "name",
    "layout",
    "dtype",
    "rank",
    "energy",
    "variant",
    "method",
    "data",
    "neutral",
    "source",
    "samples",
    "max_tokens",
    "continue_tokens",
    "method_map",
    "margin",
    "gain",
    "train_below",
    "train_margin",
    "training_steps",
    "training_lr",
)
_NOT_WITHIN = r"(?<![\w/.=-])"  # a longer name, or a path
_SWITCH = re.compile(rf"{_NOT_WITHIN}({'|'.join(_SWITCHES)})=True\b")
_VALUE = re.compile(rf"{_NOT_WITHIN}({'|'.join(_VALUES)})=(?!None\b)('[^']*'(?: or '[^']*')*|-?[\w…]+(?:\.\w+)*)")
_TWICE = re.compile(r"(--([\w-]+)(?: …)?) \(--\2\)")  # messages that name both spellings
_WEIGHTS = re.compile(rf"{_NOT_WITHIN}weights=\[([^]]*)\]")


def as_flags(message: str) -> str:
    """A message of the library's, with its arguments as what is typed: overwrite=True becomes --overwrite."""
    message = _SWITCH.sub(lambda match: f"--{match[1].replace('_', '-')}", message)
    message = _VALUE.sub(
        lambda match: f"--{match[1].replace('_', '-')} {match[2].replace(chr(39), '').removeprefix('torch.')}",
        message,
    )
    message = _TWICE.sub(r"\1", message)
    return _WEIGHTS.sub(lambda match: " ".join(f"--weight {one.strip()}" for one in match[1].split(",")), message)


def in_flags(run: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """A verb whose mistakes are told in the words of the command line."""

    @functools.wraps(run)
    def told(arguments: argparse.Namespace) -> int:
        try:
            return run(arguments)
        except Refused as error:
            raise Refused(as_flags(str(error))) from error
        except (ValueError, TypeError) as error:
            raise ValueError(as_flags(str(error))) from error

    return told


def add_adapters(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "adapter", nargs="+", help="a PEFT folder, or a LoRA file of diffusers or kohya; several are added up"
    )
    parser.add_argument(
        "--weight",
        type=float,
        action="append",
        metavar="FACTOR",
        help="how an adapter counts, once for each; 1 by default",
    )


def add_component(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--component", help="which part, of a pipeline or of a LoRA file: unet, text_encoder, …")


def add_variant(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--variant", help="of the base's files, for example fp16: those with that in their names")


def add_pickle(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--allow-pickle", action="store_true", help="also read .bin and .pt files (tensors only)")


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON for a program instead of a table")


def add_data(parser: argparse.ArgumentParser, what: str, required: bool = False) -> None:
    """--data, and how much of it."""
    parser.add_argument("--data", required=required, metavar="FILE", help=what)
    parser.add_argument("--samples", type=int, help="of the data, from its start (default: 64)")
    parser.add_argument("--max-tokens", type=int, help="of each text (default: 256)")
    parser.add_argument("--batch", type=int, help="samples in one forward (default: 8)")
    parser.add_argument("--seed", type=int, help="of whatever is drawn at random (default: 0)")


def amount_of(arguments: argparse.Namespace, *elsewhere: str) -> Amount | None:
    """How much data was asked for; None where nothing was said of it.

    Args:
        elsewhere: what has a meaning without data too.

    Raises:
        ValueError: something is said of data, and none was given.
    """
    from xadapt.data.amount import Amount

    named = ("samples", "max_tokens", "batch", "seed")
    told = {name: getattr(arguments, name) for name in named if getattr(arguments, name) is not None}
    idle = [f"--{name.replace('_', '-')}" for name in told if name not in elsewhere]
    if arguments.data is None and idle:
        what = " and ".join(idle)
        raise ValueError(f"{what}: of what --data names, and there is none. Pass --data, or leave {what} out.")
    return Amount(**told) if told else None


def add_map(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--map", metavar="FILE", help="a JSON file with lines of your own for the module map")


def add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--report", type=Path, metavar="FILE.html", help="write a page; other verbs' parts of the same page stay"
    )


def check_report_place(arguments: argparse.Namespace) -> None:
    """ValueError where --report cannot be written, before the work for it is done."""
    if arguments.report:
        from xadapt.report import check_report

        check_report(arguments.report)


def show_progress(arguments: argparse.Namespace) -> bool:
    """Whether somebody is looking."""
    return sys.stderr.isatty() and not arguments.json


def print_json(value: Any) -> None:
    print(as_json(value, indent=2))


def size(nbytes: float) -> str:
    """1.2 GB"""
    for unit in ("bytes", "kB", "MB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "bytes" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} GB"
