"""A model's own biases, where an adapter with trained ones (bias="all", bias="lora_only") is put on it for a while.

PEFT writes such biases over the model's, and leaves them there when the adapter is disabled or taken off.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn


@contextmanager
def own_biases(model: nn.Module, config: Any) -> Iterator[Callable[[PeftModel], None]]:
    """The model has its own biases again after the block; what is yielded sees to it that the adapted model, disabled, has them too."""
    trained = getattr(config, "bias", "none") != "none"
    own = _copies(parameter for name, parameter in model.named_parameters() if trained and name.endswith("bias"))

    def disables_them(adapted: PeftModel) -> None:
        if own:
            _swap_while_disabled(adapted, own)

    try:
        yield disables_them
    finally:
        _set(own)


def _swap_while_disabled(adapted: Any, own: Mapping[Tensor, Tensor]) -> None:
    disabled_but_for_biases = adapted.disable_adapter

    @contextmanager
    def disabled() -> Iterator[None]:
        learnt = _copies(own)
        _set(own)
        try:
            with ExitStack() as stack:
                with warnings.catch_warnings():  # of what is seen to here
                    warnings.filterwarnings("ignore", message="Careful, disabling adapter layers")
                    stack.enter_context(disabled_but_for_biases())
                yield
        finally:
            _set(learnt)

    adapted.disable_adapter = disabled


def _copies(parameters: Any) -> dict[Tensor, Tensor]:
    return {parameter: parameter.detach().clone() for parameter in parameters}


@torch.no_grad()
def _set(values: Mapping[Tensor, Tensor]) -> None:
    for parameter, value in values.items():
        parameter.copy_(value)
