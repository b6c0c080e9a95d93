"""Options and output that several verbs share."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any


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
    parser.add_argument("--component", help="which part of a pipeline: unet, transformer, text_encoder, …")


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON for a program instead of a table")


def show_progress(arguments: argparse.Namespace) -> bool:
    """Whether somebody is looking."""
    return sys.stderr.isatty() and not arguments.json


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, default=str))


def size(nbytes: float) -> str:
    """1.2 GB"""
    for unit in ("bytes", "kB", "MB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "bytes" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} GB"
