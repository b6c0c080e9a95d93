"""What an adapter adds to the layers of a base, one layer at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from xadapt.matrix import Matrix, add


@dataclass(frozen=True)
class Update:
    """What is added to a layer of weight (out, in, *kernel): to its weight and to its bias."""

    matrix: Matrix
    """(out, in·kernel): the layout of `weight.flatten(1)`."""

    bias: Tensor | None = None
    """(out,), or None where the bias stays as it is."""

    def scaled(self, factor: float) -> Update:
        return Update(self.matrix.scaled(factor), None if self.bias is None else self.bias * factor)


Fold = Callable[[Tensor, "Tensor | None"], Update]
"""From a layer's weight (out, in, *kernel) and bias (out,), in any dtype, to what the adapter adds there."""


def total(updates: Sequence[Update]) -> Update:
    """The sum of updates of one layer."""
    result = updates[0]
    for update in updates[1:]:
        biases = [bias for bias in (result.bias, update.bias) if bias is not None]
        result = Update(add(result.matrix, update.matrix), torch.stack(biases).sum(0) if biases else None)
    return result


def calculating_in(weight: Tensor) -> Tensor:
    """An empty tensor of the dtype and device to calculate in: float64 stays, everything smaller becomes float32."""
    return weight.new_empty(0, dtype=torch.float64 if weight.dtype == torch.float64 else torch.float32)


def stores_transpose(layer: nn.Module) -> bool:
    """Whether this class of layer stores its weight as (in, out).

    transformers' Conv1D (GPT-2) does, and embeddings, which are a linear over one-hot rows.
    """
    return isinstance(layer, (Conv1D, nn.Embedding))


def to_stored(layer: nn.Module, weight: Tensor) -> Tensor:
    """A weight from (out, in, *kernel) to the layout in which this class of layer stores it, and back."""
    return weight.T if stores_transpose(layer) else weight
