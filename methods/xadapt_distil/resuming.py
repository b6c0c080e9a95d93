"""The state of an interrupted run in one file: what is trained, the optimizer's moments, the losses so far."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from xadapt.files import save_tensors

FILE = "distil.safetensors"


def save_state(
    folder: str,
    settings: Mapping[str, Any],
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    losses: list[float],
) -> None:
    """Whole or not at all: the old file stays until the new one is written."""
    tensors = {f"parameter {name}": parameter.detach().cpu().contiguous() for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        for part, value in optimizer.state[parameter].items():
            tensors[f"{part} {name}"] = torch.as_tensor(value).detach().cpu().clone()
    tensors["losses"] = torch.tensor(losses, dtype=torch.float64)
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    part_file = place / f".{FILE}.{os.getpid()}"
    try:
        save_tensors(tensors, part_file, metadata={"settings": json.dumps(dict(settings), sort_keys=True)})
        os.replace(part_file, place / FILE)
    finally:
        part_file.unlink(missing_ok=True)


def load_state(
    folder: str, settings: Mapping[str, Any], parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> list[float]:
    """The losses of the steps that are done, with parameters and optimizer as they were then. Empty where nothing was saved.

    Raises:
        ValueError: the file is damaged, or is of a run with other settings, another adapter or other data.
    """
    path = Path(folder) / FILE
    if not path.exists():
        return []
    try:
        with safe_open(path, framework="pt") as opened:
            told = json.loads((opened.metadata() or {})["settings"])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (it is no mapping)
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is no state of a distillation ({error}). Delete it to start anew.") from error
    wanted = json.loads(json.dumps(dict(settings)))
    differ = [name for name in {**wanted, **told} if wanted.get(name) != told.get(name)]
    if differ:
        said = "; ".join(f"{name} was {told.get(name)!r}, now {wanted.get(name)!r}" for name in sorted(differ))
        raise ValueError(f"{path} is of another run: {said}. Choose another checkpoint folder, or delete this one.")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"parameter {name}"])
    for name, parameter in parameters.items():
        parts = {part.removesuffix(f" {name}"): value for part, value in tensors.items() if part.endswith(f" {name}")}
        parts.pop("parameter")
        optimizer.state[parameter] = {
            part: value if part == "step" else value.to(parameter) for part, value in parts.items()
        }
    return [float(loss) for loss in tensors["losses"]]


def digest(tensors: Mapping[str, Any]) -> str:
    """A few letters that tell these tensors from others."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name]
        found.update(name.encode())
        if isinstance(value, Tensor):
            found.update(str((value.dtype, tuple(value.shape))).encode())
            found.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]
