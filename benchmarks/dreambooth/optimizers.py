"""The optimisers of a preset; those that are packages of their own only when they are asked for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from benchmarks.dreambooth.settings import Optimizer

WHERE = {"prodigyopt": "'xadapt[prodigy]'", "bitsandbytes": "bitsandbytes"}


def optimizer(settings: Optimizer, parameters: Iterable[nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
    """AdamW, AdamW of 8 bits, or Prodigy with the options of diffusers' training scripts.

    Raises:
        ValueError: its package is not installed; the message says which.
    """
    betas, decay = settings.betas, settings.weight_decay
    if settings.name == "adamw":
        return torch.optim.AdamW(parameters, learning_rate, betas=betas, weight_decay=decay)
    if settings.name == "adamw8bit":
        found: torch.optim.Optimizer = _package("bitsandbytes").optim.AdamW8bit(
            parameters, lr=learning_rate, betas=betas, weight_decay=decay
        )
        return found
    prodigy: torch.optim.Optimizer = _package("prodigyopt").Prodigy(
        parameters,
        lr=learning_rate,
        betas=betas,
        weight_decay=decay,
        decouple=True,
        use_bias_correction=True,
        safeguard_warmup=True,
    )
    return prodigy


def check_installed(settings: Optimizer) -> None:
    """Raises ValueError if the optimiser's package is not there."""
    package = {"adamw8bit": "bitsandbytes", "prodigy": "prodigyopt"}.get(settings.name)
    if package is not None:
        _package(package)


def _package(package: str) -> Any:
    from importlib import import_module

    try:
        return import_module(package)
    except ImportError:
        raise ValueError(
            f"this optimizer is in the package {package}, which is not installed: pip install {WHERE[package]}, or set "
            'optimizer.name = "adamw" with a learning rate of its own.'
        ) from None
