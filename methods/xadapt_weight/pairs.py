"""The layers that an adapter changes in the source, each with its counterpart in the target, one at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from xadapt.contract import Adapter, Base
from xadapt.errors import some
from xadapt.finite import is_finite
from xadapt.folding import Layer, layers_of, saved_modules
from xadapt.matrix import LowRank
from xadapt.module_map import map_modules
from xadapt.update import to_stored

Side = Literal["input", "output", "both"]


@dataclass(frozen=True)
class Opened:
    """What is read of one source layer."""

    weight: Tensor  # (out, in, *kernel), as stored
    bias: Tensor | None
    matrix: LowRank  # what the adapter adds to the weight: (out, in·kernel)
    moved: Tensor | None  # what it adds to the bias


@dataclass(frozen=True)
class Pair:
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
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return tuple(to_stored(self.module, weight).shape)


def pairs_of(adapter: Adapter, source: Base, target: Base, agree: Side) -> list[Pair]:
    """The layers of the adapter with their counterparts by the module map. Opens no weight.

    Args:
        adapter: made on `source`.
        source, target: the bases.
        agree: the widths that must be the same in both: the method has no way over a change of these.

    Raises:
        ValueError: the adapter does not fit the source, brings along whole modules, or has layers without a counterpart of
            these widths.
    """
    if names := sorted(saved_modules(adapter)):
        raise ValueError(
            f"The adapter brings along whole modules of its own (modules_to_save): {some(names)}. From weights alone they "
            "cannot be carried to another base; use copy, or train without modules_to_save."
        )
    layers = layers_of([adapter], source)
    modules = target.modules()
    mapped = map_modules(source.modules(), modules)
    pairs, problems = [], []
    for layer in layers:
        lines = mapped.of(layer.path)
        pair = Pair(layer, lines[0].target, modules[lines[0].target]) if len(lines) == 1 else None
        if pair is None or lines[0].relation in ("part", "whole"):
            problems.append(f"{layer.path}: {_why(mapped.why_unmatched(layer.path), [line.reason for line in lines])}")
        elif not _agrees(layer.shape, pair.shape, agree):
            problems.append(f"{layer.path} → {pair.path}: {lines[0].reason}")
        else:
            pairs.append(pair)
    if problems:
        raise ValueError(
            f"{len(problems)} of the adapter's {len(layers)} layers cannot be carried to {target.name} by this method:\n  "
            + some(problems, separator="\n  ")
        )
    return pairs


def _agrees(source: tuple[int, ...], target: tuple[int, ...], side: Side) -> bool:
    if side == "input":
        return source[1] == target[1]
    return source[0] == target[0] if side == "output" else source == target


def _finite(name: str, tensor: Tensor) -> Tensor:
    if not is_finite(tensor):
        raise ValueError(f"{name} of the base holds NaN or infinity, so nothing can be calculated from it.")
    return tensor


def _why(unmatched: str | None, reasons: list[str]) -> str:
    if unmatched is not None:
        return unmatched
    return f"{reasons[0]}; an adapter is not split or fused" if reasons else "it is no linear, convolution or embedding"
