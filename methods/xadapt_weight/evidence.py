"""What a transfer reports of itself beside the adapter."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

NOTHING: Mapping[str, float] = MappingProxyType({})


class Evidenced:
    """A transfer that remembers what its last one lost.

    `transfer` returns an adapter and nothing else, so the numbers are left here. They are no option: dataclasses built on
    this class have no field for them, and compare equal whatever they are.
    """

    _evidence = NOTHING

    @property
    def evidence(self) -> Mapping[str, float]:
        """By layer of the target: the relative error of its update in the Frobenius norm, 0 for none, 1 for all of it lost.

        Of the last transfer; empty before the first, and after one that failed.
        """
        return self._evidence

    def _leave(self, evidence: Mapping[str, float]) -> None:
        object.__setattr__(self, "_evidence", MappingProxyType(dict(evidence)))  # also where the dataclass is frozen
