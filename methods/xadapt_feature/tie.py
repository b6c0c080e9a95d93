"""Tied adaptation: layers that read the same features share one adapter, stored once.

Cross-attention k and v of every block read the same text tokens; q, k and v of one block read the same hidden
states. What an adapter learns about those features is one thing, so it can be one pair A, B.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from xadapt.peft_internals import HostedLayer, onload_layer
from xadapt.update import Update

from .layer import FeatureLayer


def tie_key(tie: str | list[str] | None, path: str) -> tuple[str | None, ...] | None:
    """The group of a layer, or None if it stays on its own.

    A pattern is searched in the layer's path; layers with equal captured groups share an adapter. So
    `r"attn2\\.to_[kv]$"` makes one group of them all, and `r"(layers\\.\\d+\\.self_attn)\\.[qkv]_proj$"` one per block.
    """
    for pattern in [tie] if isinstance(tie, str) else tie or []:
        match = re.search(pattern, path)
        if match is not None:
            return (pattern, *match.groups())
    return None


def groups_of(tie: str | list[str] | None, paths: Iterable[str]) -> list[list[str]]:
    """The layers that are to share an adapter; one that shares with none is a group of its own."""
    groups: dict[object, list[str]] = {}
    for path in paths:
        groups.setdefault(tie_key(tie, path) or path, []).append(path)
    return list(groups.values())


def tied_groups(model: nn.Module) -> dict[str, list[str]]:
    """For each layer that is adapted, those that share its adapter, itself included."""
    groups: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        if isinstance(module, FeatureLayer):
            groups.setdefault(id(module.hosted), []).append(path)
    return {path: group for group in groups.values() for path in group}


class TiedLayer(FeatureLayer):
    """A layer that uses the hosted adapter of another one, its leader; it has no adapter child of its own."""

    def __init__(self, leader: FeatureLayer, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        del self._modules[self.phi_name]
        self._leader = (leader,)  # in a tuple, or its tensors would be stored a second time

    @property
    def hosted(self) -> HostedLayer:
        return self._leader[0].hosted

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or "_leader" not in self.__dict__:
            return super().__getattr__(name)
        try:
            return super().__getattr__(name)
        except AttributeError:
            return self._hosted_attribute(name)

    def folded(self, adapter_names: Sequence[str], weight: Tensor, bias: Tensor | None) -> Update:
        with onload_layer(self._leader[0]):  # accelerate may have offloaded the leader's tensors
            return super().folded(adapter_names, weight, bias)

    @property
    def scaling(self) -> dict[str, float]:
        return self._leader[0].scaling

    @scaling.setter
    def scaling(self, scaling: dict[str, float]) -> None:
        """Nothing, see `scale_layer`."""

    def scale_layer(self, scale: float) -> None:
        """Nothing: the leader is scaled, and scaling is not done twice."""

    def unscale_layer(self, scale: float | None = None) -> None:
        """Nothing, see `scale_layer`."""
