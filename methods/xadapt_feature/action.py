"""Φ of a hosted PEFT layer as tensors: its low-rank factors where it has some, else its action on the identity."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from xadapt.matrix import Dense, low_rank_sum
from xadapt.peft_internals import HostedLayer, LoraLinear

from .phi import Phi


def phi_of(hosted: HostedLayer, adapter_names: Sequence[str], like: Tensor) -> Phi:
    """Φ of these adapters together, on the device and in the dtype of `like`."""
    names = [name for name in adapter_names if name in hosted._get_available_adapters()]
    if all(is_plain_lora(hosted, name) for name in names):
        return _factors(cast(LoraLinear, hosted), names, like)
    return _action_on_identity(hosted, names, like)


def is_plain_lora(hosted: nn.Module, adapter_name: str) -> bool:
    """Whether the adapter is x + s·B(Ax) and no variant of it (DoRA ...); dropout and an offset are no variant."""
    return isinstance(hosted, LoraLinear) and adapter_name not in hosted.lora_variant


def _factors(hosted: LoraLinear, names: Sequence[str], like: Tensor) -> Phi:
    pairs, offset = [], None
    for name in names:
        a, b = cast(nn.Linear, hosted.lora_A[name]), cast(nn.Linear, hosted.lora_B[name])
        scaling = hosted.scaling[name]
        pairs.append((a.weight.detach().to(like), b.weight.detach().to(like), scaling))
        if b.bias is not None:
            moved = b.bias.detach().to(like) * scaling
            offset = moved if offset is None else offset + moved
    return Phi(low_rank_sum(pairs), offset)


def _action_on_identity(hosted: HostedLayer, names: Sequence[str], like: Tensor) -> Phi:
    identity = torch.eye(hosted.base_layer.in_features, device=like.device, dtype=like.dtype)
    with torch.no_grad(), _evaluating(hosted, list(names)):
        # Row i is Φ(eᵢ); the row of zeros tells the constant.
        rows = hosted(torch.cat([identity, identity.new_zeros(1, len(identity))]))
    constant = rows[-1]
    delta = (rows[:-1] - constant).T - identity
    return Phi(Dense(delta), constant if constant.any() else None)


@contextmanager
def _evaluating(hosted: HostedLayer, names: list[str]) -> Iterator[None]:
    """The hosted layer without dropout, with these adapters active and enabled; afterwards as it was."""
    training = {module: module.training for module in hosted.modules()}
    active, disabled = hosted._active_adapter, hosted._disable_adapters
    try:
        hosted.eval()
        hosted._active_adapter, hosted._disable_adapters = names, False
        yield
    finally:
        hosted._active_adapter, hosted._disable_adapters = active, disabled
        for module, flag in training.items():
            module.training = flag
