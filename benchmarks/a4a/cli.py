"""What carrying an IP-Adapter to another architecture buys, beside training one there. Without a command: tiny."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from benchmarks.a4a import full
from benchmarks.a4a.driver import SCHEMA, Results, plan, run
from benchmarks.a4a.settings import TinySettings
from benchmarks.provenance import ROOT
from benchmarks.tiny.progress import Bars
from benchmarks.tiny.results import Cells

RESULTS = Path(__file__).parent / "results"
SCRATCH = ROOT / "runs" / "a4a"


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, write; the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or (given[0].startswith("-") and given[0] not in ("-h", "--help")):
        given = ["tiny", *given]
    parsed = _parser().parse_args(given)
    bars = Bars()
    try:
        if parsed.preset in full.PRESETS:
            return full.main(parsed, bars)
        results = _render(parsed) if parsed.preset == "render" else _offline(parsed, bars)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        bars.say("\nInterrupted. Nothing half-written is left; the same command goes on after the last finished cell.")
        return 130
    if results is None:
        return 0
    from benchmarks.a4a.report import show, write_results

    show(results, bars.console)
    paths = write_results(results, parsed.out)
    if parsed.preset != "render":
        _cells(parsed).clear()
    bars.say(f"\nwritten: {', '.join(str(path) for path in paths.values())}")
    return 0


def _offline(parsed: argparse.Namespace, bars: Bars) -> Results | None:
    settings = TinySettings.short() if parsed.preset == "short" else TinySettings()
    if parsed.seeds:
        settings = replace(settings, seeds=tuple(parsed.seeds))
    if parsed.targets:
        settings = replace(settings, targets=tuple(parsed.targets))
    parsed.out = parsed.out or (RESULTS if settings == TinySettings() else SCRATCH)
    if parsed.plan:
        bars.say(f"preset {settings.preset}, written to {parsed.out}")
        for name in plan(settings):
            bars.say(f"  {name}")
        for name, value in asdict(settings).items():
            bars.say(f"{name}: {value}")
        return None
    import torch

    torch.set_num_threads(parsed.threads)
    return run(settings, _cells(parsed), bars)


def _render(parsed: argparse.Namespace) -> Results:
    parsed.out = parsed.results.parent
    try:
        results: Results = json.loads(parsed.results.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{parsed.results} cannot be read: {error}. Give the JSON file that a run has written."
        ) from None
    if not isinstance(results, dict) or results.get("schema") != SCHEMA or "sweep" not in results:
        raise ValueError(f"{parsed.results} is not a result of this benchmark in schema {SCHEMA}.")
    return results


def _cells(parsed: argparse.Namespace) -> Cells:
    cells = Cells(parsed.out / f".unfinished-{parsed.preset}")
    if parsed.fresh:
        cells.clear()
        parsed.fresh = False
    return cells


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.a4a", description=__doc__)
    presets = parser.add_subparsers(dest="preset", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--out", type=Path, help="folder for the results")
    common.add_argument("--seeds", type=int, nargs="+", help="instead of the seeds of the preset")
    common.add_argument("--targets", nargs="+", choices=("pixart", "sdxl"), help="these targets alone")
    common.add_argument("--threads", type=int, default=1, help="torch threads (default: 1)")
    common.add_argument("--plan", action="store_true", help="say what would run, and stop")
    common.add_argument("--fresh", action="store_true", help="do not go on from an interrupted run")
    presets.add_parser("tiny", parents=[common], help="generated world, one core; the committed results")
    presets.add_parser("short", parents=[common], help="a few steps of everything: does it run?")
    for name, preset in full.PRESETS.items():
        full.add_arguments(presets.add_parser(name, parents=[common], help=preset.summary))
    render = presets.add_parser("render", help="write the Markdown and HTML of a JSON again")
    render.add_argument("results", type=Path, help="the JSON file of a run")
    return parser
