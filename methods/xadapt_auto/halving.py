"""The data in two halves: one that candidates are fitted on, one that judges them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

Batch = Mapping[str, Any]


def halves(batches: Sequence[Batch]) -> tuple[list[Batch], list[Batch]]:
    """Every other sample of each batch, and the others: both halves then have all sorts of data that there are, in whatever order.

    Where a batch is of one sample, or says something that is not by the sample, every other batch instead. The same list twice
    where there is but one such batch.
    """
    if all(_samples(batch) > 1 for batch in batches):
        return [_every_other(batch, 0) for batch in batches], [_every_other(batch, 1) for batch in batches]
    if len(batches) > 1:
        return list(batches[::2]), list(batches[1::2])
    return list(batches), list(batches)


def _samples(batch: Batch) -> int:
    """How many samples all tensors of a batch agree on; 0 where they do not."""
    sizes: set[int] = set()
    _each(batch, lambda tensor: sizes.add(tensor.shape[0] if tensor.ndim else 0))
    return sizes.pop() if len(sizes) == 1 else 0


def _every_other(batch: Batch, start: int) -> Batch:
    halved: Batch = _each(batch, lambda tensor: tensor[start::2])
    return halved


def _each(value: Any, work: Callable[[Tensor], Any]) -> Any:
    if isinstance(value, Tensor):
        return work(value)
    if isinstance(value, Mapping):
        return {name: _each(one, work) for name, one in value.items()}
    return value
