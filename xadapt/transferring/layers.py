"""Which layers of a base an adapter's tensors are for, told without a look at a weight."""

from __future__ import annotations

from math import prod
from typing import Any

from torch import nn

from xadapt.contract import Adapter, Base, Siblings
from xadapt.counterparts import shape_of
from xadapt.folding import layers_of
from xadapt.kinds import PeftKind
from xadapt.layouts.names import in_base
from xadapt.relocate import owner_of

from .result import PlannedLayer


def adapted_layers(adapter: Adapter, base: Base) -> tuple[str, ...]:
    """The paths in this base, in its order; none for formats that PEFT does not know."""
    if not isinstance(adapter.kind, PeftKind):
        return ()
    try:
        return tuple(layer.path for layer in layers_of([adapter], base))
    except ValueError:  # a sort that can be carried and cannot be folded: its tensors' names say which layers
        modules = base.modules()
        written = (owner_of(name, modules) for name in adapter.tensors)
        found = (in_base(path, modules) for path in written if path is not None)
        return tuple(dict.fromkeys(path for path in found if path is not None))


def planned_layers(adapter: Adapter, bases: Siblings) -> tuple[PlannedLayer, ...]:
    """Each layer of the adapter, and where the module map sends it. Opens no weight."""
    here, there = bases.source.modules(), bases.target.modules()
    planned = []
    for path in adapted_layers(adapter, bases.source):
        lines = bases.modules.of(path)
        size = _bytes(here[path])
        if not lines:
            reason = bases.modules.why_unmatched(path) or "it is no linear, convolution or embedding"
            planned.append(PlannedLayer(path, None, None, reason, size))
        for line in lines:
            planned.append(
                PlannedLayer(path, line.target, line.relation, line.reason, size + _bytes(there[line.target]))
            )
    return tuple(planned)


def _bytes(module: nn.Module) -> int:
    weight: Any = getattr(module, "weight", None)
    if not hasattr(weight, "element_size"):
        return 0
    return prod(shape_of(module)) * int(weight.element_size())
