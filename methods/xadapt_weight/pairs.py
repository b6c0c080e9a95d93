"""The layers that an adapter changes in the source, each with its counterpart in the target, one at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from xadapt.carried_along import saved_modules
from xadapt.contract import Adapter, Siblings
from xadapt.counterparts import Side, counterparts, shape_of
from xadapt.errors import some
from xadapt.finite import is_finite
from xadapt.folding import Layer, layers_of
from xadapt.matrix import LowRank
from xadapt.update import to_stored


@dataclass(frozen=True)
class Opened:
    """What is read of one source layer."""

    weight: Tensor  # (out, in, *kernel), as stored
    bias: Tensor | None
    matrix: LowRank  # what the adapter adds to the weight: (out, in·kernel)
    moved: Tensor | None  # what it adds to the bias


@dataclass(frozen=True)
class LayerPair:
    """A source layer and its counterpart."""

    source: Layer
    path: str  # the target's
    module: nn.Module  # the target's: its class and shape

    def open(self, weights: Mapping[str, Tensor], dtype: torch.dtype) -> Opened:
        """Reads the source layer once, and what the adapter adds to it, to calculate in `dtype`.

        Raises:
            ValueError: the adapter's update of this layer is not of low rank, or there is NaN or infinity in either.
        """
        bias_name = self.source.bias_name
        read = {name: _finite(name, weights[name]) for name in (self.source.weight_name, bias_name) if name is not None}
        update = self.source.update(read)
        if not isinstance(update.matrix, LowRank):
            raise ValueError(
                f"{self.source.path}: this adapter is no LoRA (its update has full rank). Make one of it first: "
                "xadapt export --rank 16 or --energy 0.99, on the source."
            )
        matrix = LowRank(update.matrix.left.to(dtype), update.matrix.right.to(dtype))
        bias = None if bias_name is None else read[bias_name].to(dtype)
        moved = None if update.bias is None else update.bias.to(dtype)
        return Opened(to_stored(self.source.module, read[self.source.weight_name]), bias, matrix, moved)

    def target_weight(self, weights: Mapping[str, Tensor]) -> Tensor:
        """(out, in, *kernel), as stored. ValueError if it holds NaN or infinity."""
        name = f"{self.path}.weight"
        return to_stored(self.module, _finite(name, weights[name]))

    @property
    def shape(self) -> tuple[int, ...]:
        """The target layer's (out, in, *kernel)"""
        return shape_of(self.module)


def pairs_of(adapter: Adapter, bases: Siblings, agree: Side) -> tuple[list[LayerPair], dict[str, str]]:
    """The layers of the adapter with their counterparts by the module map, and why others have none. Opens no weight.

    Args:
        adapter: made on the source.
        agree: the widths that must be the same in both: the method has no way over a change of these.

    Raises:
        ValueError: the adapter does not fit the source, brings along whole modules, or has no layer with a counterpart of
            these widths.
    """
    if names := sorted(saved_modules(adapter)):
        raise ValueError(
            f"The adapter brings along whole modules of its own (modules_to_save): {some(names)}. This method "
            "cannot carry them to another base: method='copy' takes them along to one with the same names and shapes, and "
            "method='distil' trains a fresh adapter that does the same."
        )
    layers = layers_of([adapter], bases.source)
    to = counterparts([layer.path for layer in layers], bases, agree)
    modules = bases.target.modules()
    pairs = [
        LayerPair(layer, to.found[layer.path], modules[to.found[layer.path]])
        for layer in layers
        if layer.path in to.found
    ]
    return pairs, to.left_out


def _finite(name: str, tensor: Tensor) -> Tensor:
    if not is_finite(tensor):
        raise ValueError(f"{name} of the base holds NaN or infinity, so nothing can be calculated from it.")
    return tensor
