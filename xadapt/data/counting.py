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

    Padding does not count, nor does the position before a token with a label of -100. With labels the last position does not
    either: there is nothing behind it.

    Raises:
        ValueError: labels and tokens differ in shape, or they are of an encoder-decoder.
        TypeError: labels are no tensor.
    """
    mask, labels = batch.get("attention_mask"), _labels(batch)
    counted = mask.bool() if isinstance(mask, Tensor) else None
    if labels is None:
        return counted
    if "decoder_input_ids" in batch:
        raise ValueError(
            "Labels beside decoder_input_ids are of an encoder-decoder; leave them out, and all positions count."
        )
    tokens = _tokens(batch)
    if labels.ndim != 2 or (tokens is not None and labels.shape != tokens):
        raise ValueError(
            f"A batch has labels of shape {tuple(labels.shape)}"
            + (f" and tokens of shape {tuple(tokens)}" if tokens is not None else "")
            + f": labels are one for each token, {IGNORED} where it does not count."
        )
    wanted = torch.zeros_like(labels, dtype=torch.bool)
    wanted[:, :-1] = labels[:, 1:] != IGNORED
    return wanted if counted is None else wanted & counted.to(wanted.device)


def samples_counting(batch: Mapping[str, Any], samples: int) -> Tensor | None:
    """The samples of a denoiser's batch that count, (samples,), bool; None where all do.

    Raises:
        ValueError: labels are not one for each sample.
        TypeError: labels are no tensor.
    """
    labels = _labels(batch)
    if labels is None:
        return None
    if labels.shape != (samples,):
        raise ValueError(
            f"A denoiser's batch has labels of shape {tuple(labels.shape)} and {samples} samples: labels are one for each sample, "
            f"{IGNORED} where it does not count."
        )
    return labels != IGNORED


def anything_counts(batch: Mapping[str, Any]) -> bool:
    """Whether labels leave something of the batch."""
    labels = _labels(batch)
    return labels is None or bool((labels != IGNORED).any())


def with_neutral(
    data: Sequence[Mapping[str, Any]], neutral: Sequence[Mapping[str, Any]]
) -> tuple[Mapping[str, Any], ...]:
    """Batches of data, then neutral ones with labels that leave out all of them."""
    return (*data, *(_left_out(batch) for batch in neutral))


def _left_out(batch: Mapping[str, Any]) -> dict[str, Any]:
    tokens = _tokens(batch)
    if tokens is not None:
        return {**batch, "labels": torch.full(tokens, IGNORED)}
    known = [batch[name] for name in ("sample", "hidden_states") if name in batch]
    samples = next(value for value in [*known, *batch.values()] if isinstance(value, Tensor) and value.ndim).shape[0]
    return {**batch, "labels": torch.full((samples,), IGNORED)}


def _labels(batch: Mapping[str, Any]) -> Tensor | None:
    labels = batch.get("labels")
    if labels is None or isinstance(labels, Tensor):
        return labels
    raise TypeError(
        f"A batch's labels are a {type(labels).__name__}; pass a tensor, {IGNORED} where something does not count."
    )


def _tokens(batch: Mapping[str, Any]) -> torch.Size | None:
    """(samples, length), where there are tokens."""
    for name in ("input_ids", "inputs_embeds"):
        if isinstance(found := batch.get(name), Tensor):
            return found.shape[:2]
    return None


def without_labels(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch as a forward takes it: nothing here has a loss."""
    return {name: value for name, value in batch.items() if name != "labels"}
