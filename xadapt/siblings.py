"""The two bases of a transfer, with the map between their layers."""

from __future__ import annotations

from functools import cached_property
from os import PathLike
from typing import TYPE_CHECKING

from xadapt.contract import Base
from xadapt.module_map import ModuleMap, map_modules, weight_similarity

if TYPE_CHECKING:
    from xadapt.module_map.override import Override


class Pair:
    """A source and a target: the contract's `Siblings`.

    Args:
        source: the base the adapter was trained on. None where it is not at hand: a method that needs it then says so.
        target: the base it is carried to.
        override: lines of the user's own for the module map, as `xadapt.module_map.map_modules` takes them.
    """

    def __init__(
        self, source: Base | None, target: Base, override: Override | str | PathLike[str] | None = None
    ) -> None:
        self._source = source
        self._target = target
        self._override = override

    @property
    def source(self) -> Base:
        if self._source is None:
            raise ValueError("This needs the base that the adapter was trained on; pass source=… (--source).")
        return self._source

    @property
    def has_source(self) -> bool:
        return self._source is not None

    @property
    def target(self) -> Base:
        return self._target

    @cached_property
    def modules(self) -> ModuleMap:
        """Names and shapes say it; of stacks of different depth, the weights of their blocks, which are then read once."""
        similarity = weight_similarity(self.source.weights(), self.target.weights())
        return map_modules(self.source.modules(), self.target.modules(), override=self._override, similarity=similarity)
