"""What a transfer would be refused for, as far as that can be told without reading the weights that it calculates with."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from xadapt.contract import Adapter, Base, Carried, Siblings, Transfer
from xadapt.errors import some
from xadapt.module_map import ModuleMap
from xadapt.progress import showing


@dataclass(frozen=True)
class Foreseen:
    """What a plan says of the outcome."""

    refused: str | None = None
    """Why the transfer would be refused."""

    untested: str | None = None
    """What it may still be refused for."""


def foresee(
    step: Transfer, method: str, adapter: Adapter, bases: Siblings, lost: Sequence[str], partial: bool
) -> Foreseen:
    """The transfer itself, as far as it comes without a weight: methods look at names and widths first, and some at no more.

    Args:
        step: of a method that has nothing to learn.
        lost: layers of the source that the module map has no counterpart for.
        partial: whether what can be carried will do.
    """
    closed = _ClosedPair(bases)
    try:
        with showing(False):
            carried = step.transfer(adapter, closed)
    except Exception as error:
        if not closed.asked:
            if isinstance(error, ValueError):
                return Foreseen(refused=str(error))
            raise
    except _WeightsWanted:
        pass
    else:
        if not closed.asked:  # else the method went on without what it could not read
            return _judged(carried, method, partial)
    if lost and not partial:
        return Foreseen(
            refused=f"{len(lost)} of the adapter's layers have no counterpart: {some(lost)}. partial=True writes the others."
        )
    return Foreseen(untested=f"what {method} makes of the weights, which a plan does not read")


def foresee_learning(method: str, lost: Sequence[str], partial: bool) -> Foreseen:
    """Of a method that learns first: whether it needs a counterpart for each layer is its own affair."""
    unknown = (
        f", and what becomes of {len(lost)} layers without a counterpart: {some(lost)}" if lost and not partial else ""
    )
    return Foreseen(untested=f"what {method} learns from the data, which a plan does not read{unknown}")


def _judged(carried: Carried, method: str, partial: bool) -> Foreseen:
    if not carried.left_out or partial:
        return Foreseen()
    reasons = [f"{path}: {why}" for path, why in carried.left_out.items()]
    return Foreseen(
        refused=f"{len(reasons)} of the adapter's layers have no counterpart that {method} could carry them to:\n  "
        + some(reasons, separator="\n  ")
        + "\npartial=True writes the others."
    )


class _WeightsWanted(BaseException):
    """A weight was looked up, or the network. No Exception, which methods that try others would take for a failure of these."""


class _ClosedPair:
    """The same two bases, without their weights. Their module map was made for the plan, and is taken from it."""

    def __init__(self, bases: Siblings) -> None:
        self._bases = bases
        self.asked: list[str] = []  # what was looked up all the same

    @cached_property
    def source(self) -> Base:
        return self._closed(self._bases.source)

    @cached_property
    def target(self) -> Base:
        return self._closed(self._bases.target)

    @property
    def modules(self) -> ModuleMap:
        return self._bases.modules

    def _closed(self, base: Base) -> Base:
        """A copy, so that it is of the same class for methods that look at that."""
        closed = copy.copy(base)

        def module(**options: object) -> nn.Module:
            self.asked.append(base.name)
            raise _WeightsWanted

        vars(closed).update(weights=lambda: _ClosedWeights(base.weights(), self.asked), module=module)
        return closed


class _ClosedWeights(Mapping[str, Tensor]):
    """The names of a base's tensors. Biases are read: they are small, and those that were trained along are carried by them."""

    def __init__(self, weights: Mapping[str, Tensor], asked: list[str]) -> None:
        self._weights, self._asked = weights, asked

    def __getitem__(self, name: str) -> Tensor:
        if name.endswith(".bias"):
            return self._weights[name]
        self._asked.append(name)
        raise _WeightsWanted

    def __contains__(self, name: object) -> bool:
        return name in self._weights

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self else default  # noqa: SIM401 (this is get)
