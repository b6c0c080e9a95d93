"""What check measures of a layer. Plain numbers, no tensors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LayerMeasures:
    """One layer that the adapter changes, in the source and in the target. None: not measured, or not defined there."""

    source: str
    """Its path in the source."""

    target: str | None = None
    """Its counterpart's path; None where it has none."""

    relation: str | None = None
    """Of `xadapt.module_map.Relation`; None without a counterpart."""

    reason: str = ""
    """Why this counterpart, or why none."""

    weight_drift: float | None = None
    """‖W′ − W‖ / ‖W‖; None too where W is zero and W′ is not."""

    weight_cosine: float | None = None
    """cos(W, W′) of the weights as vectors (Revisit Model Adaptation, Fig. 2)."""

    inputs_overlap: float | None = None
    """How much of the leading right singular subspace of W lies in that of W′, 0 to 1: whether both read the same directions."""

    outputs_overlap: float | None = None
    """The same of the left singular subspaces: whether both write the same directions."""

    update_share: float | None = None
    """‖ΔW‖ / ‖W‖ on the source."""

    update_share_there: float | None = None
    """‖ΔW′‖ / ‖W′‖ on the target, the adapter taken as it is."""

    update_change: float | None = None
    """‖ΔW′ − ΔW‖ / ‖ΔW‖, the adapter taken as it is: 0 for a LoRA, not for one in feature space, which the target's weights
    modulate."""

    drift_along_update: float | None = None
    """cos(W′ − W, ΔW): near 1 where the adapter has been merged into the target already."""

    update_in_drift: float | None = None
    """⟨W′ − W, ΔW⟩ / ‖ΔW‖²: how much of the update is there, 1 for all."""

    inputs_moved: float | None = None
    """‖x′ − x‖ / ‖x‖ over the data: how far what the layer reads moved, feature by feature."""

    outputs_moved: float | None = None
    """‖y′ − y‖ / ‖y‖ of what the layer returns, without any adapter."""

    inputs_cka: float | None = None
    """Linear CKA of x and x′. It forgives every rotation, which an adapter does not: shown beside the distance, not used."""

    outputs_cka: float | None = None

    @property
    def fits(self) -> bool:
        """Whether the counterpart has the same shape."""
        return self.relation in ("same", "renamed", "aligned", "given")


def mean(values: Iterable[float | None]) -> float | None:
    """Of the numbers that were measured; None where none was."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def mean_of_lowest(values: Iterable[float | None], share: float = 0.2) -> float | None:
    """The mean of the lowest share of the numbers, at least of one (Revisit Model Adaptation, Fig. 2a)."""
    known = sorted(value for value in values if value is not None)
    return mean(known[: max(1, round(share * len(known)))])
