"""An adapter as it is, with its layers under the names that the target has for them."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from xadapt.carried_along import lacking, moved_biases, saved_modules, trained_biases, without_base_tensors
from xadapt.contract import Adapter, Carried, Siblings
from xadapt.counterparts import Counterparts, Side, agrees, counterparts, shape_of
from xadapt.errors import some
from xadapt.layouts.names import in_base
from xadapt.live_base import LiveBase
from xadapt.peft_internals import check_target_module_exists, get_pattern_key

_PLACES = ("layers_to_transform", "layers_pattern", "exclude_modules")  # said by target_modules, once it lists paths
_TRAIN = "method='distil' trains a fresh adapter there that does the same, on unlabelled data (`xadapt methods` lists the others)."
_INSTEAD = {
    "tie": "method='lora_x' or method='aligned' writes a LoRA with an update for each layer; " + _TRAIN,
    "modules_to_save": _TRAIN + " Or train it again without modules_to_save.",
    "target_parameters": _TRAIN,
    "layer_replication": _TRAIN,
    "trainable_token_indices": _TRAIN,
}


def relocate(adapter: Adapter, bases: Siblings, agree: Side = "both") -> Carried:
    """The same tensors on the target's layers; of biases that were trained along, the change, on the target's own. Opens no weight but
    those of the source that lie in the adapter's file too, and the target's of these biases.

    Args:
        adapter: of a PeftKind, in any space.
        agree: the widths of a layer that its tensors depend on; layers where the target's differ are left out.

    Raises:
        ValueError: no layer has a counterpart, or names have to change in an adapter whose options are bound to them.
    """
    adapter = without_base_tensors(adapter, bases.source)
    biases = trained_biases(adapter, bases.source.modules())
    whole = {*saved_modules(adapter), *biases}
    if not biases:
        return _relocated(adapter, whole, bases, agree)
    dtype = adapter.tensors[next(iter(biases))].dtype
    changes = moved_biases(adapter, bases.source, -1, torch.float64)
    if isinstance(bases.source, LiveBase) and not any(changes.tensors[name].any() for name in biases):
        raise ValueError(
            f"{bases.source.name} has the trained biases of the adapter already, as a model that it was trained in does, so how they changed "
            "cannot be told. Pass the base from its checkpoint as source."
        )
    carried = _relocated(changes, whole, bases, agree)
    return replace(carried, adapter=moved_biases(carried.adapter, bases.target, 1, dtype))


def _relocated(adapter: Adapter, whole: Collection[str], bases: Siblings, agree: Side) -> Carried:
    """The same tensors under the target's names. `whole`: of those, the base's own parameters, which no module map knows."""
    modules = bases.source.modules()
    owners = {name: owner_of(name, modules) for name in adapter.tensors}
    paths = dict.fromkeys(path for name, path in owners.items() if path is not None and name not in whole)
    if not paths:
        raise ValueError(
            f"{bases.source.name} has none of the adapter's layers, the first of which is {next(iter(adapter.tensors))}. Was it "
            "trained on this base, and on this component of it?"
        )
    if _is_tied_throughout(adapter.config, paths) and _are_alike(paths, bases, agree):
        return Carried(adapter=replace(adapter, tensors=dict(adapter.tensors)))
    layers = {path: place for path in paths if (place := in_base(path, modules)) is not None}
    to = counterparts(dict.fromkeys(layers.values()), bases, agree)
    if lost := lacking(adapter, [name for name in whole if owners[name] not in layers], bases.target):
        raise ValueError(
            f"The adapter brings parameters of the base along (modules_to_save, bias), and {bases.target.name} has other names or shapes "
            f"for {some(lost)}. {_INSTEAD['modules_to_save']}"
        )
    same_names = all(path == place for path, place in to.found.items())
    if not to.left_out and same_names and not _targets_more(adapter.config, to.found.values(), bases):
        return Carried(adapter=replace(adapter, tensors=dict(adapter.tensors)))
    if bound := [name for name in whole if owners[name] not in layers]:
        raise ValueError(
            f"The target has other names or shapes for some of the adapter's layers, and parameters of the base that lie in its file cannot "
            f"follow: {some(bound)}. {_INSTEAD['modules_to_save']}"
        )
    return Carried(adapter=_moved(adapter, owners, layers, to), left_out=to.left_out)


def _is_tied_throughout(config: Any, paths: Collection[str]) -> bool:
    """Whether all layers share adapters by patterns that tell no block from another: whichever blocks a base has join in."""
    tie = getattr(config, "tie", None) or []
    patterns = [re.compile(pattern) for pattern in ([tie] if isinstance(tie, str) else tie)]
    return all(any(not one.groups and one.search(path) for one in patterns) for path in paths)


def _are_alike(paths: Collection[str], bases: Siblings, agree: Side) -> bool:
    """Whether the target has layers of these names and widths."""
    there, here = bases.source.modules(), bases.target.modules()
    places = [(in_base(path, there), in_base(path, here)) for path in paths]
    return all(
        place is not None and own is not None and agrees(shape_of(there[own]), shape_of(here[place]), agree)
        for own, place in places
    )


def _moved(adapter: Adapter, owners: Mapping[str, str | None], layers: Mapping[str, str], to: Counterparts) -> Adapter:
    """The tensors under their new names, and a config that targets those layers and no others."""
    config = _config(adapter.config, {path: to.found[place] for path, place in layers.items() if place in to.found})
    tensors: dict[str, Tensor] = {}
    for name, tensor in adapter.tensors.items():
        path = owners[name]
        if path is None:  # shared by all layers
            tensors[name] = tensor
        elif layers[path] in to.found:
            tensors[to.found[layers[path]] + name.removeprefix(path)] = tensor
    return replace(adapter, config=config, tensors=tensors)


def _config(config: Any, places: Mapping[str, str]) -> Any:
    bound = [name for name in _INSTEAD if getattr(config, name, None)]
    if bound:
        ways = " ".join(dict.fromkeys(_INSTEAD[name] for name in bound))
        raise ValueError(
            f"The target has other names or shapes for some of the adapter's layers, and {some(bound)} of its config is bound to "
            f"names, so it cannot be taken there as it is. {ways}"
        )
    new = copy.deepcopy(config)
    new.target_modules = "|".join(re.escape(place) for place in sorted(places.values()))
    for name in _PLACES:
        if hasattr(new, name):
            setattr(new, name, None)
    for name in ("rank_pattern", "alpha_pattern"):
        if given := getattr(config, name, None):
            setattr(new, name, _pattern(name, given, places))
    return new


def _targets_more(config: Any, places: Collection[str], bases: Siblings) -> bool:
    """Whether the config's names match layers of a larger target that the adapter has nothing for: further blocks, for example.
    A tied adapter has: they join the tie."""
    if not isinstance(getattr(config, "target_modules", None), list | set | str) or getattr(config, "tie", None):
        return False
    known = bases.source.modules()
    further = (path for path in bases.target.modules() if path not in places and path not in known)
    return any(check_target_module_exists(config, path) for path in further)


def _pattern(name: str, given: Mapping[str, Any], places: Mapping[str, str]) -> dict[str, Any]:
    """PEFT's patterns match the ends of paths; here each layer gets the value it had, under its full new path."""
    if not all(isinstance(value, int | float) for value in given.values()):
        raise ValueError(f"{name} of this adapter holds more than numbers, so its layers cannot be renamed.")
    keys = list(given)
    values = {place: given.get(get_pattern_key(keys, path)) for path, place in places.items()}
    return {f"^{re.escape(place)}": value for place, value in values.items() if value is not None}


def owner_of(name: str, modules: Collection[str]) -> str | None:
    """The path in a tensor's name, as it is written there: its longest beginning that is a module. None for shared tensors."""
    parts = name.split(".")
    beginnings = (".".join(parts[:length]) for length in range(len(parts) - 1, 0, -1))
    return next((path for path in beginnings if in_base(path, modules) is not None), None)
