"""The five models on the same inputs, a batch at a time: bare and adapted source, bare target, and the target with an adapter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from rich.progress import track
from torch import Tensor

from xadapt.contract import Adapter, Siblings
from xadapt.data.batches import Batches
from xadapt.data.denoisers import is_denoiser

from .behaviour import Agreement, LogProbs, Predictions, Retention, log_probabilities
from .models import adapted, answer

ROWS = 256  # at a time: of a large vocabulary, more would be gigabytes of float32


def compare(
    bases: Siblings, adapter: Adapter, candidate: Adapter | None, data: Batches, title: str, progress: bool = False
) -> Agreement:
    """How far `candidate` changes the target as `adapter` changes the source. No candidate: the bare target.

    Raises:
        ValueError: one of them cannot be loaded, or the outputs cannot be compared.
    """
    sums = Predictions() if is_denoiser(bases.target) else LogProbs()
    with adapted(bases.source, adapter) as source:
        if candidate is None:
            _run(bases, source, None, data, sums, title, progress)
        else:
            with adapted(bases.target, candidate) as target:
                _run(bases, source, target, data, sums, title, progress)
    return sums.result()


def retained(bases: Siblings, candidate: Adapter, neutral: Batches, title: str, progress: bool = False) -> float:
    """How much of the bare target's behaviour is left on inputs that are not the adapter's business."""
    kept = Retention(probabilities=not is_denoiser(bases.target))
    with adapted(bases.target, candidate) as target:
        for batch in _tracked(neutral, title, progress):
            with target.disable_adapter():
                own = answer(target.get_base_model(), batch, bases.target)
            for rows in _rows((own, answer(target.get_base_model(), batch, bases.target)), batch, kept.probabilities):
                kept.add(*rows)
    return kept.result()


def _run(
    bases: Siblings,
    source: PeftModel,
    target: PeftModel | None,
    data: Batches,
    sums: LogProbs | Predictions,
    title: str,
    progress: bool,
) -> None:
    for batch in _tracked(data, title, progress):
        with source.disable_adapter():
            outputs = [answer(source.get_base_model(), batch, bases.source)]
        outputs.append(answer(source.get_base_model(), batch, bases.source))
        if target is None:
            outputs += [answer(bases.target.module().eval(), batch, bases.target)] * 2
        else:
            with target.disable_adapter():
                outputs.append(answer(target.get_base_model(), batch, bases.target))
            outputs.append(answer(target.get_base_model(), batch, bases.target))
        for rows in _rows(tuple(outputs), batch, isinstance(sums, LogProbs)):
            sums.add(*rows)


def _rows(outputs: tuple[Tensor, ...], batch: Mapping[str, Any], probabilities: bool) -> Iterator[tuple[Tensor, ...]]:
    """The models' outputs as rows, some at a time, on one device."""
    outputs = tuple(output.to(outputs[0].device) for output in outputs)
    if not probabilities:
        yield tuple(output.flatten(1) for output in outputs)
        return
    mask = batch.get("attention_mask")
    flat = tuple(_kept(output, mask) for output in outputs)
    for parts in zip(*(torch.split(one, ROWS) for one in flat), strict=False):
        yield tuple(log_probabilities(part[None], None) for part in parts)


def _kept(logits: Tensor, mask: Any) -> Tensor:
    return logits.flatten(0, 1) if mask is None else logits[mask.to(logits.device).bool()]


def _tracked(batches: Batches, title: str, progress: bool) -> Iterable[Mapping[str, Any]]:
    console = Console(stderr=True)
    return track(batches.batches, title, console=console, transient=True, disable=not progress)
