"""The accelerator that a run trains through: devices, processes, precision and trackers are its business."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from torch import nn

from xadapt.errors import did_you_mean

from .coupling import check_choice

PRECISIONS = ("", "no", "bf16", "fp16")


@contextmanager
def accelerator_for(
    given: Accelerator | None, *, accumulate: int, mixed_precision: str, log_with: str, folder: str
) -> Iterator[Accelerator]:
    """The accelerator given, or a new one, of which nothing is left afterwards.

    Args:
        accumulate: the number of batches per step and process.
        mixed_precision: "no", "bf16" or "fp16"; "" is what `accelerate launch` or `accelerate config` say.
        log_with: names of trackers, with commas between them ("tensorboard, wandb"); "" for none.
        folder: where trackers that write files write them.

    Raises:
        ValueError: a tracker is not known or not installed, or the accelerator given accumulates otherwise.
    """
    check_choice("mixed_precision", mixed_precision, PRECISIONS)
    if accumulate < 1:
        raise ValueError(f"accumulate={accumulate}: the number of batches per step is 1 or more.")
    if given is not None:
        if given.gradient_accumulation_steps != accumulate:
            raise ValueError(
                f"The accelerator was made with gradient_accumulation_steps={given.gradient_accumulation_steps}; write "
                f"accumulate={given.gradient_accumulation_steps} as well (it is {accumulate})."
            )
        yield given
        return
    fresh = not AcceleratorState._shared_state
    names = _trackers(log_with)
    accelerator = Accelerator(
        mixed_precision=mixed_precision or None,
        gradient_accumulation_steps=accumulate,
        log_with=names or None,
        project_dir=folder or ".",
    )
    try:
        yield accelerator
    finally:
        for tracker in getattr(accelerator, "trackers", []):
            tracker.finish()
        if fresh:  # else a second run in this process could have no other precision
            AcceleratorState._reset_state()


def _trackers(log_with: str) -> list[str]:
    """The names in it; ValueError if one is not known or not installed, which accelerate would pass over."""
    names = [name.strip() for name in log_with.split(",") if name.strip()]
    known = sorted(str(one) for one in LOGGER_TYPE_TO_CLASS)
    installed = [str(one) for one in get_available_trackers()]
    for name in names:
        if name not in known:
            raise ValueError(f"log_with={log_with!r}: there is no tracker {name!r}. {did_you_mean(name, known)}")
        if name not in installed:
            raise ValueError(f"log_with={log_with!r}: {name} is not installed. pip install {name.replace('_', '-')}")
    return names


@contextmanager
def placed(target: nn.Module, accelerator: Accelerator) -> Iterator[torch.device]:
    """The target where it trains, and back where it was afterwards.

    A target that lies on an accelerator already stays there when there is one process.
    """
    home = next(target.parameters()).device
    device = home if accelerator.num_processes == 1 and home.type not in ("cpu", "meta") else accelerator.device
    moved = device != home
    if moved:
        target.to(device)
    try:
        yield device
    finally:
        if moved:
            target.to(home)


@contextmanager
def recomputing(target: Any, asked: bool) -> Iterator[None]:
    """The target with gradient checkpointing, and as it was afterwards.

    Raises:
        ValueError: it has none.
    """
    if not asked or getattr(target, "is_gradient_checkpointing", False):
        yield
        return
    if not hasattr(target, "enable_gradient_checkpointing") or not getattr(
        target, "_supports_gradient_checkpointing", True
    ):
        raise ValueError(f"{type(target).__name__} has no gradient checkpointing. Set checkpointing=False.")
    target.enable_gradient_checkpointing()
    try:
        yield
    finally:
        target.disable_gradient_checkpointing()


def to_device(value: Any, device: torch.device) -> Any:
    """A batch's tensors, in dicts as well, on the device."""
    if isinstance(value, Mapping):
        return {name: to_device(one, device) for name, one in value.items()}
    return value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
