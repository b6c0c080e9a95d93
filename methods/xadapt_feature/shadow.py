"""A model of nothing but identity linears at the places of the target layers, for tuners that look at whole models."""

from __future__ import annotations

from torch import nn

from xadapt.peft_internals import BaseTunerLayer

from .base_layer import describe
from .identity import IdentityLinear
from .spaces import Space


def shadow_of(model: nn.Module, targets: dict[str, nn.Module], space: Space) -> nn.Module:
    """Identities of the width that each target has in this space, under the same paths, with the model's config."""
    shadow = nn.Module()
    if hasattr(model, "config"):
        shadow.config = model.config
    for path, module in targets.items():
        layer = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        base = describe(layer)
        parent = shadow
        *parents, name = path.split(".")
        for part in parents:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(name, IdentityLinear(space.width(base.in_features, base.out_features), beside=layer))
    return shadow
