"""How alike two blocks are by their weights: a sample of each tensor, read once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache

import torch
from torch import Tensor

Similarity = Callable[[str, str], float]
"""From the paths of a source block and a target block to how alike they are, 0 to 1."""

NOISE = 0.1
"""A similarity below this is that of blocks which have nothing to do with each other."""

SAMPLE = 4096  # of a tensor's numbers, evenly spaced: the cosine of equal-looking layers is then known to about 0.02


def weight_similarity(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> Similarity:
    """The mean cosine over the tensors that two blocks share by name and shape; what is below NOISE counts as 0.

    Tells pruned siblings' blocks apart, which still hold their parent's weights. Independently trained models have none
    in common. Each tensor of an asked block is read once.

    Args:
        source, target: `base.weights()`.
    """

    @cache
    def of_source(block: str) -> dict[str, tuple[tuple[int, ...], Tensor]]:
        return _samples(source, block)

    @cache
    def of_target(block: str) -> dict[str, tuple[tuple[int, ...], Tensor]]:
        return _samples(target, block)

    def similarity(source_block: str, target_block: str) -> float:
        one, other = of_source(source_block), of_target(target_block)
        shared = [name for name in one if name in other and one[name][0] == other[name][0]]
        if not shared:
            return 0.0
        cosines = [float(torch.dot(one[name][1], other[name][1])) for name in shared]
        mean = sum(cosines) / len(cosines)
        return mean if mean > NOISE else 0.0

    return similarity


def _samples(weights: Mapping[str, Tensor], block: str) -> dict[str, tuple[tuple[int, ...], Tensor]]:
    """Shape and unit-length sample of a block's matrices, by name within the block. Norms' gains are alike everywhere."""
    found = {}
    for name in weights:
        if not name.startswith(f"{block}."):
            continue
        tensor = weights[name]
        if tensor.ndim < 2:
            continue
        flat = tensor.flatten()
        sample = flat[:: max(1, len(flat) // SAMPLE) | 1].double()  # odd, or it would stay within a few columns
        found[name[len(block) + 1 :]] = (tuple(tensor.shape), sample / sample.norm().clamp_min(1e-30))
    return found
