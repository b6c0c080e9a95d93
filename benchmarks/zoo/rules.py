"""Rules that name a row from what is known without labels, each with the numbers that it turns on."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, fields
from typing import Any, cast

from benchmarks.zoo.stats import BARE, Example
from xadapt.checking.decisions import decide
from xadapt.checking.measures import LayerMeasures
from xadapt.checking.thresholds import Thresholds
from xadapt_auto.choosing import choose

CHECK_GRID: dict[str, tuple[float, ...]] = {
    "clearly": (2.0, 3.0, 5.0),
    "rounding": (0.05, 0.1, 0.2),
    "unrelated": (0.7, 1.0, 1.2),
    "refused": (0.3, 0.5),
}
POLICY_GRID: dict[str, tuple[float, ...]] = {
    "margin": (0.0, 0.001, 0.005, 0.01, 0.02, 0.05, 0.1),
    "gain": (0.0, 0.05, 0.1, 0.2, 0.3, 0.4),
}
_MEASURES = {field.name for field in fields(LayerMeasures)}


def by_check(example: Example, thresholds: Thresholds) -> str:
    """What check's verdict on most of the layers says of the whole adapter."""
    layers = tuple(
        LayerMeasures(**cast(dict[str, Any], {key: value for key, value in one.items() if key in _MEASURES}))
        for one in example.layers
    )
    if not layers:
        return BARE
    decision = decide(layers, thresholds)
    if decision.verdict == "refused":
        return BARE
    way = Counter(layer.way for layer in decision.layers).most_common(1)[0][0]
    wishes = {
        "as it is": ["copy"],
        "input space": ["copy"] if example.space == "input" else ["aligned_input", "pinv_input", "copy"],
        "output space": ["copy"] if example.space == "output" else ["aligned_output", "pinv_output", "copy"],
        "align": ["aligned"],
        "train": ["aligned"],
        "there already": [],
        "nowhere": [],
    }[way]
    return next((row for row in wishes if row in example.scores), BARE)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The numbers that the method auto turns on, with its defaults."""

    margin: float = 0.001
    gain: float = 0.05


def by_trust(example: Example, limits: Limits) -> str:
    """auto's own choice among the training-free rows, by verify's score of each: whole adapters, without mixtures of layers."""
    told = {row: example.trust[row] for row in example.free if "trust" in example.trust.get(row, {})}
    bare = next((figures["trust_bare"] for figures in told.values()), 0.0)
    scores = {row: figures["trust"] for row, figures in told.items()}
    return choose(scores, lead={"copy": limits.margin}, bare=bare, gain=limits.gain).name or BARE
