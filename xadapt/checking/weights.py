"""What the weights alone say: one pair of tensors at a time, no model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import Tensor

from xadapt.contract import Adapter, Base, Siblings
from xadapt.finite import is_finite
from xadapt.folding import Layer, layers_of
from xadapt.matrix import Matrix, add
from xadapt.module_map import MappedLayer
from xadapt.relocate import relocate
from xadapt.update import to_stored
from xadapt.workers import each

from .measures import LayerMeasures
from .similarity import drift_along, leading_subspaces, overlap, weight_likeness


def measure_weights(adapter: Adapter, bases: Siblings) -> tuple[LayerMeasures, ...]:
    """Every layer that the adapter changes in the source, measured against its counterpart in the target.

    Raises:
        ValueError: the adapter does not fit the source, or a weight holds NaN or infinity.
    """
    layers = layers_of([adapter], bases.source)
    there = _as_it_is(adapter, bases)

    def look(layer: Layer) -> LayerMeasures:
        return _measure(layer, bases, there)

    return tuple(each(look, layers, "comparing weights"))


def _as_it_is(adapter: Adapter, bases: Siblings) -> Mapping[str, Layer]:
    """The adapter's layers on the target when it is taken there as it is, by target path; none where it cannot be."""
    try:
        carried = relocate(adapter, bases, getattr(adapter.config, "space", None) or "both")
        return {layer.path: layer for layer in layers_of([carried.adapter], bases.target)}
    except ValueError:  # what cannot be taken as it is has no update there; the map's reasons say why
        return {}


def _measure(layer: Layer, bases: Siblings, there: Mapping[str, Layer]) -> LayerMeasures:
    lines = bases.modules.of(layer.path)
    if not lines:
        reason = bases.modules.why_unmatched(layer.path) or "it is no linear, convolution or embedding"
        return LayerMeasures(source=layer.path, reason=reason)
    line = lines[0]
    found = LayerMeasures(source=layer.path, target=line.target, relation=line.relation, reason=_reason(lines))
    if not line.fits or len(lines) > 1:
        return found
    target = there.get(line.target)
    names = [name for name in (layer.weight_name, layer.bias_name) if name]
    names_there = [f"{line.target}.{attribute}" for attribute in ("weight", "bias")]
    here, other = _read(bases.source, names), _read(bases.target, names_there)
    module = bases.target.modules()[line.target]
    own = to_stored(layer.module, here[layer.weight_name]).flatten(1)
    its = to_stored(module, other[f"{line.target}.weight"]).flatten(1)
    alike = weight_likeness(own, its)
    (left, right), (left_there, right_there) = leading_subspaces(own), leading_subspaces(its)
    update = layer.update(here).matrix
    along = drift_along(own, its, update)
    found = replace(
        found,
        weight_drift=alike.drift,
        weight_cosine=alike.cosine,
        inputs_overlap=overlap(right, right_there),
        outputs_overlap=overlap(left, left_there),
        update_share=_ratio(math.sqrt(update.energy), alike.norm),
        drift_along_update=along[0] if along else None,
        update_in_drift=along[1] if along else None,
    )
    if target is None:
        return found
    moved = target.update(other).matrix
    return replace(
        found,
        update_share_there=_ratio(math.sqrt(moved.energy), alike.norm_there),
        update_change=_change(update, moved),
    )


def _reason(lines: tuple[MappedLayer, ...]) -> str:
    return lines[0].reason if len(lines) == 1 else f"{len(lines)} layers of the target: {lines[0].reason}"


def _read(base: Base, names: list[str]) -> dict[str, Tensor]:
    weights = base.weights()
    read = {name: weights[name] for name in names if name in weights}
    for name, tensor in read.items():
        if not is_finite(tensor):
            raise ValueError(f"{name} of {base.name} holds NaN or infinity, so nothing can be calculated from it.")
    return read


def _change(update: Matrix, moved: Matrix) -> float | None:
    """‖moved − update‖ / ‖update‖. Both stay factored."""
    energy = update.energy
    if not energy:
        return None
    like = next(iter(vars(update).values())).double()
    apart = add(_like(moved, like), _like(update, like).scaled(-1)).energy
    return math.sqrt(max(0.0, apart) / energy)


def _like(matrix: Matrix, like: Tensor) -> Matrix:
    """In float64, since the difference of two nearly equal products is what is left of them; and on one device."""
    return type(matrix)(*(tensor.to(like) for tensor in vars(matrix).values()))


def _ratio(one: float, other: float) -> float | None:
    return one / other if other else None


def pairs_with_features(measures: tuple[LayerMeasures, ...]) -> Iterator[tuple[str, str]]:
    """Source and target paths of the layers whose features can be compared."""
    for one in measures:
        if one.target is not None and one.relation not in ("part", "whole"):
            yield one.source, one.target
