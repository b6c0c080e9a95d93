"""What becomes of an adapter on a sibling of its model. Without a command: demo."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from benchmarks.provenance import ROOT
from benchmarks.tiny.driver import PARTS, plan, run
from benchmarks.tiny.progress import Bars, Reporter
from benchmarks.tiny.results import SCHEMA, Cells, Results, write_results
from benchmarks.tiny.settings import PRESETS, Settings

RESULTS = Path(__file__).parent / "results"
SCRATCH = ROOT / "runs" / "tiny"


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, write; the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or (given[0].startswith("-") and given[0] not in ("-h", "--help")):
        given = ["demo", *given]
    parsed = _parser().parse_args(given)
    bars = Bars()
    try:
        results = {"pair": _pair, "render": _render}.get(parsed.preset, _preset)(parsed, bars)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        bars.say("\nInterrupted. Nothing half-written is left; the same command goes on after the last finished cell.")
        return 130
    if results is None:
        return 0
    from benchmarks.tiny.report import html
    from benchmarks.tiny.terminal import show

    show(results, bars.console)
    try:
        paths = write_results(results, parsed.out, html)
    except OSError as error:
        print(
            f"error: nothing was written to {parsed.out}: {error}. The same command with another --out runs again.",
            file=sys.stderr,
        )
        return 1
    if parsed.preset != "render":
        _cells(parsed).clear()
    bars.say(f"\nwritten: {', '.join(str(path) for path in paths.values())}")
    bars.say(f"open {paths['html']} in a browser")
    return 0


def _preset(parsed: argparse.Namespace, progress: Reporter) -> Results | None:
    settings = PRESETS["short"] if parsed.short else PRESETS[parsed.preset]
    if parsed.seeds:
        settings = replace(settings, seeds=tuple(parsed.seeds))
    parsed.preset = settings.preset
    parsed.out = parsed.out or (RESULTS if settings.preset == "full" else SCRATCH)
    if parsed.plan:
        _show_plan(settings, parsed, progress)
        return None
    _prepare(parsed.threads)
    return run(settings, _cells(parsed), progress, parsed.only)


def _pair(parsed: argparse.Namespace, progress: Reporter) -> Results | None:
    from benchmarks.tiny.pair import PairSettings, run_pair

    settings = PairSettings(
        source=parsed.source,
        target=parsed.target,
        text=str(parsed.text),
        rank=parsed.rank,
        target_modules=tuple(parsed.target_modules),
        steps=parsed.steps,
        batch=parsed.batch,
        length=parsed.length,
        learning_rates=tuple(parsed.lr),
        seeds=tuple(parsed.seeds or [0]),
        retrain=parsed.retrain,
        device=parsed.device,
        dtype=parsed.dtype,
    )
    parsed.out = parsed.out or SCRATCH
    if parsed.plan:
        for name, value in asdict(settings).items():
            progress.say(f"{name}: {value}")
        return None
    _prepare(parsed.threads)
    return run_pair(settings, _cells(parsed), progress)


def _render(parsed: argparse.Namespace, progress: Reporter) -> Results:
    parsed.out = parsed.results.parent
    try:
        results: Results = json.loads(parsed.results.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{parsed.results} cannot be read: {error}. Give the JSON file that a run has written."
        ) from None
    if not isinstance(results, dict) or results.get("schema") != SCHEMA:
        raise ValueError(f"{parsed.results} is not a result of this benchmark in schema {SCHEMA}.")
    return results


def _cells(parsed: argparse.Namespace) -> Cells:
    cells = Cells(parsed.out / f".unfinished-{parsed.preset}")
    if parsed.fresh:
        cells.clear()
    return cells


def _prepare(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    # PEFT 0.21 asks transformers 5 whether gradient checkpointing is on, by the old name
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)


def _show_plan(settings: Settings, parsed: argparse.Namespace, progress: Reporter) -> None:
    lm = settings.lm
    progress.say(f"preset {settings.preset}, seeds {', '.join(map(str, settings.seeds))}, written to {parsed.out}")
    for name in plan(settings, parsed.only):
        progress.say(f"  {name}")
    if "lm" in parsed.only:
        progress.say(f"lm: {lm.pretrain_steps} steps of pre-training, {lm.adapt_steps} per adapter")
        for placement in lm.placements:
            rates = ", ".join(f"{space} {rate:g}" for space, rate in placement.learning_rates.items())
            tuned = f"chosen on the source from {lm.learning_rate_grid}" if lm.learning_rate_grid else rates
            progress.say(f"  adapters on {placement.part}; learning rates: {tuned}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tiny", description=__doc__)
    presets = parser.add_subparsers(dest="preset", required=True)

    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--out", type=Path, help="folder for the results")
    common.add_argument("--seeds", type=int, nargs="+", help="instead of the seeds of the preset")
    common.add_argument("--threads", type=int, default=1, help="torch threads (default: 1)")
    common.add_argument("--plan", action="store_true", help="say what would run, and stop")
    common.add_argument("--fresh", action="store_true", help="do not go on from an interrupted run")

    for name, text in {"demo": "one seed, a few minutes", "full": "three seeds; the committed results"}.items():
        preset = presets.add_parser(name, parents=[common], help=text)
        preset.add_argument("--short", action="store_true", help="a few steps of everything: does it run?")
        preset.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="run these parts alone")

    pair = presets.add_parser("pair", parents=[common], help="two checkpoints and a text file of your own")
    pair.add_argument("--source", required=True, help="folder or hub id of the model to train adapters on")
    pair.add_argument("--target", required=True, help="folder or hub id of the model to carry them to")
    pair.add_argument("--text", type=Path, required=True, help="text file, one example per line")
    pair.add_argument("--rank", type=int, default=8)
    pair.add_argument("--target-modules", nargs="+", default=["q_proj", "v_proj"])
    pair.add_argument("--steps", type=int, default=200)
    pair.add_argument("--batch", type=int, default=8)
    pair.add_argument("--length", type=int, default=128, help="longest example, in tokens")
    pair.add_argument(
        "--lr",
        type=float,
        nargs="+",
        default=[3e-4, 1e-3, 3e-3],
        help="each space takes its best of these on the source",
    )
    pair.add_argument("--retrain", action="store_true", help="also train a LoRA on the target")
    pair.add_argument("--device", default="cpu")
    pair.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])

    render = presets.add_parser(
        "render", help="write the Markdown and HTML of a JSON again, after a change of their code"
    )
    render.add_argument("results", type=Path, help="the JSON file of a run")
    return parser
