"""A detached LoRA-X adapter: what it adds to a weight, and how it is taken to another base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from peft import PeftConfig
from torch import Tensor

from xadapt.contract import Adapter, Base, Carried, Siblings
from xadapt.counterparts import counterparts, shape_of
from xadapt.layouts.names import in_base
from xadapt.matrix import LowRank
from xadapt.relocate import relocate
from xadapt.update import Fold, Update, calculating_in, to_stored

from .directions import leading, product, signs_between

CORE = ".lorax_core"


def updates(config: PeftConfig, tensors: Mapping[str, Tensor]) -> Mapping[str, Fold] | None:
    """The fold of each layer. It decomposes the weight it is given, so it is that base's own."""
    if not all(name.endswith(CORE) for name in tensors):
        return None
    return {name.removesuffix(CORE): partial(_fold, core) for name, core in tensors.items()}


def _fold(core: Tensor, weight: Tensor, bias: Tensor | None) -> Update:
    like = calculating_in(weight)
    u, v = leading(weight, core.shape[0])
    left, right = product(u, core.to(like), v)
    return Update(LowRank(left, right))


def carry(adapter: Adapter, bases: Siblings) -> Carried:
    """The same M on the target's layers, with the signs of its singular vectors taken into account.

    Raises:
        ValueError: a layer of the target has fewer directions than the adapter uses.
    """
    there = bases.source.modules()
    layers = {name: in_base(name.removesuffix(CORE), there) for name in adapter.tensors if name.endswith(CORE)}
    to = counterparts([place for place in layers.values() if place], bases, "neither")
    modules = bases.target.modules()
    for place in to.found.values():
        if adapter.config.r > min(shape := shape_of(modules[place])):
            raise ValueError(
                f"{place} of the target has shape {shape}, so {min(shape)} singular directions, and the adapter uses "
                f"{adapter.config.r}. Train it with r={min(shape)} or less."
            )
    carried = relocate(adapter, bases, "neither")
    if adapter.config.form == "diagonal":
        return carried
    tensors = dict(carried.adapter.tensors)
    evidence: dict[str, dict[str, float | str]] = {}
    renamed = bool(to.left_out) or any(path != place for path, place in to.found.items())
    for name, path in layers.items():
        if path is None or path not in to.found:
            continue
        place = to.found[path]
        core = adapter.tensors[name]
        ours, theirs = (
            _directions(base, at, core.shape[0]) for base, at in ((bases.source, path), (bases.target, place))
        )
        signs, alike = signs_between(ours, theirs)
        tensors[f"{place}{CORE}" if renamed else name] = (signs[:, None] * core.to(signs) * signs[None]).to(core)
        evidence[place] = {"overlap": float(alike.mean())}
    return replace(carried, adapter=replace(carried.adapter, tensors=tensors), evidence=evidence)


def _directions(base: Base, path: str, count: int) -> tuple[Tensor, Tensor]:
    module: Any = base.modules()[path]
    return leading(to_stored(module, base.weights()[f"{path}.weight"]), count)
