"""Updates projected on the singular subspaces of weights: LoRA-X (arXiv 2501.16559) and ProLoRA (arXiv 2506.04244).

Pure tensor functions. Everything stays factored: a projection from the left changes the one factor, from the right the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from xadapt.matrix import Dense, LowRank, add, times
from xadapt.truncate import Truncation, truncate
from xadapt.update import calculating_in

from .gram import gram


@dataclass(frozen=True)
class Subspaces:
    """Orthonormal bases of a weight's leading left and right singular vectors."""

    left: Tensor  # U (out, k)
    right: Tensor  # V (in, k)

    @property
    def rank(self) -> int:
        return self.left.shape[1]

    def like(self, tensor: Tensor) -> Subspaces:
        """The same, of the dtype and on the device of a tensor."""
        return Subspaces(self.left.to(tensor), self.right.to(tensor))


def leading(weight: Tensor, to: Truncation) -> Subspaces:
    """The subspaces of a weight (out, in), in any dtype, that `to` cuts it to.

    By the SVD for a rank, randomised where that is small; by the smaller Gram matrix for a share of the energy, of which a
    weight needs so many directions that the randomised one would be the slower.
    """
    if to.rank is None:
        return _by_energy(weight, to.energy or 1.0)
    svd, _ = truncate(Dense(weight.to(calculating_in(weight))), to)  # (U √σ, √σ Vᵀ)
    sizes = svd.left.norm(dim=0)  # √σ
    least = sizes.max().square() * torch.finfo(sizes.dtype).eps * max(weight.shape)
    kept = sizes.square() > least  # a direction without a singular value is any direction
    sizes = sizes[kept]
    return Subspaces(svd.left[:, kept] / sizes, (svd.right[kept] / sizes[:, None]).T)


def _by_energy(weight: Tensor, share: float) -> Subspaces:
    tall = weight.shape[0] >= weight.shape[1]
    matrix = weight if tall else weight.T
    squares, vectors = torch.linalg.eigh(gram(matrix, weight.new_empty(0, dtype=torch.float64)))
    squares, vectors = squares.flip(0).clamp_min(0), vectors.flip(1)
    held = squares.cumsum(0)
    rank = int((held < share * held[-1] * (1 - 1e-12)).sum()) + 1
    rank = min(rank, int((squares > squares[0] * torch.finfo(squares.dtype).eps * max(weight.shape)).sum()))
    small = vectors[:, :rank]
    large = times(matrix, small) / squares[:rank].sqrt()
    left, right = (large, small) if tall else (small, large)
    like = calculating_in(weight)
    return Subspaces(left.to(like), right.to(like))


def project(update: LowRank, onto: Subspaces) -> LowRank:
    """U Uᵀ ΔW V Vᵀ, of the same rank: what LoRA-X takes to a target whose subspaces these are."""
    return LowRank(_within(onto.left, update.left), _within(onto.right, update.right.T).T)


def carry_both_parts(update: LowRank, source: Subspaces, target: Subspaces, *, cross_terms: bool = False) -> LowRank:
    """ProLoRA: the part of ΔW in the source's subspaces goes to the target's, the part outside them to the outside.

    ΔW∥ = Uₛ Uₛᵀ ΔW Vₛ Vₛᵀ → Uₜ Uₜᵀ ΔW∥ Vₜ Vₜᵀ, and ΔW⊥ = (I − UₛUₛᵀ) ΔW (I − VₛVₛᵀ) → (I − UₜUₜᵀ) ΔW⊥ (I − VₜVₜᵀ): the
    ranks add up. What is inside on one side and outside on the other is in neither part.

    Args:
        update: ΔW (out, in) of rank r.
        source, target: the weights' subspaces.
        cross_terms: carry the mixed parts as well, each in its place. The result has rank r, and is ΔW itself where the two
            bases have the same subspaces.
    """
    b, a = update.left, update.right.T
    b_in, a_in = _within(source.left, b), _within(source.right, a)
    b_out, a_out = b - b_in, a - a_in
    b_in, a_in = _within(target.left, b_in), _within(target.right, a_in)
    b_out, a_out = b_out - _within(target.left, b_out), a_out - _within(target.right, a_out)
    if cross_terms:
        return LowRank(b_in + b_out, (a_in + a_out).T)
    both = add(LowRank(b_in, a_in.T), LowRank(b_out, a_out.T))
    assert isinstance(both, LowRank)
    return both


def overlap(one: Subspaces, other: Subspaces) -> float:
    """How much of the smaller subspaces lies in the larger ones, 0 to 1: the lesser of left and right (LoRA-X, Eq. of Φ)."""
    rank = min(one.rank, other.rank)
    if not rank:
        return 0.0
    shared = ((one.left.T @ other.left).square().sum(), (one.right.T @ other.right).square().sum())
    return float(min(shared)) / rank


def _within(basis: Tensor, columns: Tensor) -> Tensor:
    """The projection of columns on the span of an orthonormal basis."""
    return basis @ (basis.T @ columns)
