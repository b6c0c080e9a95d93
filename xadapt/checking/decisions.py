"""From measures to verdicts. Pure functions of numbers.

What is known is in small experiments: a copied LoRA leads on ordinary drift; input space carries where the basis of the outputs
changed and output space where that of the inputs did; the relative distance of features sees both, CKA sees neither.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .measures import LayerMeasures
from .thresholds import Thresholds

Way = Literal["as it is", "input space", "output space", "align", "train", "there already", "nowhere"]
"""How a layer's update can be carried:

as it is       the two layers work in the same bases, drift aside
input space    what the layer returns has another basis, what it reads has not
output space   what the layer reads has another basis, what it returns has not
align          both have; an alignment on unlabelled data can find it
train          the widths differ, so neither side can be kept; an alignment may do for widths, training always does
there already  the target's weights have the update in them: the adapter was merged into it
nowhere        the target has no such layer
"""

Verdict = Literal["carries", "carries by layer", "doubtful", "needs data", "refused"]


@dataclass(frozen=True)
class LayerVerdict:
    """What is said of one layer, and why."""

    way: Way
    why: str
    doubtful: bool = False


@dataclass(frozen=True)
class Decision:
    """What is said of the whole, and of each layer, in the order of the measures."""

    verdict: Verdict
    why: str
    layers: tuple[LayerVerdict, ...]

    @property
    def merged(self) -> bool:
        """Whether the target has updates of the adapter in its weights already."""
        return any(layer.way == "there already" for layer in self.layers)

    @property
    def ways(self) -> dict[Way, int]:
        """How many layers go each way, the most frequent first."""
        return dict(Counter(layer.way for layer in self.layers).most_common())


def decide(measures: Sequence[LayerMeasures], thresholds: Thresholds | None = None) -> Decision:
    """The verdict on each layer and on the whole.

    Raises:
        ValueError: there is no layer.
    """
    if not measures:
        raise ValueError("No layer was measured: the adapter changes none.")
    limits = thresholds or Thresholds()
    layers = tuple(decide_layer(one, limits) for one in measures)
    verdict, why = _overall(layers, limits)
    return Decision(verdict, why, layers)


def decide_layer(one: LayerMeasures, limits: Thresholds) -> LayerVerdict:
    """The verdict on one layer."""
    if one.target is None:
        return LayerVerdict("nowhere", one.reason)
    if not one.fits:
        return LayerVerdict("train", one.reason)
    along, share = one.drift_along_update, one.update_in_drift
    if along is not None and share is not None and min(along, share) >= limits.merged:
        return LayerVerdict(
            "there already", f"the target's weights moved along this update (cosine {along:.2f}), by {share:.0%} of it"
        )
    inputs, outputs, by = _distances(one)
    if inputs is not None and outputs is not None:
        if inputs > limits.clearly * max(outputs, limits.rounding):
            return LayerVerdict(
                "output space", f"its inputs moved ({inputs:.2f}) and its outputs not ({outputs:.2f}), by {by}"
            )
        if outputs > limits.clearly * max(inputs, limits.rounding):
            return LayerVerdict(
                "input space", f"its outputs moved ({outputs:.2f}) and its inputs not ({inputs:.2f}), by {by}"
            )
    if _unrelated(one, limits):
        return LayerVerdict("align", _why_unrelated(one))
    drift = one.weight_drift
    if drift is not None and drift <= limits.same and not _moved(one, limits):
        return LayerVerdict("as it is", "the same weights")
    scale = _rescaled(one)
    if drift is not None and drift > limits.drifted:
        return LayerVerdict("as it is", f"far drift of the weights ({drift:.2f} of their norm)", doubtful=True)
    if scale is not None and not 1 / limits.strong <= scale <= limits.strong:
        return LayerVerdict(
            "as it is", f"the update is {scale:.2f} times as large beside the target's weight", doubtful=True
        )
    return LayerVerdict(
        "as it is", "ordinary drift" if drift is None else f"ordinary drift ({drift:.3f} of the weight's norm)"
    )


def _distances(one: LayerMeasures) -> tuple[float | None, float | None, str]:
    """How far the layer's inputs and outputs moved: of features where there is data, else of singular subspaces."""
    if one.inputs_moved is not None and one.outputs_moved is not None:
        return one.inputs_moved, one.outputs_moved, "features"
    if one.inputs_overlap is not None and one.outputs_overlap is not None:
        return 1 - one.inputs_overlap, 1 - one.outputs_overlap, "weights alone"
    return None, None, ""


def _moved(one: LayerMeasures, limits: Thresholds) -> bool:
    moved = [value for value in (one.inputs_moved, one.outputs_moved) if value is not None]
    return any(value > limits.rounding for value in moved)


def _unrelated(one: LayerMeasures, limits: Thresholds) -> bool:
    if one.inputs_moved is not None and one.outputs_moved is not None:
        return min(one.inputs_moved, one.outputs_moved) >= limits.unrelated
    return one.weight_cosine is not None and one.weight_cosine < limits.unrelated_cosine


def _why_unrelated(one: LayerMeasures) -> str:
    if one.inputs_moved is not None and one.outputs_moved is not None:
        return f"both its inputs ({one.inputs_moved:.2f}) and its outputs ({one.outputs_moved:.2f}) have other bases"
    return f"the weights have nothing in common as they stand (cosine {one.weight_cosine:.2f})"


def _rescaled(one: LayerMeasures) -> float | None:
    if not one.update_share or one.update_share_there is None:
        return None
    return one.update_share_there / one.update_share


def _overall(layers: Sequence[LayerVerdict], limits: Thresholds) -> tuple[Verdict, str]:
    count = len(layers)
    ways = Counter(layer.way for layer in layers)
    lost = ways["nowhere"]
    if lost and lost >= limits.refused * count:
        return "refused", f"the target has no counterpart for {lost} of {count} layers"
    if merged := ways["there already"]:
        return "refused", (
            f"the target's weights have the updates of {merged} of {count} layers in them already: the adapter was merged into it, and "
            "would count twice"
        )
    hard = ways["align"] + ways["train"]
    if hard:
        rest = f"{lost} have no counterpart; " if lost else ""
        return "needs data", (
            f"{rest}{hard} of {count} layers have other bases or widths in the target, and weights alone do not say how they "
            "correspond"
        )
    if lost:
        return "doubtful", f"{lost} of {count} layers have no counterpart and would be left out"
    doubtful = sum(layer.doubtful for layer in layers)
    if 2 * doubtful > count:
        return "doubtful", f"{doubtful} of {count} layers drifted far or changed their scale"
    if len(ways) > 1 or not ways["as it is"]:
        told = ", ".join(f"{number} {way}" for way, number in ways.most_common())
        return "carries by layer", f"the bases of some layers changed on one side: {told}"
    return "carries", "both models work in the same bases; drift aside, the adapter means the same there"
