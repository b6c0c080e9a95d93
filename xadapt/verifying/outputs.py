"""What a model does on a batch, and several models' answers as rows that can be compared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from xadapt.data.batches import on_device
from xadapt.data.counting import counting, samples_counting

from .behaviour import log_probabilities

ROWS = 256  # at a time: of a large vocabulary, more would be gigabytes of float32


def is_language_model(model: nn.Module) -> bool:
    """Whether it gives logits over a vocabulary; otherwise it is taken for a denoiser."""
    get = getattr(model, "get_output_embeddings", None)
    return callable(get) and get() is not None


def answer(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """What a model returns: logits (samples, length, vocabulary), or a denoiser's prediction.

    Raises:
        ValueError: its forward takes other arguments, or returns neither.
    """
    network: nn.Module = model.get_base_model() if isinstance(model, PeftModel) else model
    try:
        with torch.no_grad():
            result: Any = network(**on_device(batch, network))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{type(network).__name__} does not take the data's batches ({', '.join(batch)}): {error}"
        ) from error
    for name in ("logits", "sample"):
        found = getattr(result, name, None)
        if isinstance(found, Tensor):
            return found
    if isinstance(result, tuple) and result and isinstance(result[0], Tensor):
        return result[0]
    raise ValueError(
        f"{type(network).__name__} returns {type(result).__name__}, neither logits nor a predicted noise: behaviours are compared for "
        "causal language models and denoisers."
    )


def in_strips(
    outputs: tuple[Tensor, ...], batch: Mapping[str, Any], probabilities: bool
) -> Iterator[tuple[Tensor, ...]]:
    """The models' answers as rows, some at a time, on one device: log-probabilities (rows, vocabulary), or predictions (samples,
    numbers), of what counts of the batch (`xadapt.data.counting`)."""
    outputs = tuple(output.to(outputs[0].device) for output in outputs)
    if not probabilities:
        samples = samples_counting(batch, len(outputs[0]))
        yield tuple(output.flatten(1) if samples is None else output.flatten(1)[samples] for output in outputs)
        return
    counted = counting(batch)
    flat = tuple(_kept(output, counted) for output in outputs)
    if len({len(one) for one in flat}) > 1:
        raise ValueError(
            f"The models' outputs have different lengths, {' and '.join(str(len(one)) for one in flat)} tokens."
        )
    for parts in zip(*(torch.split(one, ROWS) for one in flat), strict=True):
        yield tuple(log_probabilities(part) for part in parts)


def rows(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """All the rows of one model at once, as `in_strips` gives them."""
    parts = [part for (part,) in in_strips((answer(model, batch),), batch, is_language_model(model))]
    return torch.cat(parts)


def _kept(logits: Tensor, counted: Tensor | None) -> Tensor:
    return logits.flatten(0, 1) if counted is None else logits[counted.to(logits.device)]
