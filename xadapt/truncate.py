"""The nearest matrix of low rank, with what it leaves out. Pure tensor functions."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from xadapt.matrix import Dense, LowRank, Matrix, sum_rows

OVERSAMPLING = 10  # Halko, Martinsson, Tropp 2011, §4.2
ITERATIONS = 4
EXACT = 1e-5
"""What a residual may be if nothing is lost: float32's rounding, in the update and in its decomposition."""


@dataclass(frozen=True)
class Truncation:
    """How far a matrix may be cut: to a rank, or to the smallest rank that keeps a share of its energy (Σσ²)."""

    rank: int | None = None
    energy: float | None = None

    def __post_init__(self) -> None:
        if self.rank is not None and (isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1):
            raise ValueError(f"rank={self.rank!r}: a rank is a positive integer, for example rank=16.")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise ValueError(f"energy={self.energy!r}: the share of the squared norm to keep, for example energy=0.99.")
        if self.rank is not None and self.energy is not None:
            raise ValueError("rank and energy both say where to cut: pass one of them.")

    @property
    def asked(self) -> bool:
        return self.rank is not None or self.energy is not None


def truncate(matrix: Matrix, to: Truncation) -> tuple[LowRank, float]:
    """The matrix cut to low rank, and the relative error ‖M − cut‖ / ‖M‖ in the Frobenius norm.

    A matrix that is factored already is decomposed through its factors, exactly; a dense one by randomised subspace
    iteration (Halko, Martinsson, Tropp 2011), seeded, so the same input gives the same result.
    """
    left, values, right = _factored_svd(matrix) if isinstance(matrix, LowRank) else _dense_svd(matrix.matrix, to)
    rank = to.rank if to.rank is not None else _rank_for(values, matrix.energy, to.energy or 1.0)
    rank = max(1, min(rank, len(values)))
    root = values[:rank].sqrt()
    cut = LowRank(left[:, :rank] * root, root[:, None] * right[:rank])
    return cut, _residual(matrix, cut, values[rank:])


def exact_rank(matrix: Matrix, limit: int = 64) -> int | None:
    """The rank to which a matrix can be cut without loss; None above `limit`, and where the factors were no smaller."""
    cut, residual = truncate(matrix, Truncation(rank=limit))
    if residual > EXACT:
        return None
    values = cut.left.double().square().sum(0)  # the singular values: both sides have their roots
    tail = values.square().flip(0).cumsum(0).flip(0)
    rank = max(1, int((tail > EXACT**2 / 4 * tail[0]).sum()))
    return rank if rank * sum(matrix.shape) < prod(matrix.shape) else None


def _factored_svd(matrix: LowRank) -> tuple[Tensor, Tensor, Tensor]:
    """U, σ, Vᵀ of left @ right by the SVD of a matrix as small as the rank."""
    q_left, r_left = torch.linalg.qr(matrix.left)
    q_right, r_right = torch.linalg.qr(matrix.right.T)
    u, values, vh = torch.linalg.svd(r_left @ r_right.T)
    return q_left @ u, values, vh @ q_right.T


def _dense_svd(matrix: Tensor, to: Truncation) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular triplets: as many as `to` asks for, found by doubling where it asks for energy."""
    full = min(matrix.shape)
    if to.rank is not None:
        return _leading(matrix, min(to.rank, full))
    rank = min(16, full)
    while True:
        u, values, vh = _leading(matrix, rank)
        if rank == full or values.square().sum() >= (to.energy or 1.0) * Dense(matrix).energy:
            return u, values, vh
        rank = min(2 * rank, full)


def _leading(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `rank` leading singular triplets."""
    if rank + OVERSAMPLING >= min(matrix.shape) // 2:
        u, values, vh = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :rank], values[:rank], vh[:rank]
    generator = torch.Generator(matrix.device).manual_seed(0)
    start = torch.randn(
        matrix.shape[1], rank + OVERSAMPLING, generator=generator, dtype=matrix.dtype, device=matrix.device
    )
    basis = torch.linalg.qr(matrix @ start).Q
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    u, values, vh = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return (basis @ u)[:, :rank], values[:rank], vh[:rank]


def _rank_for(values: Tensor, energy: float, share: float) -> int:
    kept = values.double().square().cumsum(0)
    return int((kept < share * energy * (1 - 1e-12)).sum()) + 1


def _residual(matrix: Matrix, cut: LowRank, dropped: Tensor) -> float:
    """‖M − cut‖ / ‖M‖. Not from the difference of the energies, in which rounding alone makes 1e-3 of nothing."""
    energy = matrix.energy
    if energy == 0:
        return 0.0
    if isinstance(matrix, LowRank):
        lost = float(dropped.double().square().sum())
    else:
        lost = sum(float(strip.double().square().sum()) for strip in sum_rows(matrix.matrix, cut.scaled(-1)))
    return float((lost / energy) ** 0.5)
