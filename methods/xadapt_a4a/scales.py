"""λ per layer, from a number, a list, or a dict by blocks as diffusers' set_ip_adapter_scale takes it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from xadapt.errors import did_you_mean

Scale = float | Sequence[float] | Mapping[str, Any]

_SHORT = {"down": "down_blocks", "mid": "mid_block", "up": "up_blocks"}


def layer_scales(scale: Scale, layers: Sequence[str]) -> list[float]:
    """One λ for each layer.

    Args:
        scale: a number for all; a list with one for each layer; or a dict by block. The keys of a dict are parts of a layer's
            path ("transformer_blocks.3", "up_blocks"), or diffusers' short forms, nested as there:
            {"up": {"block_0": [0.0, 1.0, 0.0]}}, a list having one number per `attentions.<i>` of the block. Layers that no
            key names get 0.
        layers: the layers' paths.

    Raises:
        ValueError: a number is not finite, the length is wrong, or a key names no layer.
        TypeError: it is none of the three.
    """
    if isinstance(scale, Mapping):
        return _by_block(_flatten(scale, ""), layers)
    if isinstance(scale, Sequence) and not isinstance(scale, str):
        if len(scale) != len(layers):
            raise ValueError(f"scale has {len(scale)} numbers; the target has {len(layers)} layers. Give one for each.")
        return [_number(one) for one in scale]
    return [_number(scale)] * len(layers)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"scale={value!r}; write a number, a list of numbers, or a dict such as {{'up': 1.0}}.")
    if not math.isfinite(value):
        raise ValueError(f"scale={value!r} is not finite; 0 leaves the target as it is, 1.0 is what training used.")
    return float(value)


def _flatten(scale: Mapping[str, Any], above: str) -> dict[str, Any]:
    """{"up": {"block_0": [0.0, 1.0]}} → {"up_blocks.0.attentions.0": 0.0, "up_blocks.0.attentions.1": 1.0}"""
    flat: dict[str, Any] = {}
    for key, value in scale.items():
        if above:
            part = re.sub(r"^(block|layer)_(\d+)$", r"\2", key)
            path = f"{above}.{part}"
        else:
            path = _SHORT.get(key, key)
        if isinstance(value, Mapping):
            flat.update(_flatten(value, path))
        elif isinstance(value, Sequence) and not isinstance(value, str):
            flat.update({f"{path}.attentions.{index}": one for index, one in enumerate(value)})
        else:
            flat[path] = value
    return flat


def _by_block(scales: Mapping[str, Any], layers: Sequence[str]) -> list[float]:
    for path in scales:
        if not any(_is_in(layer, path) for layer in layers):
            blocks = sorted({".".join(layer.split(".")[:depth]) for layer in layers for depth in (1, 2, 4)})
            raise ValueError(f"scale names {path!r}, where no layer is. {did_you_mean(path, blocks, limit=8)}")
    found = []
    for layer in layers:
        nearest = max((path for path in scales if _is_in(layer, path)), key=len, default=None)
        found.append(0.0 if nearest is None else _number(scales[nearest]))
    return found


def _is_in(layer: str, path: str) -> bool:
    return layer == path or layer.startswith(f"{path}.")
