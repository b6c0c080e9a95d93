"""From adapters and a base to what is added to each of its layers, whether the base is opened or not."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from xadapt.attached import attach, updates_of
from xadapt.carried_along import check_saved, layer_tensors
from xadapt.contract import Adapter, Base
from xadapt.errors import some
from xadapt.finite import is_finite
from xadapt.kinds import PeftKind
from xadapt.layouts.names import named_as_in, places_in
from xadapt.peft_internals import BaseTunerLayer, check_target_module_exists
from xadapt.update import Fold, Update, to_stored, total


@dataclass(frozen=True)
class Term:
    """What one adapter adds to a layer."""

    fold: Fold
    factor: float  # the adapter's weight in the sum
    is_attached: bool
    """PEFT's own layer tells it: it has met the base's shapes already, and needs the base's weight as data."""

    def update(self, weight: Tensor, bias: Tensor | None) -> Update:
        found = self.fold(weight, bias)
        return found if self.factor == 1 else found.scaled(self.factor)


@dataclass(frozen=True)
class Layer:
    """One layer of a base that adapters change."""

    path: str
    module: nn.Module  # without weight: its class and shape
    terms: tuple[Term, ...]

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
        return self._finite(self._sum(self.terms, to_stored(self.module, weight), bias))

    def rehearse(self) -> None:
        """Folds shapes without data: whether the adapters fit, before any weight is read.

        Raises:
            ValueError: they do not.
        """
        open_terms = [term for term in self.terms if not term.is_attached]
        if open_terms:
            bias = None if self.bias_name is None else torch.empty(self.shape[0], device="meta")
            self._sum(open_terms, torch.empty(self.shape, device="meta"), bias)

    @property
    def is_large(self) -> bool:
        """Whether an update takes several times the memory of the layer's weight: PEFT's own merges do."""
        return any(term.is_attached for term in self.terms)

    def _sum(self, terms: Sequence[Term], weight: Tensor, bias: Tensor | None) -> Update:
        wanted = (weight.shape[0], weight[0].numel())
        try:
            with torch.no_grad():
                update = total([term.update(weight, bias) for term in terms])
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
    terms: dict[str, list[Term]] = {}
    for adapter, factor in zip(adapters, factors, strict=True):
        if not isinstance(adapter.kind, PeftKind):
            raise ValueError(
                f"An adapter of kind {adapter.kind.name!r} adds nothing to a base's weights: it is used as it is."
            )
        check_saved(adapter, modules)
        tensors = layer_tensors(adapter, base, modules)
        found = adapter.kind.updates(adapter.config, tensors)
        is_attached = found is None
        if found is None:
            config, renamed = named_as_in(adapter.config, tensors, modules)
            found = updates_of(attach(base.skeleton(), config, renamed))
            _check_places(adapter.config, found, modules)
        else:
            places = places_in(found, modules)
            found = {places[path]: fold for path, fold in found.items()}
            _check_coverage(adapter.config, found, base, modules)
        for path, fold in found.items():
            terms.setdefault(path, []).append(Term(fold, factor, is_attached))
    return [Layer(path, module, tuple(terms[path])) for path, module in modules.items() if path in terms]


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


def _weight(module: nn.Module) -> Tensor:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        raise ValueError(f"{type(module).__name__} has no weight that an adapter could be folded into.")
    return weight
