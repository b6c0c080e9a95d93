"""Whether a tensor is free of NaN and infinity."""

from __future__ import annotations

import torch
from torch import Tensor


def is_finite(tensor: Tensor) -> bool:
    """No NaN and no infinity. Integers have neither.

    A sum shows either of them, in a fraction of the time that looking at each number takes; it can also overflow by itself,
    which the look at each number then settles.
    """
    if not tensor.is_floating_point():
        return True
    if tensor.element_size() == 1:  # the 8-bit floats have neither sums nor isfinite
        tensor = tensor.float()
    if bool(torch.isfinite(tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32)))):
        return True
    return bool(torch.isfinite(tensor).all())
