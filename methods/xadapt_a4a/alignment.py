"""Alignment: from the coupling space to the width of each attention layer of the target (A4A, Eq. 11 and 12)."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from .coupling import SHARES, check_choice, linear_names

ALIGNMENTS = ("linear", "pool")


class Alignment(nn.Module):
    """Align: one linear layer per distinct width of the target, or per layer, or (mode="pool", Sec. 8.2) none at all.

    The linear layers start as torch starts them. From zero the target would start untouched, but learn much more slowly.
    """

    def __init__(self, dim: int, widths: Sequence[int], *, share: str = "width", mode: str = "linear") -> None:
        super().__init__()
        check_choice("share", share, SHARES)
        check_choice("alignment", mode, ALIGNMENTS)
        self.widths, self.share, self.mode = tuple(widths), share, mode
        names = dict(zip(linear_names(widths, share), widths, strict=True)) if mode == "linear" else {}
        self.linears = nn.ModuleDict({name: nn.Linear(dim, width) for name, width in names.items()})

    def forward(self, features: Tensor) -> list[Tensor]:
        """k̄_1 … k̄_l', (B, N, d̂_i) each, from K̂, (B, l'·N, d): the i-th N rows are the i-th layer's."""
        rows = features.chunk(len(self.widths), dim=1)
        names = linear_names(self.widths, self.share)
        return [self._align(name, width, x) for name, width, x in zip(names, self.widths, rows, strict=True)]

    def _align(self, name: str, width: int, x: Tensor) -> Tensor:
        if self.mode == "linear":
            aligned: Tensor = self.linears[name](x)
            return aligned
        return F.adaptive_avg_pool1d(x, width)
