"""An adapter on a live network for the time being: afterwards the network is as it was."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from torch import Tensor, nn

from xadapt.attached import PREFIX, WIDE
from xadapt.contract import Adapter
from xadapt.errors import some
from xadapt.own_biases import own_biases


@contextmanager
def attached(network: nn.Module, config: PeftConfig, adapter: Adapter | None = None) -> Iterator[PeftModel]:
    """The network with an adapter of this config, fresh or with the adapter's tensors.

    Raises:
        ValueError: the adapter does not fit the network.
    """
    training = {module: module.training for module in network.modules()}
    learning = {parameter: parameter.requires_grad for parameter in network.parameters()}
    model: Any = None
    try:
        with own_biases(network, config) as bare:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of PEFT's, about how others may train it
                model = get_peft_model(network, copy.deepcopy(config))
                if adapter is not None:
                    _fill(model, adapter)
            bare(model)
            yield model
    finally:
        if model is not None:
            model.unload()
        for module, mode in training.items():
            module.training = mode
        for parameter, learns in learning.items():
            parameter.requires_grad_(learns)
        vars(network).pop("peft_config", None)


def _fill(model: PeftModel, adapter: Adapter) -> None:
    tensors = {name if name.startswith(WIDE) else PREFIX + name: tensor for name, tensor in adapter.tensors.items()}
    try:
        result: Any = set_peft_model_state_dict(model, tensors)
    except RuntimeError as error:
        raise ValueError(f"The adapter does not fit the source: {error}") from error
    missing = [name for name in result.missing_keys if name.endswith(tuple(adapter.tensors))]
    if result.unexpected_keys or missing:
        wrong = sorted([*result.unexpected_keys, *missing])
        raise ValueError(
            f"The adapter does not fit the source; these tensors have no place or are not there: {some(wrong)}."
        )


def answers(model: PeftModel, batch: dict[str, Any]) -> tuple[Any, Any]:
    """What the network answers without and with its adapter; no gradients."""
    with torch.no_grad():
        with model.disable_adapter():
            bare = model(**batch)
        return bare, model(**batch)


def device_of(network: nn.Module) -> torch.device:
    return next((parameter.device for parameter in network.parameters()), torch.device("cpu"))


def moved(batch: dict[str, Any], to: torch.device) -> dict[str, Any]:
    return {name: value.to(to) if isinstance(value, Tensor) else value for name, value in batch.items()}
