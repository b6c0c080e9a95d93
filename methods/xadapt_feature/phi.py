"""The feature map Φ(x) = x + Δx + c as tensors, and how it folds into a weight. Pure tensor functions.

Shapes: Δ is (d, d) and acts on column vectors; a weight is a matrix of shape (rows, columns). Which side of the
weight Φ comes to stand on is the business of `spaces.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Dense:
    """A matrix that is stored as it is."""

    matrix: Tensor

    def tensor(self) -> Tensor:
        return self.matrix

    def after(self, weight: Tensor) -> Dense:
        """weight @ Δ"""
        return Dense(weight @ self.matrix)

    def before(self, weight: Tensor) -> Dense:
        """Δ @ weight"""
        return Dense(self.matrix @ weight)


@dataclass(frozen=True)
class LowRank:
    """left (m, r) @ right (r, n), multiplied out only on demand."""

    left: Tensor
    right: Tensor

    def tensor(self) -> Tensor:
        return self.left @ self.right

    def after(self, weight: Tensor) -> LowRank:
        """weight @ Δ, of the same rank: no decomposition is needed."""
        return LowRank(weight @ self.left, self.right)

    def before(self, weight: Tensor) -> LowRank:
        """Δ @ weight, of the same rank."""
        return LowRank(self.left, self.right @ weight)


Matrix = Dense | LowRank


@dataclass(frozen=True)
class Phi:
    """Φ(x) = x + delta·x + offset; the offset is None for every adapter without a bias of its own."""

    delta: Matrix
    offset: Tensor | None = None


def low_rank_sum(pairs: list[tuple[Tensor, Tensor, float]]) -> LowRank:
    """Σ sᵢ BᵢAᵢ as one low-rank matrix, by concatenation.

    Args:
        pairs: (A, B, s) per adapter, A of shape (r, n), B of shape (m, r); s is the adapter's own scaling. This is
            the only place where the scaling is folded into the factors.
    """
    left = torch.cat([b * s for _, b, s in pairs], dim=1)
    right = torch.cat([a for a, _, _ in pairs], dim=0)
    return LowRank(left, right)
