"""The way of the keys, or of the values, from the source's layers to the target's."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class Branch(nn.Module):
    """Projection, mapping and alignment. Keys and values have one each, of the same structure (A4A, Sec. 3.3)."""

    def __init__(self, projection: nn.Module, mapping: nn.Module, alignment: nn.Module) -> None:
        super().__init__()
        self.projection, self.mapping, self.alignment = projection, mapping, alignment

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """k̄_1 … k̄_l', (B, N, d̂_i) each, from k_1 … k_l, (B, N, d_i) each."""
        aligned: list[Tensor] = self.alignment(self.mapping(self.projection(features)))
        return aligned
