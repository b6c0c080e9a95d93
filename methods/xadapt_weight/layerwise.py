"""A method that works layer by layer, one pair of weights at a time; finished layers may be kept on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from xadapt.contract import Adapter, Siblings
from xadapt.counterparts import Side
from xadapt.journal import finished
from xadapt.matrix import LowRank
from xadapt.progress import track

from .pairs import LayerPair, pairs_of
from .writing import Part


@dataclass(frozen=True)
class Converted:
    """What a method makes of one layer's update."""

    matrix: LowRank
    constant: Tensor | None
    error: float  # relative, in the Frobenius norm

    def tensors(self) -> dict[str, Tensor]:
        """As a journal keeps them."""
        constant = {} if self.constant is None else {"constant": self.constant}
        error = torch.tensor(self.error, dtype=torch.float64)
        return {"left": self.matrix.left, "right": self.matrix.right, "error": error, **constant}

    @classmethod
    def of(cls, kept: Mapping[str, Tensor]) -> Converted:
        """From what a journal kept."""
        return cls(LowRank(kept["left"], kept["right"]), kept.get("constant"), float(kept["error"]))


def each_layer(
    adapter: Adapter, bases: Siblings, agree: Side, convert: Callable[[LayerPair], Converted]
) -> tuple[dict[str, Part], dict[str, float], dict[str, str]]:
    """The converted layers and their errors by the target's path, and why others were left out by the source's.

    Raises:
        ValueError: as `pairs_of` and `convert`.
    """
    parts, errors = {}, {}
    pairs, left_out = pairs_of(adapter, bases, agree)
    for pair in track(pairs, "carrying layers"):
        made = Converted.of(finished(pair.path, partial(_made, convert, pair)))
        parts[pair.path] = Part(pair, made.matrix, made.constant)
        errors[pair.path] = made.error
    return parts, errors, left_out


def _made(convert: Callable[[LayerPair], Converted], pair: LayerPair) -> dict[str, Tensor]:
    return convert(pair).tensors()
