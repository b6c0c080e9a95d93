"""What the activations say: both models run each batch once, and the features of their layers are compared as they come.

Of a batch, some rows of the source's features are kept until the target has run it. Nothing else is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from xadapt.contract import Siblings
from xadapt.data.batches import on_device
from xadapt.feature_rows import rows_of
from xadapt.finite import is_finite
from xadapt.progress import track
from xadapt.watching import watching

from .similarity import FeatureLikeness

ROWS = 512
"""Of a batch that are compared: of a large model with all its linears adapted, every row would be tens of gigabytes."""


@dataclass(frozen=True)
class FeaturesMoved:
    """How far one layer's features moved between two models, and how much data says so."""

    inputs: float | None
    outputs: float | None
    inputs_cka: float | None
    outputs_cka: float | None
    rows: int


class Sample(NamedTuple):
    """Some rows of a layer's features."""

    rows: Tensor  # (rows, width), in the features' dtype
    total: int  # how many rows there were


def measure_activations(
    pairs: Mapping[str, str], bases: Siblings, batches: Iterable[Mapping[str, Any]]
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
    for batch in track(list(batches), "comparing features"):
        kept = features(models[0], list(pairs), batch, bases.source.name)
        there = features(models[1], list(pairs.values()), batch, bases.target.name)
        for path, place in pairs.items():
            for likeness, own, other in zip(seen[path], kept.get(path, ()), there.get(place, ()), strict=False):
                if own.total == other.total:
                    likeness.add(own.rows, other.rows)
        ran += 1
    if not ran:
        raise ValueError("The data is empty: no batch to compare features on.")
    return {
        path: FeaturesMoved(reads.distance, returns.distance, reads.cka, returns.cka, reads.count)
        for path, (reads, returns) in seen.items()
    }


def features(
    model: nn.Module, paths: Iterable[str], batch: Mapping[str, Any], name: str = "the model"
) -> dict[str, tuple[Sample, Sample]]:
    """What each layer reads and returns on a batch, padding left out.

    Of a layer that runs several times in one forward, the first time. A layer that reads token ids (an embedding) is told
    by its outputs twice.
    """
    seen: dict[str, tuple[Sample, Sample]] = {}

    def note(path: str, module: nn.Module, read: Tensor | None, result: Tensor | None) -> None:
        if path in seen or read is None or result is None:
            return
        reads = read if read.is_floating_point() else result
        _check_finite(reads, f"{path} of {name} reads")
        _check_finite(result, f"{path} of {name} returns")
        seen[path] = _sample(rows_of(reads, module, batch)), _sample(rows_of(result, module, batch))

    with torch.no_grad(), watching(model, paths, note):
        model(**on_device(batch, model))
    return seen


def _sample(rows: Tensor) -> Sample:
    """At most ROWS of them, evenly spaced; a copy, as a network may go on to change its features in place."""
    step = -(-rows.shape[0] // ROWS) or 1
    return Sample(rows[::step].clone(), rows.shape[0])


def _check_finite(tensor: Tensor, what: str) -> None:
    if not is_finite(tensor):
        raise ValueError(
            f"What {what} on the data holds NaN or infinity, so no features can be compared. Does the model "
            "run in this dtype (bfloat16 or float32 rather than float16)?"
        )
