"""Which map two feature spaces get: the one that changes least, of those that explain the data.

Least squares always explains most, and carries an adapter worst: where a model was trained further, it puts the adapter on whatever
happens to correlate. So a richer map has to be a discovery and no mere improvement. Measured on tiny language models:

====================================  ========  ===========  ==========  =============  ============
relative error of                     identity  permutation  procrustes  least squares  carries best
====================================  ========  ===========  ==========  =============  ============
trained further                       .1 - .6   the same     .1 - .5     .1 - .3        identity
channels rescaled                     .4        the same     .2 - .3     .00            near_identity
rotated                               1.2 - 1.6  .5 - 1       .00 - .2    .00            procrustes
permuted, and trained further         1.4       .3 - .5      .2 - .5     .1 - .2        permutation
====================================  ========  ===========  ==========  =============  ============
"""

from __future__ import annotations

import torch
from torch import Tensor

from .maps import FeatureMap, identity, least_squares, near, permutation, procrustes
from .moments import Moments

MUCH = 2.0  # a permutation may be this many times as far off as a rotation, which has more freedom
CLOSE = 0.1  # below this error a map is as good as any other
EXACT = 0.05  # above this, least squares has found no other basis of the same features
FULL = 0.9  # share of the directions that the data must show before least squares can be trusted


def choose(moments: Moments, ridge: float, stay: float) -> FeatureMap:
    """The map for these features.

    Args:
        ridge: of the maps that take one.
        stay: the relative error from which on a map explains nothing; the identity stays below it unless the basis changed.
    """
    found = choose_rigid(moments, ridge, stay)
    turned = found.name not in ("identity", "least_squares")
    if found.error > CLOSE and len(set(moments.widths)) == 1 and (turned or _shown(moments.source, ridge) >= FULL):
        scaled = near(found, moments, ridge)
        found = scaled if scaled.error <= EXACT else found
    return found


def choose_rigid(moments: Moments, ridge: float, stay: float) -> FeatureMap:
    """Without the maps that rescale, for the outputs of a linear: y = Wx and y′ = W′x are related by W′W⁻¹ exactly, however far
    training has moved W, so least squares has discovered nothing there. Measured: it takes a copied LoRA from .89 to .00.
    """
    source, target = moments.widths
    if source != target:
        return _of_other_width(moments, ridge)
    kept = identity(moments)
    if kept.error <= CLOSE:
        return kept
    found = kept
    if kept.error > stay:
        turned, swapped = procrustes(moments, ridge), permutation(moments)
        better = swapped if swapped.error <= MUCH * turned.error else turned
        found = better if better.error <= stay else kept
    return found


def _of_other_width(moments: Moments, ridge: float) -> FeatureMap:
    turned, free = procrustes(moments, ridge), least_squares(moments, ridge)
    return turned if turned.error <= MUCH * free.error else free


def _shown(gram: Tensor, ridge: float) -> float:
    """The share of directions in which the features vary by more than the ridge."""
    values = torch.linalg.eigvalsh(gram)
    return float((values > ridge * values.clamp_min(0).mean()).double().mean())
