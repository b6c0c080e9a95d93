"""Write an adapter as the plain LoRA that it is on a base, for PEFT, diffusers, vLLM, ComfyUI and others to load."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xadapt.choices import DTYPES, LAYOUTS, NAMES
from xadapt.cli.options import (
    add_adapters,
    add_component,
    add_json,
    add_pickle,
    add_variant,
    in_flags,
    print_json,
    show_progress,
)

if TYPE_CHECKING:
    from xadapt.export import ExportReport

NAME = "export"


def add(parser: argparse.ArgumentParser) -> None:
    add_adapters(parser)
    parser.add_argument(
        "--base",
        action="append",
        required=True,
        metavar="BASE",
        help="a checkpoint's folder or hub id; with several, each gets a folder of its own under --out",
    )
    parser.add_argument("--out", type=Path, required=True, help="the folder, or the .safetensors file, to write")
    add_component(parser)
    parser.add_argument("--layout", default="peft", choices=LAYOUTS, help="whose names the tensors get (default: peft)")
    parser.add_argument(
        "--name",
        choices=NAMES["kohya"],
        help="the component in the written names, where the base does not tell it (text_encoder_1: SDXL's first, in kohya)",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of the written tensors; the adapter's by default")
    parser.add_argument("--rank", type=int, help="cut to this rank at most, for adapters that are no LoRA")
    parser.add_argument("--energy", type=float, help="cut to the rank that keeps this share, for example 0.99")
    parser.add_argument("--drop-bias", action="store_true", help="leave out what moves a bias, and report how much")
    parser.add_argument("--overwrite", action="store_true", help="replace an adapter that lies at --out")
    add_variant(parser)
    add_pickle(parser)
    add_json(parser)


@in_flags
def run(arguments: argparse.Namespace) -> int:
    """Exports for every base; the adapter is read once."""
    import torch

    from xadapt.export import export_lora
    from xadapt.opening import check_choices
    from xadapt.sources import adapters_from

    outs = _outs(arguments.base, arguments.out, arguments.layout)
    if arguments.layout == "peft":
        check_choices(arguments.component, arguments.variant, arguments.adapter, arguments.base)
    adapters = adapters_from(arguments.adapter, arguments.component, arguments.allow_pickle)
    reports: list[ExportReport] = []
    for base, out in outs.items():
        try:
            report = export_lora(
                adapters,
                base,
                out,
                layout=arguments.layout,
                component=arguments.component,
                name=arguments.name,
                dtype=getattr(torch, arguments.dtype) if arguments.dtype else None,
                weights=arguments.weight,
                rank=arguments.rank,
                energy=arguments.energy,
                drop_bias=arguments.drop_bias,
                variant=arguments.variant,
                overwrite=arguments.overwrite,
                allow_pickle=arguments.allow_pickle,
                progress=show_progress(arguments),
            )
        except (ValueError, OSError) as error:
            if len(outs) == 1:
                raise
            written = ", ".join(str(report.out) for report in reports) or "nothing"
            raise ValueError(f"{base}: {error} Written before it: {written}.") from error
        reports.append(report)
    if arguments.json:
        print_json([report.as_dict() for report in reports])
        return 0
    for report in reports:
        _print(report)
    return 0


def _outs(bases: list[str], out: Path, layout: str) -> dict[str, Path]:
    """Where each base's LoRA goes."""
    if len(bases) == 1:
        return {bases[0]: out}
    suffix = "" if layout == "peft" else ".safetensors"
    names = {base: f"{_name(base)}{suffix}" for base in bases}
    if len(set(names.values())) < len(bases):
        raise ValueError(
            f"The bases {', '.join(bases)} end in the same name, and each needs a place of its own under {out}: "
            "export them one by one."
        )
    return {base: out / name for base, name in names.items()}


def _name(base: str) -> str:
    """The last part of a folder's path ("." and ".." followed) or of a hub id."""
    name = os.path.basename(os.path.abspath(base) if os.path.isdir(base) else base.rstrip("/"))
    if name in ("", ".", ".."):
        raise ValueError(f"The base {base} has no name for a folder of its own; export it by itself.")
    return name


def _print(report: ExportReport) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, highlight=False)
    ranks = sorted({layer.rank for layer in report.layers})
    how = "exactly" if report.exact else "approximately"
    console.print(
        f"{report.out}: {how} the adapter on {report.base}, {len(report.layers)} layers of rank "
        f"{', '.join(map(str, ranks))}, {report.dtype}, {report.layout} layout"
    )
    if report.exact:
        return
    table = Table()
    table.add_column("layer", overflow="fold")
    for column in ("rank", "‖ΔW − LoRA‖/‖ΔW‖", "‖Δb‖ left out"):
        table.add_column(column, justify="right")
    for layer in report.layers:
        row: list[Any] = [layer.path, str(layer.rank), f"{layer.residual:.2e}", f"{layer.dropped_bias:.2e}"]
        table.add_row(*row)
    console.print(table)
