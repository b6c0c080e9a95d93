"""What is kept of the features of a pair of layers: second moments over a stream of tokens, never the activations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Moments:
    """Sums over tokens, of features x (n,) of the source and x′ (n′,) of the target at the same positions."""

    source: Tensor  # Σ x xᵀ (n, n)
    target: Tensor  # Σ x′ x′ᵀ (n′, n′)
    cross: Tensor  # Σ x′ xᵀ (n′, n)
    total: Tensor  # Σ x (n,)
    count: int = 0

    @classmethod
    def empty(cls, source: int, target: int, like: Tensor) -> Moments:
        """Of these widths, in the dtype and on the device of `like`."""
        return cls(
            like.new_zeros(source, source),
            like.new_zeros(target, target),
            like.new_zeros(target, source),
            like.new_zeros(source),
        )

    def add(self, source: Tensor, target: Tensor) -> None:
        """Counts in tokens: (N, n) and (N, n′), of any dtype and device."""
        x, other = source.to(self.source), target.to(self.source)
        self.source.addmm_(x.T, x)
        self.target.addmm_(other.T, other)
        self.cross.addmm_(other.T, x)
        self.total.add_(x.sum(0))
        self.count += x.shape[0]

    @property
    def turned(self) -> Moments:
        """The same with the roles changed. Without sums of x′, which no map needs: `total` is NaN."""
        return Moments(
            self.target, self.source, self.cross.T, torch.full_like(self.target[0], float("nan")), self.count
        )

    @property
    def widths(self) -> tuple[int, int]:
        """(n, n′)"""
        return self.cross.shape[1], self.cross.shape[0]
