"""An update re-expressed in feature space, as the data sees it. Pure tensor functions.

Revisit Model Adaptation, Eq. 5 takes the pseudo-inverse W† for that: an output adapter is ΔW W†, an input adapter W†ΔW. W† treats
all directions of the input alike, those that no input has included, and small singular values make it large. Here its place is
taken by the best linear guess of x from y = Wx over the data, with C = E xxᵀ:

    G = C Wᵀ (W C Wᵀ + λ)⁻¹

* Output: Δ = ΔW G is the minimum of E‖(ΔW W′ − ΔW) x‖² + λ‖Δ‖², W′ standing for Δ W: where W loses what ΔW needs, the rest of what
  the data says about x makes up for it.
* Input: Δ = G ΔW is the minimum of E‖(WΔ − ΔW) x‖² + λ E‖Δx‖² in the metric C⁻¹: of all changes of the features with that effect, the
  one most like the features themselves. Another model is likelier to read those as this one does.

With C = 1 both are the ridge of `xadapt_weight`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xadapt.matrix import LowRank


def guess_of_inputs(weight: Tensor, gram: Tensor, ridge: float) -> Tensor:
    """G (in, out): x ≈ G y over the data.

    Args:
        weight: W (out, in), in the dtype to calculate in.
        gram: C (in, in).
        ridge: λ as a share of the mean energy of an output.
    """
    mapped = weight @ gram  # (out, in)
    outputs = mapped @ weight.T
    mean = outputs.diagonal().mean()
    if not mean > 0:
        return torch.zeros_like(weight.T)
    factor, failed = torch.linalg.cholesky_ex(outputs + ridge * mean * torch.eye(weight.shape[0]).to(weight))
    if failed:
        precision = str(weight.dtype).removeprefix("torch.")
        raise ValueError(
            f"ridge={ridge} is lost in the rounding of {precision}: the layer's outputs do not span their space. Take a larger "
            "one, for example ridge=0.001, or precision='float64'."
        )
    return torch.cholesky_solve(mapped, factor).T


def input_form(guess: Tensor, update: LowRank) -> LowRank:
    """Δ (in, in) with W Δ x ≈ ΔW x, of the update's rank."""
    return LowRank(guess @ update.left, update.right)


def output_form(guess: Tensor, update: LowRank) -> LowRank:
    """Δ (out, out) with Δ W x ≈ ΔW x, of the update's rank."""
    return LowRank(update.left, update.right @ guess)


def with_constant(gram: Tensor, mean: Tensor) -> Tensor:
    """E x̃x̃ᵀ (in + 1, in + 1) of x̃ = (x, 1): a layer with a bias is the weight (W b) on it."""
    top = torch.cat([gram, mean[:, None]], dim=1)
    bottom = torch.cat([mean, mean.new_ones(1)])[None]
    return torch.cat([top, bottom])


def error_on_data(found: LowRank, wanted: LowRank, gram: Tensor) -> float:
    """√(E‖(found − wanted) x‖² / E‖wanted x‖²); 0 where both do nothing."""
    left = torch.cat([found.left, -wanted.left], dim=1)
    right = torch.cat([found.right, wanted.right])
    norm = _energy(wanted.left, wanted.right, gram)
    return (_energy(left, right, gram) / norm) ** 0.5 if norm > 0 else 0.0


def _energy(left: Tensor, right: Tensor, gram: Tensor) -> float:
    """E‖left right x‖²"""
    seen = right @ gram @ right.T
    return max(0.0, float(((left.T @ left) * seen).sum()))
