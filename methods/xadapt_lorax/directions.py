"""A weight's leading singular directions, the same ones every time. Pure tensor functions.

Of each pair (u, v) only the product of signs is determined; it is settled by making u's largest entry positive. What stays open:
directions of equal singular values, which may turn into each other.
"""

from __future__ import annotations

import torch
from torch import Tensor


def leading(weight: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """U (out, r) and V (in, r) of a weight (out, in), in float32, or float64 for a weight of that.

    Raises:
        ValueError: the weight has fewer directions.
    """
    if weight.ndim != 2 or count > min(weight.shape):
        raise ValueError(
            f"r={count}: a weight of shape {tuple(weight.shape)} has {min(weight.shape) if weight.ndim == 2 else 'no'} singular "
            "directions for LoRA-X, which is for linears."
        )
    wide = weight.to(torch.float64 if weight.dtype == torch.float64 else torch.float32)
    u, _, vh = torch.linalg.svd(wide, full_matrices=False)
    u, v = u[:, :count], vh[:count].T
    largest = u.abs().argmax(dim=0, keepdim=True)
    signs = torch.where(u.gather(0, largest) < 0, -1.0, 1.0).to(u)
    return (u * signs).contiguous(), (v * signs).contiguous()


def product(u: Tensor, core: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """ΔW as the factors U M (out, r) and Vᵀ (r, in). M is (r, r), or (r,) for a diagonal."""
    scaled = u * core if core.ndim == 1 else u @ core
    return scaled, v.T


def signs_between(source: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Which of the target's pairs (u′, v′) point the other way: signs (r,), and how alike the pairs are (r,), 0 to 1.

    A pair is told by that side of it which is more alike, as a change of basis on the one side of a weight leaves the other. With
    both changed, or other widths, nothing tells, and the sign stays as the convention has it.
    """
    signs = torch.ones(source[0].shape[1]).to(source[0])
    best = torch.zeros_like(signs)
    for ours, theirs in zip(source, target, strict=True):
        if ours.shape != theirs.shape:
            continue
        dots = (ours * theirs.to(ours)).sum(0)
        nearer = dots.abs() > best
        signs = torch.where(nearer, torch.where(dots < 0, -1.0, 1.0).to(signs), signs)
        best = torch.where(nearer, dots.abs(), best)
    return torch.where(best > 0.5, signs, torch.ones_like(signs)), best.clamp_max(1)
