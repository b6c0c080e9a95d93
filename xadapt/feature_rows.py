"""A layer's features on a batch as rows, one per position: what check compares and what aligned methods learn from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

MASKS = ("attention_mask", "encoder_attention_mask")


def rows_of(features: Tensor, module: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Features as (rows, width): the channels of a convolution come last, and positions that a mask hides are left out.

    Args:
        features: (…, width), or (samples, channels, height, width) before or behind a convolution.
        module: the layer that reads or returns them.
        batch: the arguments of the forward, with its masks (samples, length).
    """
    ordered = features.movedim(1, -1) if isinstance(module, nn.modules.conv._ConvNd) else features
    for name in MASKS:
        mask = batch.get(name)
        if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape == ordered.shape[:-1]:
            return ordered[mask.to(ordered.device) > 0]
    return ordered.reshape(-1, ordered.shape[-1])
