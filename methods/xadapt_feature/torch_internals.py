"""What this package takes from inside PyTorch, with the reason."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad


def is_transformed(*tensors: Tensor) -> bool:
    """Whether torch.func (grad, vmap, jvp ...) or forward-mode differentiation looks on.

    Both want more of an autograd function than a backward pass. For torch.func there is no public question to ask;
    `torch.autograd.Function.apply` asks this one.
    """
    return torch._C._are_functorch_transforms_active() or any(
        forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors
    )
