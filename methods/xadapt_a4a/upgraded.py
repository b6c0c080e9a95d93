"""The upgraded space: learnable features that take in the source's by attention (A4A, Eq. 9 and 10).

One such module serves K, another one, of the same structure, V.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .coupling import check_choice

MAPPINGS = ("attention", "linear", "layerwise")
MAX_ROWS = 4096


class MappingBlock(nn.Module):
    """One of the R rounds of Eq. 9: LayerNorm → attention over [reference, learnable] → FFN.

    The paper's formula shows neither residuals nor heads. Both are here, as in the resampler of IP-Adapter, whose blocks the
    text describes piece by piece; without residuals it learns clearly worse.
    """

    def __init__(self, dim: int, head_dim: int = 64, ffn_ratio: int = 4) -> None:
        super().__init__()
        self.heads = max(1, dim // head_dim)
        inner = self.heads * head_dim  # d_in
        self.norm_reference = nn.LayerNorm(dim)
        self.norm_learnable = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_k = nn.Linear(dim, inner, bias=False)
        self.to_v = nn.Linear(dim, inner, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)
        self.ffn = nn.Sequential(
            nn.LayerNorm(dim),
            nn.Linear(dim, dim * ffn_ratio, bias=False),
            nn.GELU(),
            nn.Linear(dim * ffn_ratio, dim, bias=False),
        )

    def forward(self, reference: Tensor, learnable: Tensor) -> Tensor:
        """The learnable features (B, l'·N, d) after one round with the reference (B, l·N, d)."""
        learnable_in = self.norm_learnable(learnable)
        rows = torch.cat([self.norm_reference(reference), learnable_in], dim=1)
        query, key, value = (
            linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for linear, x in ((self.to_q, learnable_in), (self.to_k, rows), (self.to_v, rows))
        )
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        learnable = learnable + self.to_out(attended)
        result: Tensor = learnable + self.ffn(learnable)
        return result


class UpgradedMapping(nn.Module):
    """Learnable features of l'·N rows, and R blocks through which they take in the reference."""

    def __init__(self, rows: int, dim: int, *, depth: int = 4, head_dim: int = 64, ffn_ratio: int = 4) -> None:
        super().__init__()
        if depth < 1:
            raise ValueError(f"depth={depth}: the mapping needs at least one block.")
        self.learnable = nn.Parameter(torch.randn(1, rows, dim) / dim**0.5)
        self.blocks = nn.ModuleList(MappingBlock(dim, head_dim, ffn_ratio) for _ in range(depth))

    def forward(self, reference: Tensor) -> Tensor:
        """K̂, (B, l'·N, d), from K, (B, l·N, d)."""
        learnable = self.learnable.expand(reference.shape[0], -1, -1)
        for block in self.blocks:
            learnable = block(reference, learnable)
        return learnable


class LinearMapping(nn.Module):
    """The ablation of Sec. 8.3: a linear layer over rows, then one over features."""

    def __init__(self, reference_rows: int, rows: int, dim: int) -> None:
        super().__init__()
        self.over_rows = nn.Linear(reference_rows, rows)
        self.over_features = nn.Linear(dim, dim)

    def forward(self, reference: Tensor) -> Tensor:
        """(B, l'·N, d) from (B, l·N, d)."""
        mapped: Tensor = self.over_features(self.over_rows(reference.transpose(1, 2)).transpose(1, 2))
        return mapped


class LayerwiseMapping(nn.Module):
    """The baseline of layer-by-layer mapping, as X-Adapter has it: no layer of the target sees more than one of the source.

    Layer j of the target takes the layer of the source at the same relative depth, through a residual bottleneck of its own.
    """

    def __init__(self, reference_rows: int, rows: int, dim: int, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.pairs = layer_pairs(reference_rows // tokens, rows // tokens)
        self.maps = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim // 2), nn.GELU(), nn.Linear(dim // 2, dim))
            for _ in self.pairs
        )

    def forward(self, reference: Tensor) -> Tensor:
        """(B, l'·N, d) from (B, l·N, d)."""
        layers = reference.chunk(reference.shape[1] // self.tokens, dim=1)
        mapped = [layers[i] + own(layers[i]) for i, own in zip(self.pairs, self.maps, strict=True)]
        return torch.cat(mapped, dim=1)


def layer_pairs(source: int, target: int) -> list[int]:
    """For each of the target's layers the source's at the same relative depth: first to first, last to last."""
    return [round(j * (source - 1) / max(1, target - 1)) for j in range(target)]


def build_mapping(
    mapping: str,
    reference_rows: int,
    rows: int,
    dim: int,
    *,
    depth: int,
    head_dim: int,
    ffn_ratio: int,
    max_rows: int,
    tokens: int = 1,
) -> nn.Module:
    """The mapping of that name, from l·N reference rows to l'·N. depth, head_dim and ffn_ratio are for "attention" only.

    Raises:
        ValueError: there is none, or its attention would run over more rows than `max_rows`.
    """
    check_choice("mapping", mapping, MAPPINGS)
    if mapping == "linear":
        return LinearMapping(reference_rows, rows, dim)
    if mapping == "layerwise":
        return LayerwiseMapping(reference_rows, rows, dim, tokens)
    if reference_rows + rows > max_rows:
        raise ValueError(
            f"The mapping's attention would run over {reference_rows} + {rows} = {reference_rows + rows} rows, more than "
            f"{max_rows}: the source makes too many tokens per layer (full-face: 257). Take a source with fewer, or, if "
            f"there is the memory, pass max_rows={reference_rows + rows}."
        )
    return UpgradedMapping(rows, dim, depth=depth, head_dim=head_dim, ffn_ratio=ffn_ratio)
