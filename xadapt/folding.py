"""From adapters and a base to what is added to each of its layers, whether the base is opened or not."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from xadapt.attached import attach, updates_of
from xadapt.contract import Adapter, Base, PeftKind
from xadapt.errors import some
from xadapt.finite import is_finite
from xadapt.layouts.names import in_base, named_as_in, places_in
from xadapt.peft_internals import PEFT_TYPE_TO_PREFIX_MAPPING, BaseTunerLayer, PeftType, check_target_module_exists
from xadapt.update import Fold, Update, to_stored, total


@dataclass(frozen=True)
class Layer:
    """One layer of a base that adapters change."""

    path: str
    module: nn.Module  # without weight: its class and shape
    folds: tuple[tuple[Fold, float], ...]  # each with its adapter's weight in the sum
    fits: bool = False  # whether that is known already

    @property
    def weight_name(self) -> str:
        return f"{self.path}.weight"

    @property
    def bias_name(self) -> str | None:
        return f"{self.path}.bias" if isinstance(getattr(self.module, "bias", None), Tensor) else None

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in, *kernel)"""
        return tuple(to_stored(self.module, _weight(self.module)).shape)

    def update(self, weights: Mapping[str, Tensor]) -> Update:
        """What all the adapters add to this layer of a base that has these weights. Reads this layer alone.

        Raises:
            ValueError: NaN or infinity, in the base or in the update.
        """
        weight = weights[self.weight_name]
        bias = None if self.bias_name is None else weights[self.bias_name]
        return self._finite(self._fold(to_stored(self.module, weight), bias))

    def rehearse(self) -> None:
        """Folds shapes without data: whether the adapters fit, before any weight is read.

        Raises:
            ValueError: they do not.
        """
        if self.fits:
            return
        bias = None if self.bias_name is None else torch.empty(self.shape[0], device="meta")
        self._fold(torch.empty(self.shape, device="meta"), bias)

    def _fold(self, weight: Tensor, bias: Tensor | None) -> Update:
        wanted = (weight.shape[0], weight[0].numel())
        try:
            with torch.no_grad():
                update = total([_scaled(fold(weight, bias), factor) for fold, factor in self.folds])
        except RuntimeError as error:
            raise ValueError(f"{self._misfit()}: {error}. Was it trained on a base of other widths?") from error
        if update.matrix.shape != wanted:
            raise ValueError(
                f"{self._misfit()}: it changes {update.matrix.shape[0]} × {update.matrix.shape[1]} numbers of "
                f"{wanted[0]} × {wanted[1]}. Was it trained on a base of other widths?"
            )
        return update

    def _misfit(self) -> str:
        return (
            f"The adapter does not fit {self.path} of this base, a {type(self.module).__name__} of shape {self.shape}"
        )

    def _finite(self, update: Update) -> Update:
        tensors = [*vars(update.matrix).values(), *([] if update.bias is None else [update.bias])]
        if not all(is_finite(tensor) for tensor in tensors):
            raise ValueError(
                f"{self.path}: the update of this layer holds NaN or infinity, so the base's weight or the adapter does. "
                "Nothing was written."
            )
        return update


def layers_of(adapters: Sequence[Adapter], base: Base, factors: Sequence[float] | None = None) -> list[Layer]:
    """The layers of `base` that these adapters change, in the order of its modules. Opens no weight that no adapter carries.

    Args:
        adapters: what is added up.
        factors: how each adapter is weighted in the sum; 1 by default.

    Raises:
        ValueError: an adapter does not fit the base: it has layers that the base lacks, lacks layers that its config targets,
            or shapes differ; or it is of a sort whose update its file alone does not tell.
        TypeError: `factors` are no numbers.
    """
    factors = _numbers(factors, len(adapters))
    modules = base.modules()
    inside = [path for path, module in modules.items() if isinstance(module, BaseTunerLayer)]
    if inside:
        raise ValueError(
            f"{base.name} has adapters in it, at {some(inside)}: pass the base as it was before, or model.unload() first."
        )
    folds: dict[str, list[tuple[Fold, float]]] = {}
    attached = True
    for adapter, factor in zip(adapters, factors, strict=True):
        if not isinstance(adapter.kind, PeftKind):
            raise ValueError(
                f"An adapter of kind {adapter.kind.name!r} adds nothing to a base's weights: it is used as it is."
            )
        _check_saved(adapter, modules)
        tensors = _layer_tensors(adapter, base, modules)
        found = adapter.kind.updates(adapter.config, tensors)
        if found is None:
            config, renamed = named_as_in(adapter.config, tensors, modules)
            found = updates_of(attach(base.skeleton(), config, renamed))
            _check_places(adapter.config, found, modules)
        else:
            attached = False
            places = places_in(found, modules)
            found = {places[path]: fold for path, fold in found.items()}
            _check_coverage(adapter.config, found, base, modules)
        for path, fold in found.items():
            folds.setdefault(path, []).append((fold, factor))
    return [Layer(path, module, tuple(folds[path]), attached) for path, module in modules.items() if path in folds]


