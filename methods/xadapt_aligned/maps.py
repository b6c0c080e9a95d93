"""Linear maps between the feature spaces of two models, from second moments. Pure tensor functions.

Each map goes both ways: x′ ≈ T x, and x ≈ R x′. An orthogonal one has R = Tᵀ; of least squares, each direction is a problem of
its own, and R is no inverse of T where the one model keeps what the other forgets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .moments import Moments


@dataclass(frozen=True)
class FeatureMap:
    """x′ ≈ there x, and x ≈ back x′."""

    there: Tensor  # T (n′, n)
    back: Tensor  # R (n, n′)
    name: str  # how it was found
    error: float  # the larger of the two relative errors on the data

    def to(self, like: Tensor) -> FeatureMap:
        """In the dtype and on the device of a tensor."""
        return replace(self, there=self.there.to(like), back=self.back.to(like))


def identity(moments: Moments, ridge: float = 0.0) -> FeatureMap:
    """The features as they are. ValueError where the widths differ."""
    source, target = moments.widths
    if source != target:
        raise ValueError(f"Features of width {source} are none of width {target}; take another map than 'identity'.")
    eye = torch.eye(source).to(moments.source)
    return _measured(moments, eye, eye, "identity")


def permutation(moments: Moments, ridge: float = 0.0) -> FeatureMap:
    """Each feature to the one that it correlates with most, as an assignment (Git Re-Basin, arXiv 2209.04836, activation matching).

    Of different widths, the features left over go nowhere.
    """
    from scipy.optimize import linear_sum_assignment

    here = moments.target.diagonal().clamp_min(0).sqrt()[:, None]
    there = moments.source.diagonal().clamp_min(0).sqrt()[None]
    correlation = moments.cross / (here * there).clamp_min(torch.finfo(here.dtype).tiny)
    rows, columns = linear_sum_assignment(correlation.cpu().numpy(), maximize=True)
    chosen = torch.zeros_like(moments.cross)
    chosen[torch.as_tensor(rows), torch.as_tensor(columns)] = 1.0
    return _measured(moments, chosen, chosen.T, "permutation")


def procrustes(moments: Moments, ridge: float = 0.0) -> FeatureMap:
    """The orthogonal map that brings the features nearest: U Vᵀ of Σ x′xᵀ (Schönemann 1966); of different widths, semi-orthogonal.

    Args:
        ridge: how much the identity counts, as a share of the mean feature's energy. Where the data says nothing (features
            of less than full rank), any rotation would do; the identity is the one that disturbs nothing. Of equal widths only.
    """
    left, _, right = torch.linalg.svd(_leaning(moments, ridge), full_matrices=False)
    rotation = left @ right
    return _measured(moments, rotation, rotation.T, "procrustes")


def least_squares(moments: Moments, ridge: float) -> FeatureMap:
    """T = argmin Σ‖x′ − T x‖² + λ‖T‖², and R alike. Directions that the data does not show are dropped.

    Args:
        ridge: λ as a share of the mean feature's energy.
    """
    return _measured(
        moments,
        _regress(moments.cross, moments.source, ridge),
        _regress(moments.cross.T, moments.target, ridge),
        "least_squares",
    )


def near_identity(moments: Moments, ridge: float) -> FeatureMap:
    """`near` the identity: directions that the data does not show stay as they are. Equal widths only."""
    return near(identity(moments), moments, ridge)


def near(prior: FeatureMap, moments: Moments, ridge: float) -> FeatureMap:
    """T = argmin Σ‖x′ − T x‖² + λ‖T − T₀‖², and R alike: directions that the data does not show go where the prior takes them.

    Args:
        prior: T₀ and R₀.
        ridge: λ as a share of the mean feature's energy.
    """
    pull = [ridge * gram.diagonal().mean() for gram in (moments.source, moments.target)]
    return _measured(
        moments,
        _regress(moments.cross + pull[0] * prior.there, moments.source, ridge),
        _regress(moments.cross.T + pull[1] * prior.back, moments.target, ridge),
        f"near_{prior.name}",
    )


def probed(outputs: Moments, weights: tuple[Tensor, Tensor], inputs: Moments, there: Tensor, share: float) -> Moments:
    """Output moments with a little white noise sent through both layers: what they do to inputs that the data lacks.

    The data shows y′ ≈ S y on the outputs that occur, and an adapter's B may leave these. The weights say more: if x′ = T x, then
    W x becomes W′ T x for every x.

    Args:
        outputs: Σ over (y, y′).
        weights: W (m, n) and W′ (m′, n′).
        inputs: Σ over (x, x′).
        there: T (n′, n).
        share: the energy of the noise, as a share of the mean input feature's.
    """
    here, other = (weight.to(outputs.source) for weight in weights)
    white = share * inputs.source.diagonal().mean()
    beyond = other @ there.to(other)
    return Moments(
        outputs.source + white * (here @ here.T),
        outputs.target + white * (beyond @ beyond.T),
        outputs.cross + white * (beyond @ here.T),
        outputs.total,
        outputs.count,
    )


MAPS: dict[str, Callable[[Moments, float], FeatureMap]] = {
    "identity": identity,
    "permutation": permutation,
    "procrustes": procrustes,
    "least_squares": least_squares,
    "near_identity": near_identity,
}
NEEDS_EQUAL_WIDTHS = ("identity", "near_identity")


def relative_error(moments: Moments, there: Tensor) -> float:
    """√(Σ‖x′ − T x‖² / Σ‖x′‖²): 0 where T explains the target's features, 1 for T = 0."""
    wanted = moments.target.diagonal().sum()
    if not wanted > 0:
        return 0.0
    left = wanted - 2 * (there * moments.cross).sum() + ((there @ moments.source) * there).sum()
    return float((left / wanted).clamp_min(0).sqrt())


def _measured(moments: Moments, there: Tensor, back: Tensor, name: str) -> FeatureMap:
    error = max(relative_error(moments, there), relative_error(moments.turned, back))
    return FeatureMap(there, back, name, error)


def _regress(cross: Tensor, gram: Tensor, ridge: float) -> Tensor:
    """cross (gram + λ)⁻¹, with λ the ridge times the mean of gram's diagonal."""
    mean = gram.diagonal().mean()
    if not mean > 0:  # features that are always zero explain nothing
        return torch.zeros_like(cross)
    factor, failed = torch.linalg.cholesky_ex(gram + ridge * mean * torch.eye(gram.shape[0]).to(gram))
    if failed:
        precision = str(gram.dtype).removeprefix("torch.")
        raise ValueError(
            f"ridge={ridge} is lost in the rounding of {precision}: the features do not span their space. Take a larger one, "
            "for example ridge=0.001, or precision='float64'."
        )
    return torch.cholesky_solve(cross.T, factor).T


def _leaning(moments: Moments, ridge: float) -> Tensor:
    """Σ x′xᵀ + λI where that has a meaning."""
    source, target = moments.widths
    if source != target:
        return moments.cross
    return moments.cross + ridge * moments.source.diagonal().mean() * torch.eye(source).to(moments.source)
