"""The result files: JSON with everything, Markdown for people."""

from __future__ import annotations

import json
import os
import platform
from argparse import Namespace
from importlib.metadata import version
from typing import Any

import torch

from benchmarks.provenance import hardware


def markdown(rows: list[dict[str, Any]]) -> str:
    """Ratios to PEFT's LoRA on the same stack; below 1 is cheaper. Quartiles over rounds in brackets."""
    lines = [
        "| stack | time: floor | input | output | peak memory: floor | input | output |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        times = [_with_quartiles(row["time_to_lora"][v]) for v in ("floor", "input", "output")]
        memory = [f"{row['memory_to_lora'][v]:.3f}" for v in ("floor", "input", "output")]
        lines.append(f"| {row['name']} | {' | '.join([*times, *memory])} |")
    return "\n".join(lines)


def _with_quartiles(ratio: tuple[float, float, float]) -> str:
    middle, low, high = ratio
    return f"{middle:.3f} [{low:.3f}, {high:.3f}]"


def write(rows: list[dict[str, Any]], options: Namespace) -> None:
    """`<device>.json` and `<device>.md` in the folder of results, each whole or not at all."""
    about = {
        "command": f"python -m benchmarks.cost --device {options.device} --seconds {options.seconds}",
        "threads": options.threads,
        "processor": _processor(options.device),
        "versions": {name: version(name) for name in ("torch", "peft", "transformers", "diffusers")},
        "python": platform.python_version(),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    head = (
        "# Cost of a training step, as a ratio to PEFT's LoRA of the same rank on the same layers\n\n"
        "Forward, loss, backward and AdamW, adapters on all linear layers; the steps of all variants take turns in one process. Time is the process's own on a CPU, the clock's elsewhere. "
        "The floor is the frozen base with the gradient of its input and no adapter. Memory is what a step holds at most beside the model: activations, gradients, optimiser state.\n\n"
        f"`{about['command']}` on {about['processor']}, {about['threads']} thread(s), "
        f"{', '.join(f'{k} {v}' for k, v in about['versions'].items())}.\n\n"
    )
    _replace(options.out / f"{options.device}.json", json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    _replace(options.out / f"{options.device}.md", head + markdown(rows) + "\n")


def _replace(path: Any, text: str) -> None:
    temporary = path.with_suffix(path.suffix + ".part")
    temporary.write_text(text)
    os.replace(temporary, path)


def _processor(device: str) -> str:
    return str(hardware()["processor"]) if device == "cpu" else torch.cuda.get_device_name(device)
