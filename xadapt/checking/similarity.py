"""How alike two weights or two sets of features are. Pure tensor functions; nothing of a half-precision weight is copied whole."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from xadapt.matrix import ROWS, Matrix, strips, times, times_right
from xadapt.update import calculating_in

DIRECTIONS = 16
"""How many leading singular directions are compared; at most a quarter of the smaller width, or chance would look like likeness."""

ITERATIONS = 2  # of subspace iteration: Halko, Martinsson, Tropp 2011, §4.5


@dataclass(frozen=True)
class WeightLikeness:
    """Two weights of one shape."""

    drift: float | None  # ‖W′ − W‖ / ‖W‖; None for a W of zeros, beside which nothing has a size
    cosine: float
    norm: float  # ‖W‖
    norm_there: float  # ‖W′‖


def weight_likeness(source: Tensor, target: Tensor) -> WeightLikeness:
    """Drift and cosine of two weights (out, n), in any dtype, a few rows at a time."""
    apart = inner = here = there = 0.0
    for one, other in zip(torch.split(source, ROWS), torch.split(target, ROWS), strict=True):
        a, b = one.double(), other.to(one.device).double()
        apart += float((b - a).square().sum())
        inner += float((a * b).sum())
        here += float(a.square().sum())
        there += float(b.square().sum())
    size = (here * there) ** 0.5
    return WeightLikeness(
        drift=(apart / here) ** 0.5 if here else (None if there else 0.0),
        cosine=inner / size if size else (1.0 if here == there else 0.0),
        norm=here**0.5,
        norm_there=there**0.5,
    )


def drift_along(source: Tensor, target: Tensor, update: Matrix) -> tuple[float, float] | None:
    """cos(W′ − W, ΔW) of two weights (out, n) and an update of that shape, and ⟨W′ − W, ΔW⟩ / ‖ΔW‖²; None where one of the two is
    zero."""
    inner = apart = change = 0.0
    for one, other, rows in zip(torch.split(source, ROWS), torch.split(target, ROWS), strips(update), strict=True):
        moved, added = other.to(rows.device).double() - one.to(rows.device).double(), rows.double()
        inner += float((moved * added).sum())
        apart += float(moved.square().sum())
        change += float(added.square().sum())
    size = (apart * change) ** 0.5
    return (inner / size, inner / change) if size else None


def leading_subspaces(weight: Tensor, directions: int = DIRECTIONS, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Orthonormal bases U (out, k) and V (n, k) of a weight's (out, n) leading singular subspaces, by randomised iteration.

    k is `directions`, or a quarter of the smaller width where that is less.
    """
    count = max(1, min(directions, min(weight.shape) // 4))
    like = calculating_in(weight)
    generator = torch.Generator().manual_seed(seed)
    width = min(2 * count + 8, *weight.shape)
    start = torch.randn(weight.shape[1], width, generator=generator).to(like)
    basis = torch.linalg.qr(times(weight, start)).Q
    for _ in range(ITERATIONS):
        back = torch.linalg.qr(times_right(basis.T, weight).T).Q
        basis = torch.linalg.qr(times(weight, back)).Q
    small, _, right = torch.linalg.svd(times_right(basis.T, weight), full_matrices=False)
    return (basis @ small)[:, :count], right[:count].T


def overlap(one: Tensor, other: Tensor) -> float:
    """‖AᵀB‖² / k of two orthonormal bases (n, k): 1 for the same span, about k/n for two that have nothing to do with each other."""
    shared = (one.T @ other.to(one)).double().square().sum()
    return min(1.0, float(shared) / max(1, min(one.shape[1], other.shape[1])))


class FeatureLikeness:
    """Relative distance and linear CKA of two streams of features, a batch at a time; what was seen is not kept.

    CKA by the unbiased estimate over minibatches of Nguyen, Raghu, Kornblith 2021 (arXiv 2010.15327, Eq. 3).
    """

    def __init__(self, rows: int = 256) -> None:
        self.rows = rows  # of a batch that CKA looks at: it costs their square
        self.apart = self.size = 0.0
        self.cross = self.own = self.other = 0.0
        self.count = 0

    def add(self, source: Tensor, target: Tensor) -> None:
        """Takes in the features (rows, width) of the same inputs. Widths may differ; the distance is then undefined."""
        a, b = source.double(), target.to(source.device).double()
        if a.shape == b.shape:
            self.apart += float((b - a).square().sum())
            self.size += float(a.square().sum())
        else:
            self.apart = float("nan")
        self.count += a.shape[0]
        step = max(1, a.shape[0] // self.rows)
        a, b = a[::step][: self.rows], b[::step][: self.rows]
        if a.shape[0] > 3:
            grams = a @ a.T, b @ b.T
            self.cross += hsic(*grams)
            self.own += hsic(grams[0], grams[0])
            self.other += hsic(grams[1], grams[1])

    @property
    def distance(self) -> float | None:
        """‖X′ − X‖ / ‖X‖; None where the widths differ or there is nothing."""
        if self.size == 0 or self.apart != self.apart:
            return None
        return float((self.apart / self.size) ** 0.5)

    @property
    def cka(self) -> float | None:
        """Linear CKA, 0 to 1; None with fewer than four rows."""
        size = self.own * self.other
        return max(0.0, min(1.0, self.cross / size**0.5)) if size > 0 else None


def hsic(one: Tensor, other: Tensor) -> float:
    """The unbiased estimate of HSIC from two Gram matrices (n, n), n > 3 (Song et al. 2012)."""
    n = one.shape[0]
    k, m = (gram - torch.diag(torch.diag(gram)) for gram in (one, other))
    ones = k.sum() * m.sum() / ((n - 1) * (n - 2))
    mixed = 2 * (k.sum(0) * m.sum(0)).sum() / (n - 2)
    return float(((k * m).sum() + ones - mixed) / (n * (n - 3)))