def saved_modules(adapter: Adapter) -> dict[str, Tensor]:
    """Tensors of the base that this adapter brings along whole (modules_to_save), by their name in the base."""
    return {name: tensor for name, tensor in adapter.tensors.items() if _is_saved(name, adapter.config)}


def _numbers(weights: Any, count: int) -> list[float]:
    """How each of the adapters counts."""
    if weights is None:
        return [1.0] * count
    if isinstance(weights, str) or not isinstance(weights, Iterable):
        raise TypeError(f"weights={weights!r}: pass one weight for each adapter, weights=[{weights!r}].")
    given = list(weights)
    if len(given) != count:
        raise ValueError(f"{count} adapters and {len(given)} weights: pass one weight for each adapter.")
    try:
        numbers = [math.nan if isinstance(weight, str) else float(weight) for weight in given]
    except (TypeError, ValueError) as error:
        raise TypeError(f"weights={given!r}: each is a number, how much that adapter counts.") from error
    if not all(math.isfinite(number) for number in numbers):
        raise ValueError(f"weights={given!r}: each is a finite number, how much that adapter counts.")
    return numbers


def _layer_tensors(adapter: Adapter, base: Base, modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The adapter's tensors without what it brings along whole, and without what is the base's own."""
    config: Any = adapter.config
    if getattr(config, "bias", "none") != "none":
        raise ValueError(
            f"The adapter was trained with bias={config.bias!r}: it also changes biases of the base, which cannot be told "
            "from its file alone. Load it and use PEFT's merge_and_unload."
        )
    tensors = {name: tensor for name, tensor in adapter.tensors.items() if not _is_saved(name, config)}
    carried = {name: own for name in tensors if (own := _base_name(name, modules))}
    for name, own in carried.items():
        _check_carried(own, tensors[name], base)
    return {name: tensor for name, tensor in tensors.items() if name not in carried}


def _is_saved(name: str, config: Any) -> bool:
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(PeftType(config.peft_type))
    if prefix and f".{prefix}" in name:  # proj_out.lora_A.weight, beside modules_to_save=["out"]
        return False
    parts = name.split(".")
    return any(_is_to_save(".".join(parts[:length]), config) for length in range(1, len(parts)))


def _is_to_save(path: str, config: Any) -> bool:
    """PEFT's rule for modules_to_save, which is another one than that for target_modules: the end of the string."""
    return any(path.endswith(name) for name in getattr(config, "modules_to_save", None) or ())


def _check_saved(adapter: Adapter, modules: Mapping[str, nn.Module]) -> None:
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
    path, _, attribute = re.sub(r"(\.base_layer)+\.", ".", name).rpartition(".")
    place = in_base(path, modules)
    own = place and isinstance(getattr(modules[place], attribute, None), Tensor)
    return f"{place}.{attribute}" if own else None


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


def _check_places(config: Any, folds: Mapping[str, Fold], modules: Mapping[str, nn.Module]) -> None:
    """Refuses what changes the base's own structure: its layers would not be those that the checkpoint has."""
    strange = [path for path in folds if path not in modules]
    if strange or getattr(config, "layer_replication", None):
        raise ValueError(
            f"This adapter puts layers into the base that its checkpoint has not: {some(strange) or 'layer_replication'}. "
            "It can be neither exported nor merged; run it with xadapt.load."
        )


def _check_coverage(config: Any, folds: Mapping[str, Fold], base: Base, modules: Mapping[str, nn.Module]) -> None:
    lacking = [path for path in folds if path not in modules]
    if lacking:
        raise ValueError(
            f"The adapter has tensors for layers that {base.name} lacks: {some(lacking)}. "
            "Is it the base (and the component: unet, text encoder) that the adapter was made for, or a sibling of it?"
        )
    if not getattr(config, "target_modules", None):
        return
    missing = [path for path in modules if path not in folds and check_target_module_exists(config, path)]
    if missing:
        raise ValueError(
            f"The adapter lacks tensors for layers that its config targets in {base.name}: {some(missing)}. "
            "Is it a base of the same depth, and was all of the adapter saved?"
        )


def _scaled(update: Update, factor: float) -> Update:
    return update if factor == 1 else update.scaled(factor)


def _weight(module: nn.Module) -> Tensor:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        raise ValueError(f"{type(module).__name__} has no weight that an adapter could be folded into.")
    return weight
