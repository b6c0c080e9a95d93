"""What the tensors of a checkpoint are called in the live model, by the loading rules of transformers and diffusers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Naming:
    """A live model's tensors, and where a checkpoint has them."""

    shapes: Mapping[str, tuple[int, ...]]  # of every live tensor, in the model's order
    stored: Mapping[str, str]  # live name → name in the checkpoint; tied names lead to the one that is stored
    tied: Mapping[str, tuple[str, ...]]  # the other names of the same tensor
    converted: tuple[str, ...]  # parts of live names that are made from other tensors while the model is loaded

    def is_converted(self, name: str) -> bool:
        return any(part in name for part in self.converted)


def name_tensors(model: nn.Module, library: str, stored: Iterable[str], *, sharded: bool) -> Naming:
    """Matches names, without a look at any data. `model` may be on the meta device.

    Raises:
        ValueError: two tensors of the checkpoint are the same one of the model.
    """
    live = model.state_dict()
    found: Iterable[tuple[str, str]]
    converted: tuple[str, ...] = ()
    if library == "transformers":
        found, converted = _by_transformers(model, live, stored)
    else:
        found = _by_diffusers(model, stored, sharded)
    names: dict[str, str] = {}
    for name, key in found:
        if name not in live:
            continue
        if name in names:
            raise ValueError(
                f"The checkpoint has {names[name]!r} and {key!r}, which are both {name!r} of {type(model).__name__}; "
                "remove the one that is wrong."
            )
        names[name] = key
    tied = tied_names(model)
    for name, others in tied.items():
        sources = [other for other in others if other in names]
        if name not in names and sources:
            names[name] = names[sources[0]]
    shapes = {name: tuple(tensor.shape) for name, tensor in live.items()}
    return Naming(shapes, {name: names[name] for name in live if name in names}, tied, converted)


def _by_transformers(
    model: Any, live: Mapping[str, Tensor], stored: Iterable[str]
) -> tuple[list[tuple[str, str]], tuple[str, ...]]:
    """The steps of transformers' convert_and_load_state_dict_in_model that concern names."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    prefix, meta = model.base_model_prefix, dict(live)
    found, converted = [], set()
    for key in sorted(stored, key=dot_natural_key):  # some renamings rely on this order
        name, converter = rename_source_key(key, renamings, converters, prefix, meta)
        if name not in live and key in live:
            name, converter = rename_source_key(key, [], [], prefix, meta)
        if converter is None:
            found.append((name, key))
        else:
            converted.add(name)
    targets = (target for rule in converters if rule.was_used() for target in rule.target_patterns)
    return found, (*sorted(converted), *(target.strip("^$") for target in targets))


def _by_diffusers(model: Any, stored: Iterable[str], sharded: bool) -> list[tuple[str, str]]:
    names: Any = {key: key for key in stored}
    if not sharded:  # diffusers knows old names in unsharded files only
        model._fix_state_dict_keys_on_load(names)
    return list(names.items())


def tied_names(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """The other names of each tensor that a module has under several."""
    groups = defaultdict(list)
    for name, tensor in named_tensors(model):
        groups[_identity(tensor)].append(name)
    return {
        name: tuple(other for other in group if other != name)
        for group in groups.values()
        if len(group) > 1
        for name in group
    }


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers that a state dict holds, all names of each, as the objects they are in the model."""
    for path, module in model.named_modules(remove_duplicate=False):
        saved = (name for name in module._buffers if name not in module._non_persistent_buffers_set)
        for name in (*module._parameters, *saved):
            tensor = getattr(module, name)
            if tensor is not None:
                yield f"{path}.{name}" if path else name, tensor


def nearest(given: str, known: Iterable[str]) -> str:
    """What follows "no tensor of that name": the nearest names, as a model has too many to list."""
    near = get_close_matches(given, known, n=3)
    return f"The nearest: {', '.join(near)}." if near else "weights() lists them."


def _identity(tensor: Tensor) -> object:
    """Equal for tensors that share their memory as a whole; for those without memory of their own, the object."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta or not tensor.numel():
        return id(tensor)
    return (torch.device(tensor.device), tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
