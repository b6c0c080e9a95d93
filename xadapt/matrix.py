"""Matrices that stay factored while they can: what adapters are made of. Pure tensor functions.

Products with a weight are taken in the adapter's precision, in strips of rows: a half-precision weight is never copied
whole, and what is being worked on fits the processor's cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ROWS = 128  # measured on one core, 2048 × 8192 in bf16: 2.7 GB/s at 16 rows, 3.5 at 128, 2.4 at 512


@dataclass(frozen=True)
class Dense:
    """A matrix that is stored as it is."""

    matrix: Tensor

    @property
    def energy(self) -> float:
        """‖M‖², the Frobenius norm squared."""
        return sum((float(rows.double().square().sum()) for rows in torch.split(self.matrix, ROWS)), 0.0)

    def tensor(self) -> Tensor:
        return self.matrix

    def after(self, weight: Tensor) -> Dense:
        """weight @ self"""
        return Dense(times(weight, self.matrix))

    def before(self, weight: Tensor) -> Dense:
        """self @ weight"""
        return Dense(times_right(self.matrix, weight))

    @property
    def shape(self) -> tuple[int, int]:
        return self.matrix.shape[0], self.matrix.shape[1]

    @property
    def transposed(self) -> Dense:
        return Dense(self.matrix.T)

    def scaled(self, factor: float) -> Dense:
        return Dense(self.matrix * factor)


@dataclass(frozen=True)
class LowRank:
    """left (m, r) @ right (r, n), multiplied out only on demand."""

    left: Tensor
    right: Tensor

    @property
    def rank(self) -> int:
        return self.left.shape[1]

    @property
    def energy(self) -> float:
        """‖M‖², the Frobenius norm squared, without multiplying out."""
        left, right = self.left.double(), self.right.double()
        return max(0.0, float(((left.T @ left) * (right @ right.T)).sum()))

    def tensor(self) -> Tensor:
        return self.left @ self.right

    def after(self, weight: Tensor) -> LowRank:
        """weight @ self, of the same rank: no decomposition is needed."""
        return LowRank(times(weight, self.left), self.right)

    def before(self, weight: Tensor) -> LowRank:
        """self @ weight, of the same rank."""
        return LowRank(self.left, times_right(self.right, weight))

    @property
    def shape(self) -> tuple[int, int]:
        return self.left.shape[0], self.right.shape[1]

    @property
    def transposed(self) -> LowRank:
        return LowRank(self.right.T, self.left.T)

    def scaled(self, factor: float) -> LowRank:
        return LowRank(self.left * factor, self.right)


Matrix = Dense | LowRank


def low_rank_sum(pairs: Sequence[tuple[Tensor, Tensor, float]]) -> LowRank:
    """Σ sᵢ BᵢAᵢ as one low-rank matrix, by concatenation.

    Args:
        pairs: (A, B, s) per adapter, A of shape (r, n), B of shape (m, r); s is the adapter's own scaling. This is
            the only place where the scaling is folded into the factors.
    """
    left = torch.cat([b * s for _, b, s in pairs], dim=1)
    right = torch.cat([a for a, _, _ in pairs], dim=0)
    return LowRank(left, right)


def add(one: Matrix, other: Matrix) -> Matrix:
    """one + other: of the ranks' sum where both are of low rank."""
    if isinstance(one, LowRank) and isinstance(other, LowRank):
        return LowRank(torch.cat([one.left, other.left], dim=1), torch.cat([one.right, other.right], dim=0))
    return Dense(one.tensor() + other.tensor())


def strips(matrix: Matrix) -> Iterator[Tensor]:
    """The matrix multiplied out, a few rows at a time."""
    if isinstance(matrix, Dense):
        yield from torch.split(matrix.matrix, ROWS)
        return
    for rows in torch.split(matrix.left, ROWS):
        yield rows @ matrix.right


def times(weight: Tensor, right: Tensor) -> Tensor:
    """weight (m, n) @ right (n, r), in the dtype of `right`."""
    if weight.dtype == right.dtype:
        return weight @ right
    if _is_transposed(weight):
        return times_right(right.T, weight.T).T
    product = right.new_empty(weight.shape[0], right.shape[1])
    for strip, rows in _strips(weight, right.dtype):
        torch.mm(strip, right, out=product[rows])
    return product


def times_right(left: Tensor, weight: Tensor) -> Tensor:
    """left (r, m) @ weight (m, n), in the dtype of `left`."""
    if weight.dtype == left.dtype:
        return left @ weight
    if _is_transposed(weight):
        return times(weight.T, left.T).T
    product = left.new_zeros(left.shape[0], weight.shape[1])
    for strip, rows in _strips(weight, left.dtype):
        product.addmm_(left[:, rows], strip)
    return product


def sum_rows(weight: Tensor, matrix: Matrix) -> Iterator[Tensor]:
    """weight (m, n) + matrix, a few rows at a time, in the dtype of the matrix.

    Each strip is overwritten by the next: use it before going on.
    """
    dtype = matrix.left.dtype if isinstance(matrix, LowRank) else matrix.matrix.dtype
    for strip, rows in _strips(weight, dtype):
        if isinstance(matrix, LowRank):
            yield strip.addmm_(matrix.left[rows], matrix.right)
        else:
            yield strip.add_(matrix.matrix[rows])


def _strips(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[Tensor, slice]]:
    """The rows of a matrix, a few at a time, cast into one buffer."""
    buffer = torch.empty(min(ROWS, weight.shape[0]), weight.shape[1], dtype=dtype, device=weight.device)
    for start in range(0, weight.shape[0], ROWS):
        rows = slice(start, min(start + ROWS, weight.shape[0]))
        strip = buffer[: rows.stop - rows.start]
        strip.copy_(weight[rows])
        yield strip, rows


def _is_transposed(weight: Tensor) -> bool:
    return weight.stride(0) == 1 and weight.stride(1) != 1
