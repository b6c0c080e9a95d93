"""The feature map Φ(x) = x + Δx + c as tensors.

Δ is (d, d) and acts on column vectors. Which side of the weight Φ comes to stand on is the business of `spaces.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from xadapt.matrix import Matrix


@dataclass(frozen=True)
class Phi:
    """Φ(x) = x + delta·x + offset; the offset is None for every adapter without a bias of its own."""

    delta: Matrix
    offset: Tensor | None = None
