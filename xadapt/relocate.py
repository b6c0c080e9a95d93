"""An adapter as it is, with its layers under the names that the target has for them."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from xadapt.contract import Adapter, Carried, Siblings
from xadapt.counterparts import Counterparts, Side, counterparts
from xadapt.errors import some
from xadapt.layouts.names import in_base
from xadapt.peft_internals import get_pattern_key

_PLACES = ("layers_to_transform", "layers_pattern", "exclude_modules")  # said by target_modules, once it lists paths
_BY_NAME = ("tie", "modules_to_save", "target_parameters", "layer_replication", "trainable_token_indices")


def relocate(adapter: Adapter, bases: Siblings, agree: Side = "both") -> Carried:
    """The same tensors on the target's layers. Opens no weight.

    Args:
        adapter: of a PeftKind, in any space.
        agree: the widths of a layer that its tensors depend on; layers where the target's differ are left out.

    Raises:
        ValueError: no layer has a counterpart, or names have to change in an adapter whose options are bound to them.
    """
    modules = bases.source.modules()
    owners = {name: _owner(name, modules) for name in adapter.tensors}
    paths = dict.fromkeys(path for path in owners.values() if path is not None)
    if not paths:
        raise ValueError(
            f"{bases.source.name} has none of the adapter's layers, the first of which is {next(iter(adapter.tensors))}. Was it "
            "trained on this base, and on this component of it?"
        )
    layers = {path: place for path in paths if (place := in_base(path, modules)) is not None}
    to = counterparts(dict.fromkeys(layers.values()), bases, agree)
    if not to.left_out and all(path == place for path, place in to.found.items()):
        return Carried(adapter=replace(adapter, tensors=dict(adapter.tensors)))
    return Carried(adapter=_moved(adapter, owners, layers, to), left_out=to.left_out)


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
    bound = [name for name in _BY_NAME if getattr(config, name, None)]
    if bound:
        raise ValueError(
            f"The target has other names or shapes for some of the adapter's layers, and {some(bound)} of its config is bound to "
            "names. Train it again without, or rename the target's modules."
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


def _pattern(name: str, given: Mapping[str, Any], places: Mapping[str, str]) -> dict[str, Any]:
    """PEFT's patterns match the ends of paths; here each layer gets the value it had, under its full new path."""
    if not all(isinstance(value, int | float) for value in given.values()):
        raise ValueError(f"{name} of this adapter holds more than numbers, so its layers cannot be renamed.")
    keys = list(given)
    values = {place: given.get(get_pattern_key(keys, path)) for path, place in places.items()}
    return {f"^{re.escape(place)}": value for place, value in values.items() if value is not None}


def _owner(name: str, modules: Collection[str]) -> str | None:
    """The path in a tensor's name, as it is written there: its longest beginning that is a module. None for shared tensors."""
    parts = name.split(".")
    beginnings = (".".join(parts[:length]) for length in range(len(parts) - 1, 0, -1))
    return next((path for path in beginnings if in_base(path, modules) is not None), None)
