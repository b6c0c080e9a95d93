"""Which space for which layer: look at how far the features of each layer moved between source and target.

An input adapter relies on the features that a layer reads, an output adapter on those that it returns, a LoRA on both. So where one
side of a layer stayed and the other did not, the basis there has changed, and the space of the side that stayed is the one that
carries over; where both moved alike there is nothing to gain, and the LoRA is copied. Distances are relative and taken feature by feature: an
index that forgives rotations, such as CKA, cannot see what matters here.

Needs unlabelled lines and both models, no training on the target.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Moved:
    """How far the features of one layer moved: ‖X_target - X_source‖ / ‖X_source‖ before and behind the layer."""

    inputs: float
    outputs: float

    def space(self, clearly: float, rounding: float) -> str:
        """The space that carries over.

        One side must have moved `clearly` times as far as the other, where a distance below `rounding` counts as `rounding`.
        """
        if self.inputs > clearly * max(self.outputs, rounding):
            return "output"
        if self.outputs > clearly * max(self.inputs, rounding):
            return "input"
        return "lora"


def moved(
    source: PreTrainedModel,
    target: PreTrainedModel,
    modules: Mapping[str, str],
    tokens: Tensor,
) -> dict[str, Moved]:
    """For each source module (path -> its path in the target), how far its features moved on `tokens`."""
    ours = _features(source, list(modules), tokens)
    theirs = _features(target, list(modules.values()), tokens)

    def distance(a: Tensor, b: Tensor) -> float:
        return float((b - a).norm() / a.norm())

    return {
        path: Moved(
            inputs=distance(ours[path][0], theirs[modules[path]][0]),
            outputs=distance(ours[path][1], theirs[modules[path]][1]),
        )
        for path in modules
    }


def _features(model: PreTrainedModel, paths: list[str], tokens: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """What each layer reads and returns on `tokens`."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(path: str) -> torch.utils.hooks.RemovableHandle:
        def keep(module: torch.nn.Module, arguments: tuple[Tensor], result: Tensor) -> None:
            seen[path] = (arguments[0], result)

        return model.get_submodule(path).register_forward_hook(keep)

    handles = [watch(path) for path in paths]
    try:
        with torch.no_grad():
            model(input_ids=tokens)
    finally:
        for handle in handles:
            handle.remove()
    return seen
