"""What the activations say: both models run each batch once, and the features of their layers are compared as they come.

Of a batch, the source's features are kept until the target has run it. Nothing else is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from xadapt.contract import Siblings
from xadapt.data.batches import on_device

from .similarity import FeatureLikeness


@dataclass(frozen=True)
class FeaturesMoved:
    """How far one layer's features moved between two models, and how much data says so."""

    inputs: float | None
    outputs: float | None
    inputs_cka: float | None
    outputs_cka: float | None
    rows: int


def measure_activations(
    pairs: Mapping[str, str], bases: Siblings, batches: Iterable[Mapping[str, Any]], progress: bool = False
) -> dict[str, FeaturesMoved]:
    """For each source layer, how far what it reads and what it returns are from those of its counterpart.

    Args:
        pairs: source path → target path.
        batches: dicts of arguments of both models' forward. Padding is left out where there is an attention_mask.

    Raises:
        ValueError: there is no batch, or a layer's features hold NaN or infinity.
    """
    models = bases.source.module(), bases.target.module()
    seen = {path: (FeatureLikeness(), FeatureLikeness()) for path in pairs}
    ran = 0
    console = Console(stderr=True)
    for batch in track(list(batches), "comparing features", console=console, transient=True, disable=not progress):
        kept = features(models[0], list(pairs), batch, bases.source.name)
        there = features(models[1], list(pairs.values()), batch, bases.target.name)
        for path, place in pairs.items():
            for likeness, own, other in zip(seen[path], kept.get(path, ()), there.get(place, ()), strict=False):
                if own.shape[0] == other.shape[0]:
                    likeness.add(own, other)
        ran += 1
    if not ran:
        raise ValueError("The data is empty: no batch to compare features on.")
    return {
        path: FeaturesMoved(reads.distance, returns.distance, reads.cka, returns.cka, reads.count)
        for path, (reads, returns) in seen.items()
    }


def features(
    model: nn.Module, paths: Iterable[str], batch: Mapping[str, Any], name: str = "the model"
) -> dict[str, tuple[Tensor, Tensor]]:
    """What each layer reads and returns on a batch: (rows, width) each, padding left out.

    Of a layer that runs several times in one forward, the first time. A layer that reads token ids (an embedding) is told
    by its outputs twice.
    """
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    was_training = model.training
    model.eval()
    with torch.no_grad(), _watching(model, paths, seen):
        model(**on_device(batch, model))
    model.train(was_training)
    mask = batch.get("attention_mask")
    rows = {}
    for path, (reads, returns) in seen.items():
        module = model.get_submodule(path)
        rows[path] = _rows(reads, module, mask), _rows(returns, module, mask)
        for what, tensor in zip(("reads", "returns"), rows[path], strict=True):
            if not bool(torch.isfinite(tensor).all()):
                raise ValueError(
                    f"What {path} of {name} {what} on the data holds NaN or infinity, so no features can be compared. Does the model "
                    "run in this dtype (bfloat16 or float32 rather than float16)?"
                )
    return rows


@contextmanager
def _watching(model: nn.Module, paths: Iterable[str], seen: dict[str, tuple[Tensor, Tensor]]) -> Iterator[None]:
    def watch(path: str) -> Any:
        def keep(module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any], result: Any) -> None:
            read = next((one for one in (*arguments, *options.values()) if isinstance(one, Tensor)), None)
            if path in seen or read is None or not isinstance(result, Tensor):
                return
            seen[path] = (read if read.is_floating_point() else result, result)

        return model.get_submodule(path).register_forward_hook(keep, with_kwargs=True)

    handles = [watch(path) for path in paths]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rows(tensor: Tensor, module: nn.Module, mask: Any) -> Tensor:
    """(…, width) or (batch, channels, height, width) as (rows, width), without what is padding."""
    if isinstance(module, nn.modules.conv._ConvNd):
        tensor = tensor.movedim(1, -1)
    if isinstance(mask, Tensor) and mask.ndim == 2 and tensor.shape[:2] == mask.shape:
        return tensor[mask.to(tensor.device).bool()].float()
    return tensor.reshape(-1, tensor.shape[-1]).float()
