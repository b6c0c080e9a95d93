"""What an adapter's file holds beside the adapter: whole modules (modules_to_save), and tensors of the base itself."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from xadapt.contract import Adapter, Base
from xadapt.errors import some
from xadapt.layouts.names import in_base
from xadapt.peft_internals import PEFT_TYPE_TO_PREFIX_MAPPING, PeftType


def saved_modules(adapter: Adapter) -> dict[str, Tensor]:
    """Tensors of the base that this adapter brings along whole (modules_to_save), by their name in the base."""
    return {name: tensor for name, tensor in adapter.tensors.items() if _is_saved(name, adapter.config)}


def layer_tensors(adapter: Adapter, base: Base, modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The adapter's tensors without what it brings along whole, and without what is the base's own."""
    config: Any = adapter.config
    if trained_biases(adapter, modules):
        raise ValueError(
            f"The adapter was trained with bias={config.bias!r}: it also changes biases of the base, which cannot be told "
            "from its file alone. Load it and use PEFT's merge_and_unload."
        )
    tensors = without_base_tensors(adapter, base, modules).tensors
    return {name: tensor for name, tensor in tensors.items() if not _is_saved(name, config)}


def without_base_tensors(adapter: Adapter, base: Base, modules: Mapping[str, nn.Module] | None = None) -> Adapter:
    """The adapter without the tensors of its own base that PEFT's save_pretrained wrote beside it: the embeddings.

    On another base they would overwrite what that one has. Opens no weight but those. Biases that were trained along (bias="all")
    stay: they are the adapter's.

    Raises:
        ValueError: they are other numbers than this base has, or of another shape.
    """
    modules = base.modules() if modules is None else modules
    config: Any = adapter.config
    trained = (".bias",) if getattr(config, "bias", "none") != "none" else ()
    carried = {
        name: own
        for name in adapter.tensors
        if not _is_saved(name, config) and not name.endswith(trained) and (own := _base_name(name, modules))
    }
    if not carried:
        return adapter
    for name, own in carried.items():
        _check_carried(own, adapter.tensors[name], base)
    return replace(adapter, tensors={name: one for name, one in adapter.tensors.items() if name not in carried})


def trained_biases(adapter: Adapter, modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """The biases of the base that lie in the adapter's file because they were trained along (bias="all", bias="lora_only"): the base's
    own names by the file's."""
    if getattr(adapter.config, "bias", "none") == "none":
        return {}
    saved = saved_modules(adapter)
    own = {name: _base_name(name, modules) for name in adapter.tensors if name.endswith(".bias") and name not in saved}
    return {name: of for name, of in own.items() if of is not None}


def moved_biases(adapter: Adapter, base: Base, times: int, dtype: torch.dtype) -> Adapter:
    """The adapter with the base's own biases taken from those in its file (times=-1), or added to them (times=1).

    Sums are taken in float64, so that the one after the other leaves what was there.

    Raises:
        ValueError: a layer of the base has no such bias, or one of another shape.
    """
    modules, weights, tensors = base.modules(), base.weights(), dict(adapter.tensors)
    known = trained_biases(adapter, modules)
    for name, there in adapter.tensors.items():
        if not name.endswith(".bias") or _module_of(name, modules) is None or _is_saved(name, adapter.config):
            continue
        if name not in known or weights[known[name]].shape != there.shape:
            raise ValueError(
                f"The adapter also changes the bias {name}, which {base.name} does not have, or has in another shape. "
                "Train it again with bias='none'."
            )
        tensors[name] = (there.double() + times * weights[known[name]].to(there.device).double()).to(dtype)
    return replace(adapter, tensors=tensors)


def lacking(adapter: Adapter, names: Iterable[str], base: Base) -> list[str]:
    """Of these parameters that an adapter brings along, those for which a base has none of the same name and shape."""
    modules = base.modules()
    found = []
    for name in names:
        own = _base_name(name, modules)
        path, _, attribute = (own or "").rpartition(".")
        if own is None or getattr(modules[path], attribute).shape != adapter.tensors[name].shape:
            found.append(name)
    return found


def _is_saved(name: str, config: Any) -> bool:
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(PeftType(config.peft_type))
    if prefix and f".{prefix}" in name:  # proj_out.lora_A.weight, beside modules_to_save=["out"]
        return False
    parts = name.split(".")
    return any(_is_to_save(".".join(parts[:length]), config) for length in range(1, len(parts)))


def _is_to_save(path: str, config: Any) -> bool:
    """PEFT's rule for modules_to_save, which is another one than that for target_modules: the end of the string."""
    return any(path.endswith(name) for name in getattr(config, "modules_to_save", None) or ())


def check_saved(adapter: Adapter, modules: Mapping[str, nn.Module]) -> None:
    """Refuses an adapter without the modules that it says it brings along: training has changed them."""
    saved = [f"{name}." for name in saved_modules(adapter)]
    lacking = []
    for path, module in modules.items():
        if path and _is_to_save(path, adapter.config) and module.state_dict():
            names = (path, path.removeprefix("text_model."), f"text_model.{path}")
            if not any(name.startswith(f"{own}.") for own in names for name in saved):
                lacking.append(path)
    if lacking:
        raise ValueError(
            f"The adapter's config says that it brings {some(lacking)} along whole (modules_to_save), and its file has no "
            "tensors for that: save the adapter again with PEFT's save_pretrained, where it was trained."
        )


def _base_name(name: str, modules: Mapping[str, nn.Module]) -> str | None:
    """The base's own tensor that an adapter's file carries under this name, or None if it is one of the adapter's.

    PEFT's save_pretrained writes the embeddings too, where they are adapted or the vocabulary has another size.
    """
    place, attribute = _module_of(name, modules), name.rpartition(".")[2]
    own = place and isinstance(getattr(modules[place], attribute, None), Tensor)
    return f"{place}.{attribute}" if own else None


def _module_of(name: str, modules: Mapping[str, nn.Module]) -> str | None:
    """The base's module that a parameter in an adapter's file belongs to, or None if that is none of the base's."""
    return in_base(re.sub(r"(\.base_layer)+\.", ".", name).rpartition(".")[0], modules)


def _check_carried(name: str, tensor: Tensor, base: Base) -> None:
    weight = base.weights()[name]
    if tensor.shape != weight.shape:
        raise ValueError(
            f"The adapter's file carries the base's {name}, of shape {tuple(tensor.shape)}, and {base.name} has "
            f"{tuple(weight.shape)}: it was trained after resize_token_embeddings. Resize the base in the same way, save it, and "
            "give that one."
        )
    if not (torch.equal(weight.to(tensor), tensor) or torch.equal(tensor.to(weight), weight)):
        raise ValueError(
            f"The adapter's file carries the base's {name}, with other numbers than {base.name} has. Where those of this base "
            "are meant, save the adapter without them: model.save_pretrained(folder, save_embedding_layers=False); "
            "else give the base that it was trained on."
        )
