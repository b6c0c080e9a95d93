"""python -m benchmarks.cost [--device cpu] [--seconds 8] [--out benchmarks/cost/results] [--short]"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from .measure import peak_memory, ratio, time_in_turns
from .report import markdown, write
from .settings import VARIANTS, Cell, cells
from .stacks import TrainingStep


def measure(cell: Cell, seconds: float) -> dict[str, Any]:
    """One row: every variant's time and peak memory, and their ratios to PEFT's LoRA."""
    steps = {variant: TrainingStep(cell, variant) for variant in VARIANTS}
    times = time_in_turns(steps, seconds, cell.device)
    memory = {variant: peak_memory(step, cell.device) for variant, step in steps.items()}
    return {
        "cell": asdict(cell),
        "name": cell.name(),
        "rounds": len(times["lora"]),
        "seconds": {variant: sorted(t)[len(t) // 2] for variant, t in times.items()},
        "time_to_lora": {v: ratio(times, v, "lora") for v in VARIANTS if v != "lora"},
        "bytes": memory,
        "memory_to_lora": {v: memory[v] / memory["lora"] for v in VARIANTS if v != "lora"},
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cost", description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=8, help="timed seconds per cell")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/cost/results"))
    parser.add_argument("--short", action="store_true", help="two small cells: does it run?")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    console = Console()
    rows = [
        measure(cell, options.seconds)
        for cell in track(cells(options.device, options.short), "training steps", console=console)
    ]
    write(rows, options)
    console.print(markdown(rows))


if __name__ == "__main__":
    main()
