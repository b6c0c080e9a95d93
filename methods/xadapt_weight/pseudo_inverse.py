"""A plain update re-expressed in feature space: Revisit Model Adaptation (Revisit Model Adaptation), Eq. 5, with a ridge. Pure tensor functions.

The paper writes Y = X W (I + W†AB) for row vectors. In torch's layout, with W (out, in), an output adapter is ΔW = Δ W and an
input adapter ΔW = W Δ; each Δ is the least-squares solution, and what it leaves of ΔW is the residual.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xadapt.matrix import LowRank, times
from xadapt.truncate import Truncation, truncate

from .gram import gram


def input_form(weight: Tensor, update: LowRank, ridge: float) -> LowRank:
    """Δ (in, in) with W Δ ≈ ΔW: (WᵀW + λ)⁻¹ Wᵀ ΔW, of the update's rank.

    For a convolution Φ acts on channels, so one Δ has to serve every position of the kernel: the solution is cut to the
    update's rank.

    Args:
        weight: (out, in, *kernel), in any dtype.
        update: ΔW as (out, in·kernel), in the dtype to calculate in.
        ridge: λ as a share of W's mean squared singular value. 0 is the Moore-Penrose inverse.
    """
    if weight.ndim == 2:
        return LowRank(ridge_solve(weight, update.left, ridge), update.right)
    rows = weight.movedim(1, -1).reshape(-1, weight.shape[1])  # (out·kernel, in)
    left, right = _by_position(update, weight.shape[1])
    solution = LowRank(ridge_solve(rows, left, ridge), right)
    return truncate(solution, Truncation(rank=update.rank))[0]


def output_form(weight: Tensor, update: LowRank, ridge: float) -> LowRank:
    """Δ (out, out) with Δ W ≈ ΔW: ΔW Wᵀ (WWᵀ + λ)⁻¹, of the update's rank. Arguments as for `input_form`."""
    return LowRank(update.left, ridge_solve(weight.flatten(1).T, update.right.T, ridge).T)


def ridge_solve(matrix: Tensor, right: Tensor, ridge: float) -> Tensor:
    """(MᵀM + λ)⁻¹ Mᵀ R, or M† R where ridge is 0.

    Only the smaller of MᵀM and MMᵀ is ever held, in the dtype of R; M is read in strips.

    Args:
        matrix: M (m, n), in any dtype.
        right: R (m, r).
        ridge: λ as a share of the mean squared singular value, ‖M‖²/min(m, n).

    Returns: (n, r)

    Raises:
        ValueError: the ridge is lost in rounding.
    """
    tall = matrix.shape[0] >= matrix.shape[1]
    squares = gram(matrix if tall else matrix.T, right)
    if tall:
        return _inverse_times(squares, times(matrix.T, right), ridge, max(matrix.shape))
    return times(matrix.T, _inverse_times(squares, right, ridge, max(matrix.shape)))


def relative_error(approximation: LowRank, wanted: LowRank) -> float:
    """‖approximation − wanted‖ / ‖wanted‖ in the Frobenius norm, without multiplying out; 0 where both are 0."""
    error = LowRank(
        torch.cat([approximation.left, -wanted.left], dim=1), torch.cat([approximation.right, wanted.right], dim=0)
    )
    # By QR: the difference of two nearly equal energies would be rounding alone.
    small = torch.linalg.qr(error.left.double()).R @ torch.linalg.qr(error.right.T.double()).R.T
    norm = wanted.energy**0.5
    return float(torch.linalg.matrix_norm(small)) / norm if norm else 0.0


def _inverse_times(squares: Tensor, right: Tensor, ridge: float, widest: int) -> Tensor:
    mean = squares.diagonal().mean()
    if not mean > 0:  # a weight of zeros: nothing can be expressed through it
        return torch.zeros_like(right)
    if ridge > 0:
        squares.diagonal().add_(ridge * mean)
        factor, failed = torch.linalg.cholesky_ex(squares)
        if failed:
            precision = str(squares.dtype).removeprefix("torch.")
            raise ValueError(
                f"ridge={ridge} is lost in the rounding of {precision}; take a larger one, as 0.01, or float64."
            )
        return torch.cholesky_solve(right, factor)
    values, vectors = torch.linalg.eigh(squares)
    cut = values[-1] * widest * torch.finfo(squares.dtype).eps
    inverse = torch.where(values > cut, 1 / values.clamp_min(cut), torch.zeros_like(values))
    return vectors @ (inverse[:, None] * (vectors.T @ right))


def _by_position(update: LowRank, width: int) -> tuple[Tensor, Tensor]:
    """From ΔW (out, in·kernel) to factors of (out·kernel, in): the rank r becomes r·kernel."""
    rank = update.rank
    right = update.right.view(rank, width, -1)  # (r, in, kernel)
    positions = right.shape[-1]
    left = torch.kron(update.left, torch.eye(positions).to(update.left))  # (out·kernel, r·kernel)
    return left, right.transpose(1, 2).reshape(rank * positions, width)
