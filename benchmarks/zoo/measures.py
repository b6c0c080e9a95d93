"""What check measures of an adapter's layers on a pair, as plain numbers that a rule can be fitted on."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from benchmarks.zoo.world import World
from xadapt.checking.activations import measure_activations
from xadapt.checking.weights import measure_weights, pairs_with_features
from xadapt.siblings import Pair


def measured(world: World, task: str, space: str, pair: Pair) -> list[dict[str, Any]]:
    """`LayerMeasures` of each of the adapter's layers, with those of the calibration data, without what was not measured."""
    layers = measure_weights(world.adapter(task, space), pair)
    moved = measure_activations(dict(pairs_with_features(layers)), pair, world.calibration(task, space, False))
    found = []
    for layer in layers:
        if layer.source in moved:
            there = moved[layer.source]
            layer = replace(
                layer,
                inputs_moved=there.inputs,
                outputs_moved=there.outputs,
                inputs_cka=there.inputs_cka,
                outputs_cka=there.outputs_cka,
            )
        plain = {key: _rounded(value) for key, value in asdict(layer).items() if value is not None and key != "reason"}
        found.append(plain)
    return found


def _rounded(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value
