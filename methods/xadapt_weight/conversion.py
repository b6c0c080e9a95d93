"""The plumbing of the two families of methods: read a layer, call the mathematics, note what was lost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from xadapt.contract import Adapter, Carried, Siblings
from xadapt.kinds import PeftKind
from xadapt.matrix import LowRank
from xadapt.truncate import Truncation, truncate
from xadapt_feature.spaces import get_space

from .layerwise import Converted, each_layer
from .pairs import LayerPair, Opened
from .pseudo_inverse import input_form, output_form, relative_error, ridge_solve
from .subspaces import carry_both_parts, leading, project
from .writing import feature_adapter, lora_adapter


@dataclass(frozen=True)
class Solve:
    """How an update is re-expressed."""

    space: str
    ridge: float
    dtype: torch.dtype
    hold_bias: bool = True  # in output space: by a constant


def to_feature_space(adapter: Adapter, bases: Siblings, kind: PeftKind, solve: Solve) -> Carried:
    """The adapter re-expressed on the source's weights as one of `kind`, for the target. The errors are those on the source."""
    weights, inputs = bases.source.weights(), solve.space == "input"

    def convert(pair: LayerPair) -> Converted:
        if isinstance(pair.module, nn.Embedding):
            raise ValueError(
                f"{pair.source.path} is an embedding, which has no input features, and feature space is not for it. Train "
                "without it, or use lora_x, prolora or copy."
            )
        layer = pair.open(weights, solve.dtype)
        delta = (input_form if inputs else output_form)(layer.weight, layer.matrix, solve.ridge)
        folded = get_space(solve.space).fold(layer.weight, delta)
        assert isinstance(folded, LowRank)
        constant = _input_constant(pair, layer, solve.ridge) if inputs else _output_constant(layer, delta, solve)
        return Converted(_no_wider(delta), constant, relative_error(folded, layer.matrix))

    parts, errors, left_out = each_layer(adapter, bases, "input" if inputs else "output", convert)
    return _carried(feature_adapter(kind, parts, bases.target.modules(), adapter), errors, left_out)


def to_target_subspaces(adapter: Adapter, bases: Siblings, kind: PeftKind, to: Truncation) -> Carried:
    """LoRA-X: each update projected on the leading singular subspaces of the target's weight."""
    read, written = bases.source.weights(), bases.target.weights()

    def convert(pair: LayerPair) -> Converted:
        layer = pair.open(read, torch.float32)
        onto = leading(pair.target_weight(written).flatten(1), to)
        update = _like(layer.matrix, onto.left)
        matrix = project(update, onto)
        return Converted(matrix, layer.moved, relative_error(matrix, update))

    parts, errors, left_out = each_layer(adapter, bases, "both", convert)
    return _carried(lora_adapter(kind, parts, bases.target.modules(), adapter), errors, left_out)


def to_both_parts(adapter: Adapter, bases: Siblings, kind: PeftKind, to: Truncation, cross_terms: bool) -> Carried:
    """ProLoRA: the part in the source's singular subspaces, and the part outside, each to the target's."""
    read, written = bases.source.weights(), bases.target.weights()

    def convert(pair: LayerPair) -> Converted:
        layer = pair.open(read, torch.float32)
        here = leading(pair.target_weight(written).flatten(1), to)
        there = leading(layer.weight.flatten(1), to).like(here.left)  # the bases may be on different devices
        update = _like(layer.matrix, here.left)
        matrix = carry_both_parts(update, there, here, cross_terms=cross_terms)
        return Converted(_no_wider(matrix), layer.moved, relative_error(matrix, update))

    parts, errors, left_out = each_layer(adapter, bases, "both", convert)
    return _carried(lora_adapter(kind, parts, bases.target.modules(), adapter), errors, left_out)


def _no_wider(matrix: LowRank) -> LowRank:
    """A rank above the width says no more."""
    width = min(matrix.shape)
    return truncate(matrix, Truncation(rank=width))[0] if matrix.rank > width else matrix


def _carried(adapter: Adapter, errors: Mapping[str, float], left_out: Mapping[str, str]) -> Carried:
    """`error` is the relative error of a layer's update in the Frobenius norm: 0 for none, 1 for all of it lost."""
    return Carried(
        adapter=adapter, evidence={path: {"error": error} for path, error in errors.items()}, left_out=left_out
    )


def _input_constant(pair: LayerPair, layer: Opened, ridge: float) -> Tensor | None:
    """c with W c ≈ what the adapter adds to the bias."""
    if layer.moved is None:
        return None
    if layer.weight.ndim > 2 and layer.weight[0, 0].numel() > 1:
        raise ValueError(
            f"{pair.source.path}: the adapter moves the bias of a convolution, and no constant before it does the same at "
            "the padded border. Use pinv_output."
        )
    return ridge_solve(layer.weight.flatten(1), layer.moved[:, None], ridge)[:, 0]


def _output_constant(layer: Opened, delta: LowRank, solve: Solve) -> Tensor | None:
    """An output adapter moves the bias along, by Δb; the update it stands for did not."""
    if layer.bias is None or not solve.hold_bias:
        return layer.moved
    moved = -delta.before(layer.bias[:, None]).tensor()[:, 0]
    return moved if layer.moved is None else moved + layer.moved


def _like(update: LowRank, like: Tensor) -> LowRank:
    return LowRank(update.left.to(like), update.right.to(like))
