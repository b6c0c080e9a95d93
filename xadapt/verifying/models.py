"""Models with and without adapters, and what they answer."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from xadapt.contract import Adapter, Base
from xadapt.data.batches import on_device
from xadapt.kinds import PeftKind
from xadapt.store import load
from xadapt.transferring.writing import write_folder

NAME = "xadapt_verify"


@contextmanager
def adapted(base: Base, adapter: Adapter) -> Iterator[PeftModel]:
    """The live base with an adapter on it; afterwards it is as before.

    Raises:
        ValueError: the adapter does not fit this base, or is of a format that PEFT does not put on models.
    """
    if not isinstance(adapter.kind, PeftKind):
        raise ValueError(
            f"An adapter of kind {adapter.kind.name!r} is not put on a model by PEFT, so it cannot be run here: run its own model, "
            "and compare with --metric."
        )
    model = base.module()
    was_training = model.training
    with tempfile.TemporaryDirectory() as folder:
        write_folder(_unsigned(adapter), Path(folder), base)
        peft = load(model, folder, NAME, torch_device=str(_device(model)))
    try:
        yield peft.eval()
    finally:
        peft.unload()
        if hasattr(model, "peft_config"):
            del model.peft_config
        model.train(was_training)


def answer(model: nn.Module, batch: Mapping[str, Any], base: Base) -> Tensor:
    """What a model returns: logits (samples, length, vocabulary), or a denoiser's prediction.

    Raises:
        ValueError: its forward takes other arguments, or returns neither.
    """
    try:
        with torch.no_grad():
            result: Any = model(**on_device(batch, model))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{base.name} does not take the data's batches ({', '.join(batch)}): {error}") from error
    for name in ("logits", "sample"):
        if isinstance(getattr(result, name, None), Tensor):
            return getattr(result, name)  # type: ignore[no-any-return]  # models' outputs are untyped
    if isinstance(result, tuple) and result and isinstance(result[0], Tensor):
        return result[0]
    raise ValueError(
        f"{base.name} returns {type(result).__name__}, neither logits nor a predicted noise: behaviours are compared for causal language "
        "models and denoisers."
    )


def _unsigned(adapter: Adapter) -> Adapter:
    """Without the fingerprint of its base: that this may be another one is what is being looked at."""
    if not getattr(adapter.config, "base_fingerprint", None):
        return adapter
    config = copy.copy(adapter.config)
    config.base_fingerprint = None
    return replace(adapter, config=config)


def _device(model: nn.Module) -> torch.device:
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device
