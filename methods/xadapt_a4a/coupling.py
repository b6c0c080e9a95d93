"""The coupling space: all features of all layers of the source, in one width, as rows of one matrix (A4A, Eq. 7 and 8)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SHARES = ("width", "layer")
PROJECTIONS = ("linear", "interpolate")
MAX_COUPLING_DIM = 8192


def coupling_dim(widths: Sequence[int], ratio: float = 1.0, limit: int = MAX_COUPLING_DIM) -> int:
    """d_scm: the least common multiple of the source's widths (A4A, Sec. 3.2), times a ratio (Sec. 7.3).

    Raises:
        ValueError: it is no whole number, or above the limit: widths that share no factors make it explode.
    """
    common = math.lcm(*widths)
    scaled = common * ratio
    if not math.isfinite(scaled) or scaled < 1 or scaled != int(scaled):
        raise ValueError(
            f"coupling_ratio={ratio} of the least common multiple {common} is no width. Write 0.5, 1 or 2, or give the width "
            "itself: coupling_width=…"
        )
    if scaled > limit:
        raise ValueError(
            f"The least common multiple of the source's widths {sorted(set(widths))} is {common}, times {ratio:g} "
            f"{int(scaled)}, above the limit of {limit}. Choose a width: coupling_width={max(widths)}."
        )
    return int(scaled)


def check_choice(option: str, given: str, allowed: Sequence[str]) -> None:
    """ValueError that names what is allowed."""
    if given not in allowed:
        raise ValueError(f"{option}={given!r}; write {' or '.join(f'{option}={choice!r}' for choice in allowed)}.")


class CouplingProjection(nn.Module):
    """Proj: one linear layer per distinct width (share="width") or per layer (share="layer"), or none at all.

    mode="interpolate" is the training-free projection of Sec. 8.2.
    """

    def __init__(self, widths: Sequence[int], dim: int, *, share: str = "width", mode: str = "linear") -> None:
        super().__init__()
        check_choice("share", share, SHARES)
        check_choice("projection", mode, PROJECTIONS)
        self.widths, self.dim, self.share, self.mode = tuple(widths), dim, share, mode
        names = dict(zip(linear_names(widths, share), widths, strict=True)) if mode == "linear" else {}
        self.linears = nn.ModuleDict({name: nn.Linear(width, dim) for name, width in names.items()})

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """K, (B, l·N, d_scm), layer after layer, from k_1 … k_l of (B, N, d_i) each."""
        return torch.cat([self._project(name, x) for name, x in zip(self._names(), features, strict=True)], dim=1)

    def _names(self) -> list[str]:
        return linear_names(self.widths, self.share)

    def _project(self, name: str, x: Tensor) -> Tensor:
        if self.mode == "linear":
            projected: Tensor = self.linears[name](x)
            return projected
        return F.interpolate(x, size=self.dim, mode="linear", align_corners=False)


def linear_names(widths: Sequence[int], share: str) -> list[str]:
    """For each layer, the name of the linear layer that serves it."""
    return [str(width) if share == "width" else str(index) for index, width in enumerate(widths)]
