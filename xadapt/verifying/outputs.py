"""What a model does on a batch, as rows that can be compared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from xadapt.data.batches import on_device

from .behaviour import log_probabilities


def is_language_model(model: nn.Module) -> bool:
    """Whether it gives logits over a vocabulary; otherwise it is taken for a denoiser."""
    get = getattr(model, "get_output_embeddings", None)
    return callable(get) and get() is not None


def rows(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Next-token log-probabilities (tokens, vocabulary) of a language model, padding left out; predictions (samples, numbers) of a
    denoiser.

    Raises:
        ValueError: the model returns neither.
    """
    result = model(**on_device(batch, model))
    logits = getattr(result, "logits", None)
    if isinstance(logits, Tensor):
        mask = batch.get("attention_mask")
        return log_probabilities(logits, None if mask is None else mask.to(logits.device))
    predicted = getattr(result, "sample", None)
    if predicted is None and isinstance(result, tuple) and result:
        predicted = result[0]
    if not isinstance(predicted, Tensor):
        raise ValueError(
            f"{type(model).__name__} returns {type(result).__name__}, with neither logits nor a sample: neither a causal language model nor "
            "a denoiser of diffusers."
        )
    return predicted.flatten(1)
