"""MᵀM without a second copy of M."""

from __future__ import annotations

from torch import Tensor

from xadapt.matrix import ROWS


def gram(tall: Tensor, like: Tensor) -> Tensor:
    """MᵀM of a tall matrix, in the dtype of `like`, a few rows at a time."""
    width = tall.shape[1]
    squares = like.new_zeros(width, width)
    step = max(ROWS, width)  # strips no larger than the result
    for start in range(0, tall.shape[0], step):
        strip = tall[start : start + step].to(like)
        squares.addmm_(strip.T, strip)
    return squares
