"""The adapter that a method has made, layer by layer, as config and tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from xadapt.contract import Adapter
from xadapt.kinds import PeftKind
from xadapt.layouts import minimal_config
from xadapt.matrix import LowRank

from .pairs import LayerPair


@dataclass(frozen=True)
class Part:
    """What stands on one layer of the target."""

    pair: LayerPair
    matrix: LowRank
    constant: Tensor | None = None


def written_like(adapter: Adapter) -> Tensor:
    """An empty tensor of the widest floating-point type among an adapter's, where these are."""
    tensors = [tensor for tensor in adapter.tensors.values() if tensor.is_floating_point()]
    return tensors[0].new_empty(0, dtype=reduce(torch.promote_types, (tensor.dtype for tensor in tensors)))


def lora_adapter(kind: PeftKind, parts: Mapping[str, Part], modules: Mapping[str, nn.Module], like: Adapter) -> Adapter:
    """A plain LoRA with these updates, by target path. The scaling is 1: it is in the factors.

    Args:
        kind: stock LoRA.
        parts: each matrix (out, in·kernel).
        modules: the target's.
        like: the adapter it was made of, for dtype and task type.
    """
    written, constants = written_like(like), _with_constants(parts)
    tensors: dict[str, Tensor] = {}
    for path, part in parts.items():
        a, b = _own(part.matrix.right, written), _own(part.matrix.left, written)
        outputs, inputs, *kernel = part.pair.shape
        if isinstance(part.pair.module, nn.Embedding):
            tensors[f"{path}.lora_embedding_A"], tensors[f"{path}.lora_embedding_B"] = a, b
            continue
        tensors[f"{path}.lora_A.weight"] = a.view(a.shape[0], inputs, *kernel)
        tensors[f"{path}.lora_B.weight"] = b.view(*b.shape, *[1] * len(kernel))
        if constants:
            tensors[f"{path}.lora_B.bias"] = _constant(part, outputs, written)
    classes = {type(part.pair.module) for part in parts.values()}
    config = minimal_config(
        _table(parts),
        modules,
        lora_bias=constants,
        fan_in_fan_out=Conv1D in classes and nn.Linear not in classes,
        task_type=like.config.task_type,
    )
    return Adapter(kind=kind, config=config, tensors=tensors)


def feature_adapter(
    kind: PeftKind, parts: Mapping[str, Part], modules: Mapping[str, nn.Module], like: Adapter
) -> Adapter:
    """An adapter in feature space with these Δ, by target path. Arguments as for `lora_adapter`, each matrix (width, width)."""
    written, constants = written_like(like), _with_constants(parts)
    found = minimal_config(_table(parts), modules)
    names = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules")
    options: dict[str, Any] = {name: getattr(found, name) for name in names}
    make: Any = kind.config()
    tensors: dict[str, Tensor] = {}
    for path, part in parts.items():
        phi = f"{path}.{kind.name}_phi"
        tensors[f"{phi}.lora_A.weight"] = _own(part.matrix.right, written)
        tensors[f"{phi}.lora_B.weight"] = _own(part.matrix.left, written)
        if constants:
            tensors[f"{phi}.lora_B.bias"] = _constant(part, part.matrix.left.shape[0], written)
    config: LoraConfig = make(**options, lora_bias=constants, task_type=like.config.task_type)
    return Adapter(kind=kind, config=config, tensors=tensors)


def _table(parts: Mapping[str, Part]) -> dict[str, tuple[int, float]]:
    """Rank and alpha, equal, by path."""
    return {path: (part.matrix.rank, float(part.matrix.rank)) for path, part in parts.items()}


def _with_constants(parts: Mapping[str, Part]) -> bool:
    return any(part.constant is not None and bool(part.constant.any()) for part in parts.values())


def _constant(part: Part, width: int, written: Tensor) -> Tensor:
    """lora_bias is for all layers or for none, so most may be zeros."""
    return written.new_zeros(width) if part.constant is None else _own(part.constant, written)


def _own(tensor: Tensor, written: Tensor) -> Tensor:
    """Memory of its own: tensors must not change with the adapter they were made of."""
    return tensor.to(written, copy=True, memory_format=torch.contiguous_format)
