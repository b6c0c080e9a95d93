"""The data in two halves: one that candidates are fitted on, one that judges them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from xadapt.data.counting import IGNORED, anything_counts

Batch = Mapping[str, Any]


def halves(batches: Sequence[Batch]) -> tuple[list[Batch], list[Batch]]:
    """Every other sample of each batch, and the others: both halves then have all sorts of data that there are, in whatever order.

    Where a batch is of one sample, or says something that is not by the sample, every other batch instead. The same list twice
    where there is but one such batch. What labels leave out is halved by itself, so that something counts in both halves.
    """
    found: tuple[list[Batch], list[Batch]] = [], []
    for counts in (True, False):
        sort = [batch for batch in batches if anything_counts(batch) == counts]
        for half, part in zip(found, _halves(sort), strict=True):
            half += part
    return found


def batches_in_one(whole: Sequence[Batch], half: Sequence[Batch]) -> int:
    """How many batches of a half hold as many samples as one of the whole, of those in which anything counts."""
    sizes = [[_samples(batch) for batch in batches if anything_counts(batch)] for batches in (whole, half)]
    if not all(sizes) or not all(map(all, sizes)):
        return 1
    return max(1, round(mean(sizes[0]) / mean(sizes[1])))


def _halves(batches: Sequence[Batch]) -> tuple[list[Batch], list[Batch]]:
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
    rows = torch.arange(_samples(batch))
    if isinstance(labels := batch.get("labels"), Tensor):  # those that count first
        rows = (labels == IGNORED).view(len(rows), -1).all(1).long().cpu().argsort(stable=True)
    chosen = rows[start::2]
    halved: Batch = _each(batch, lambda tensor: tensor[chosen.to(tensor.device)])
    return halved


def _each(value: Any, work: Callable[[Tensor], Any]) -> Any:
    if isinstance(value, Tensor):
        return work(value)
    if isinstance(value, Mapping):
        return {name: _each(one, work) for name, one in value.items()}
    return value
