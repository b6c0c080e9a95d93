"""Adapters on a zoo of siblings: what each way of carrying does there, and what a choice among them is worth."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from benchmarks.provenance import ROOT
from benchmarks.tiny.progress import Bars, Reporter
from benchmarks.tiny.results import Cells
from benchmarks.zoo.carry import ROWS
from benchmarks.zoo.driver import PARTS, finished, learning_rates, plan, run
from benchmarks.zoo.settings import PRESETS, Settings

RESULTS = Path(__file__).parent / "results"
SCRATCH = ROOT / "runs" / "zoo"


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, write; the exit status."""
    parsed = _parser().parse_args(arguments)
    bars = Bars()
    settings = PRESETS[parsed.preset]
    cells = Cells(parsed.cells)
    unknown = sorted(set(parsed.only) - {cell.what for cell in plan(settings)})
    if unknown:
        known = ", ".join(dict.fromkeys(cell.what for cell in plan(settings)))
        print(f"error: --only {' '.join(unknown)}: there is no such row; there are {known}.", file=sys.stderr)
        return 2
    if parsed.plan:
        _show_plan(settings, cells, parsed, bars)
        return 0
    if not parsed.collect:
        import torch

        torch.set_num_threads(parsed.threads)
        # PEFT 0.21 asks transformers 5 whether gradient checkpointing is on, by the old name
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        try:
            run(
                settings,
                cells,
                parsed.shelf,
                bars,
                parts=parsed.parts,
                only=parsed.only,
                seeds=parsed.seeds,
                again=parsed.again,
            )
        except KeyboardInterrupt:
            bars.say(
                "\nInterrupted. Nothing half-written is left; the same command goes on after the last finished cell."
            )
            return 130
    return _write(settings, cells, parsed, bars)


def _write(settings: Settings, cells: Cells, parsed: argparse.Namespace, bars: Bars) -> int:
    from benchmarks.zoo.results import collect, write_results
    from benchmarks.zoo.terminal import show

    results = collect(settings, finished(settings, cells), learning_rates(settings, parsed.shelf))
    show(results, bars.console)
    out = parsed.out or (RESULTS if settings.preset == "full" else SCRATCH)
    written = write_results(results, out)
    bars.say(f"\nwritten: {', '.join(map(str, written))}")
    return 0


def _show_plan(settings: Settings, cells: Cells, parsed: argparse.Namespace, progress: Reporter) -> None:
    everything, done = plan(settings, parsed.parts), finished(settings, cells, parsed.parts)
    progress.say(f"preset {settings.preset}, seeds {', '.join(map(str, settings.seeds))}")
    counts, ready = Counter((cell.part, cell.what) for cell in everything), Counter((c.part, c.what) for c in done)
    for (part, what), count in counts.items():
        spent = sum(content["seconds"] for cell, content in done.items() if (cell.part, cell.what) == (part, what))
        progress.say(f"  {part:9} {what:14} {count:4} cells, {ready[part, what]} finished in {spent:.0f} s")
    for part in parsed.parts:
        own = getattr(settings, part)
        progress.say(
            f"{part}: {len(own.siblings)} siblings, {len(own.tasks)} tasks, adapters in {', '.join(own.spaces)}"
        )
    progress.say(f"rows: {', '.join(ROWS)}; {len(everything) - len(done)} cells to run")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo", description=__doc__)
    parser.add_argument("preset", choices=PRESETS, help="full: the committed results; short: does it run?")
    parser.add_argument("--out", type=Path, help="folder for the results")
    parser.add_argument("--cells", type=Path, default=SCRATCH / "cells", help="folder of the finished cells")
    parser.add_argument("--shelf", type=Path, default=SCRATCH / "shelf", help="folder of trained models and adapters")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[], help="run these of the preset's seeds")
    parser.add_argument("--only", nargs="+", default=[], help="run these rows alone")
    parser.add_argument("--again", action="store_true", help="run them even if they are finished")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default: 1)")
    parser.add_argument("--plan", action="store_true", help="say what would run, and stop")
    parser.add_argument("--collect", action="store_true", help="run nothing, write the results of what is finished")
    return parser
