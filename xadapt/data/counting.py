"""What of a batch counts where behaviours are compared, and what methods only learn from: labels of -100 leave it out.

What labels say otherwise is not looked at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

IGNORED = -100
"""The label of what is not to count, as everywhere in the field."""


def counting(batch: Mapping[str, Any]) -> Tensor | None:
    """The positions of a batch of token ids whose next token counts, (samples, length), bool; None where all do.

    Padding does not count. Where there are labels, what they say is not looked at, only where they are -100: the position before
    such a token does not count, nor does the last one, behind which there is nothing.

    Raises:
        ValueError: labels and token ids differ in shape.
    """
    ids, mask, labels = batch.get("input_ids"), batch.get("attention_mask"), batch.get("labels")
    counted = mask.bool() if isinstance(mask, Tensor) else None
    if not isinstance(labels, Tensor):
        return counted
    if isinstance(ids, Tensor) and labels.shape != ids.shape:
        raise ValueError(
            f"A batch has labels of shape {tuple(labels.shape)} and token ids of shape {tuple(ids.shape)}: labels are one for each "
            f"token, {IGNORED} where it does not count."
        )
    wanted = torch.zeros_like(labels, dtype=torch.bool)
    wanted[:, :-1] = labels[:, 1:] != IGNORED
    return wanted if counted is None else wanted & counted.to(wanted.device)


def samples_counting(batch: Mapping[str, Any], samples: int) -> Tensor | None:
    """The samples of a denoiser's batch that count, (samples,), bool; None where all do.

    Raises:
        ValueError: labels are not one for each sample.
    """
    labels = batch.get("labels")
    if not isinstance(labels, Tensor):
        return None
    if labels.shape != (samples,):
        raise ValueError(
            f"A denoiser's batch has labels of shape {tuple(labels.shape)} and {samples} samples: labels are one for each sample, "
            f"{IGNORED} where it does not count."
        )
    return labels != IGNORED


def nothing_counts(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch with labels that leave out all of it."""
    ids = batch.get("input_ids")
    if isinstance(ids, Tensor):
        return {**batch, "labels": torch.full_like(ids, IGNORED)}
    samples = next(value.shape[0] for value in batch.values() if isinstance(value, Tensor) and value.ndim)
    return {**batch, "labels": torch.full((samples,), IGNORED)}


def in_turn(data: Sequence[Mapping[str, Any]], neutral: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any], ...]:
    """Batches of data, and of neutral ones that do not count, two by two: who halves the batches has both sorts in both halves."""
    found: list[Mapping[str, Any]] = []
    left_out = [nothing_counts(batch) for batch in neutral]
    for start in range(0, max(len(data), len(left_out)), 2):
        found += [*data[start : start + 2], *left_out[start : start + 2]]
    return tuple(found)


def without_labels(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch as a forward takes it: nothing here has a loss."""
    return {name: value for name, value in batch.items() if name != "labels"}
