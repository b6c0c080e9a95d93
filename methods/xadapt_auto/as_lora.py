"""Whatever a method has written, as the plain LoRA that it is on the target."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from xadapt.carried_along import saved_modules
from xadapt.contract import Adapter, Base
from xadapt.errors import some
from xadapt.folding import layers_of
from xadapt.kinds import PeftKind
from xadapt.matrix import LowRank
from xadapt_weight import COPY
from xadapt_weight.pairs import LayerPair
from xadapt_weight.writing import Part, lora_adapter

LORA = cast(PeftKind, COPY.writes)


class FullRank(ValueError):
    """What an adapter adds to a layer is no product of two narrow matrices, as DoRA's."""


Parts = Mapping[str, Part]


def parts_of(adapter: Adapter, target: Base) -> dict[str, Part]:
    """What an adapter adds to each layer of a base, by path. Reads the adapted layers, one at a time.

    Raises:
        FullRank: an update is not of low rank.
        ValueError: the adapter does not fit.
    """
    weights, modules = target.weights(), target.modules()
    parts = {}
    for layer in layers_of([adapter], target):
        update = layer.update(weights)
        if not isinstance(update.matrix, LowRank):
            raise FullRank(f"{layer.path}: its update has full rank, so it is no LoRA.")
        parts[layer.path] = Part(LayerPair(layer, layer.path, modules[layer.path]), update.matrix, update.bias)
    return parts


def as_lora(parts: Parts, target: Base, like: Adapter) -> Adapter:
    """The LoRA with these updates, in the dtype of an adapter.

    Raises:
        ValueError: that adapter brings along whole modules, which would be lost.
    """
    if names := sorted(saved_modules(like)):
        raise ValueError(
            f"the adapter brings along whole modules of its own (modules_to_save): {some(names)}. They cannot be carried from one "
            f"space to another; method={like.kind.name!r} takes them along as they are."
        )
    return lora_adapter(LORA, parts, target.modules(), like)
