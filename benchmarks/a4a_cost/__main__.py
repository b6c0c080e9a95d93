"""python -m benchmarks.a4a_cost [--device cpu] [--seconds 30] [--short] [--out benchmarks/a4a_cost/results]"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from benchmarks.a4a_cost.models import Shape
from benchmarks.a4a_cost.steps import Bench
from benchmarks.cost.measure import _LiveStorages, ratio, time_in_turns
from benchmarks.provenance import hardware
from benchmarks.tiny.results import write_together

TOKENS = (4, 16)


def cells(device: str, short: bool) -> list[tuple[Shape, Shape]]:
    """(target, source) pairs: in full shapes on a GPU, and on a CPU as large as it bears."""
    if short:
        divide, side = {"sd15": 8, "sdxl": 16, "pixart": 24}, 8
    elif device == "cpu":
        divide, side = {"sd15": 4, "sdxl": 4, "pixart": 4}, 32
    else:
        divide, side = {"sd15": 1, "sdxl": 1, "pixart": 1}, 128
    titles = {"sd15": "SD1.5", "sdxl": "SDXL", "pixart": "PixArt-α"}

    def shape(kind: str, latents: int) -> Shape:
        small = f" / {divide[kind]}" if divide[kind] > 1 else ""
        return Shape(name=f"{titles[kind]}{small}, {latents}²", kind=kind, divide=divide[kind], side=latents)

    source = shape("sd15", min(side, 64))  # X-Adapter's source keeps its own resolution
    return [(shape(kind, side), source) for kind in ("sdxl", "sd15", "pixart")]


def measure(
    target: Shape, source: Shape, tokens: int, device: str, dtype: torch.dtype, seconds: float
) -> dict[str, Any]:
    """One row: times, their ratios, and peak memory."""
    bench = Bench(target, source, tokens, device, dtype)
    sizes = bench.parameters()
    training = time_in_turns(bench.training(), seconds, device)  # type: ignore[arg-type]  # anything that can be called
    first = time_in_turns(bench.first(), seconds / 3, device)  # type: ignore[arg-type]  # likewise
    steps = bench.denoising()
    times = time_in_turns(steps, seconds, device)  # type: ignore[arg-type]  # likewise
    memory = {name: _peak(step, device) for name, step in steps.items()}
    return {
        "target": target.name,
        "tokens": tokens,
        "rounds": len(times["bare"]),
        "seconds": {name: sorted(t)[len(t) // 2] for name, t in times.items()},
        "to_native": {name: ratio(times, name, "native") for name in times if name != "native"},
        "mapping_to_bare_step": ratio(first, "mapping", "bare"),
        "training_to_scratch": ratio(training, "a4a", "scratch"),
        "bytes": memory,
        "parameters": sizes,
    }


def _peak(step: Any, device: str) -> int:
    """Bytes that a step holds at most beside the weights."""
    if device != "cpu":
        torch.accelerator.synchronize()
        torch.accelerator.reset_peak_memory_stats()
        before: int = torch.accelerator.memory_allocated()
        step()
        return torch.accelerator.max_memory_allocated() - before
    with _LiveStorages() as live:
        step()
    return live.peak


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table; quartiles over rounds in brackets."""
    heads = [
        "target",
        "tokens",
        "step: A4A ÷ native",
        "bare ÷ native",
        "both models ÷ native",
        "mapping once ÷ a bare step",
        "training step: A4A ÷ scratch",
        "peak memory: A4A ÷ native",
        "parameters: A4A, scratch",
    ]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        to_native, memory, sizes = row["to_native"], row["bytes"], row["parameters"]
        cells_of = [
            row["target"],
            str(row["tokens"]),
            *(_quartiles(to_native[name]) for name in ("a4a", "bare", "both models")),
            _quartiles(row["mapping_to_bare_step"]),
            _quartiles(row["training_to_scratch"]),
            f"{memory['a4a'] / memory['native']:.3f}",
            f"{sizes['a4a'] / 1e6:.1f}M, {sizes['scratch'] / 1e6:.1f}M",
        ]
        lines.append(f"| {' | '.join(cells_of)} |")
    return "\n".join(lines)


def _quartiles(given: Sequence[float]) -> str:
    middle, low, high = given
    return f"{middle:.3f} [{low:.3f}, {high:.3f}]"


def write(rows: Sequence[dict[str, Any]], options: argparse.Namespace) -> None:
    """`<device>.json` and `<device>.md`, both or none."""
    load = os.getloadavg()[0] / (os.cpu_count() or 1)
    processor = hardware()["processor"] if options.device == "cpu" else torch.cuda.get_device_name(options.device)
    about = {
        "command": f"python -m benchmarks.a4a_cost --device {options.device} --seconds {options.seconds:g}",
        "processor": processor,
        "threads": options.threads,
        "load_per_core": round(load, 2),
        "versions": {name: version(name) for name in ("torch", "diffusers")},
    }
    text = (
        "# Cost of a reference by A4A\n\n"
        "All variants take turns in one process, batch 2 as under guidance; ratios are medians over rounds, with quartiles. Time is the process's own on a "
        "CPU, the clock's elsewhere. Native: diffusers' IP-Adapter on the same target, which projects its tokens at each step; for PixArt, which "
        "diffusers has none for, ours with the same work. Both models: the target, and the source with its IP-Adapter, as X-Adapter's scheme runs at each step, "
        "without its mapper. Memory: what a step holds at most beside the weights.\n\n"
        f"`{about['command']}` on {processor}, {options.threads} thread(s), the machine's load at the end {about['load_per_core']} per core; "
        f"{', '.join(f'{name} {number}' for name, number in about['versions'].items())}.\n\n{markdown(rows)}\n"
    )
    held = json.dumps({"about": about, "rows": list(rows)}, indent=1, ensure_ascii=False) + "\n"
    write_together({options.out / f"{options.device}.json": held, options.out / f"{options.device}.md": text})


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.a4a_cost", description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=15, help="timed seconds per comparison")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/a4a_cost/results"))
    parser.add_argument("--short", action="store_true", help="small shapes: does it run?")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    console = Console()
    dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
    todo = [(*pair, tokens) for pair in cells(options.device, options.short) for tokens in TOKENS]
    rows = [
        measure(target, source, tokens, options.device, dtype, options.seconds)
        for target, source, tokens in track(todo, "steps", console=console)
    ]
    write(rows, options)
    console.print(markdown(rows), highlight=False)


if __name__ == "__main__":
    main()
