"""How far a carried adapter changes the target's behaviour as it changed the source's. Pure tensor functions, no labels.

Language models: rows are next-token log-probabilities. Denoisers: rows are predicted noises (or velocities), flattened.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Agreement:
    """What the comparison says."""

    direction: float
    """Cosine of the two changes, -1 to 1. Of log-probabilities, each token's change counts by the geometric mean of what the four
    models give it: tokens that none of them would say are noise."""

    strength: float
    """The change on the target beside that on the source, 1 for as strong: a ratio of KL divergences, or of norms."""

    score: float
    """0 to 1: how much of what the adapter made of the source it makes of the target. See `LogProbs` and `Predictions`."""

    rows: int


@dataclass
class LogProbs:
    """Sums over the rows of language models.

    With p what the adapted source says next, p₀ what the bare source, q₀ the bare target and q the adapted target, TV the total
    variation and w = TV(p₀, p), a row where the adapter changes all (w = 1) is to come out as p, and one where it changes nothing is
    to be left as it is. Missed is Σ c w TV(p, q), and harm done Σ c (1 − w) (TV(p, q) − TV(p, q₀)), as far as that is above 0: an
    end that is said too late spoils a line that was right so far. c, the largest of p, has rows count by how sure the adapted source
    is: where any token would do, disagreement says little. The score is 1 − (missed + harm) / Σ c w², not below 0: 0 for the bare
    source, 1 for q = p. benchmarks/zoo chose it among others.
    """

    rows: int = 0
    dot: float = 0.0
    source_norm: float = 0.0
    target_norm: float = 0.0
    source_kl: float = 0.0
    target_kl: float = 0.0
    to_change: float = 0.0
    missed: float = 0.0
    harm: float = 0.0

    def add(self, source: Tensor, adapted: Tensor, target: Tensor, carried: Tensor) -> None:
        """Log-probabilities (rows, vocabulary) of the bare and the adapted source, the bare and the adapted target.

        Raises:
            ValueError: the shapes differ, or there is NaN.
        """
        source, adapted, target, carried = _checked(source, adapted, target, carried)
        here, there = adapted - source, carried - target
        weight = ((source + adapted + target + carried) / 4).exp()
        self.rows += source.shape[0]
        self.dot += float((weight * here * there).sum())
        self.source_norm += float((weight * here.square()).sum())
        self.target_norm += float((weight * there.square()).sum())
        self.source_kl += float((adapted.exp() * here).sum())
        self.target_kl += float((carried.exp() * there).sum())
        changed, apart, sure = _variation(source, adapted), _variation(adapted, carried), adapted.amax(-1).exp()
        self.to_change += float((sure * changed.square()).sum())
        self.missed += float((sure * changed * apart).sum())
        self.harm += float((sure * (1 - changed) * (apart - _variation(adapted, target)).clamp(min=0)).sum())

    def result(self) -> Agreement:
        """ValueError where the adapter changes nothing on the source: there is nothing to compare with."""
        # A divergence that is not above 0 is that of rounding: there is no change to speak of.
        _check_change(self.rows, min(self.source_norm, self.source_kl, self.to_change))
        direction = self.dot / (self.source_norm * self.target_norm) ** 0.5 if self.target_norm > 0 else 0.0
        score = max(0.0, 1 - (self.missed + self.harm) / self.to_change)
        return Agreement(direction, max(0.0, self.target_kl) / self.source_kl, score, self.rows)


@dataclass
class Predictions:
    """Sums over the predictions of denoisers.

    With Δ what the adapter changes on the source and Δ′ what it changes on the target, the score is ⟨Δ, Δ′⟩ / (‖Δ‖ max(‖Δ‖, ‖Δ′‖)),
    not below 0: the cosine, times the strength where that is below 1. A stronger change costs nothing, as siblings with guidance
    built in answer with a multiple of it, which 1 − ‖Δ′ − Δ‖ / ‖Δ‖ would take for a failure.
    """

    rows: int = 0
    dot: float = 0.0
    source_norm: float = 0.0
    target_norm: float = 0.0

    def add(self, source: Tensor, adapted: Tensor, target: Tensor, carried: Tensor) -> None:
        """Predictions (rows, numbers), as `LogProbs.add`."""
        source, adapted, target, carried = _checked(source, adapted, target, carried)
        here, there = adapted - source, carried - target
        self.rows += source.shape[0]
        self.dot += float((here * there).sum())
        self.source_norm += float(here.square().sum())
        self.target_norm += float(there.square().sum())

    def result(self) -> Agreement:
        """As `LogProbs.result`."""
        _check_change(self.rows, self.source_norm)
        if not self.target_norm > 0:
            return Agreement(0.0, 0.0, 0.0, self.rows)
        direction = self.dot / (self.source_norm * self.target_norm) ** 0.5
        strength = (self.target_norm / self.source_norm) ** 0.5
        return Agreement(direction, strength, max(0.0, direction) * min(1.0, strength), self.rows)


@dataclass
class Retention:
    """How much of what the target could do is left, on inputs that are not the adapter's business: 1 − TV(p, p′) per row for language
    models, 1 − ‖e′ − e‖ / ‖e‖ for denoisers, not below 0."""

    probabilities: bool
    rows: int = 0
    kept: float = 0.0
    own: float = field(default=0.0)
    moved: float = field(default=0.0)

    def add(self, target: Tensor, carried: Tensor) -> None:
        """The bare and the adapted target's rows, as `LogProbs` or `Predictions` take them."""
        target, carried = _checked(target, carried)
        self.rows += target.shape[0]
        if self.probabilities:
            self.kept += float((1 - _variation(target, carried)).sum())
        else:
            self.own += float(target.square().sum())
            self.moved += float((carried - target).square().sum())

    def result(self) -> float:
        if not self.rows:
            raise ValueError(
                "The neutral data is empty, or its labels are -100 throughout: pass some text or images that have nothing to do with the adapter."
            )
        if self.probabilities:
            return self.kept / self.rows
        return max(0.0, 1 - (self.moved / self.own) ** 0.5) if self.own > 0 else 0.0


def log_probabilities(logits: Tensor) -> Tensor:
    """Log-softmax of logits (rows, vocabulary), in float32."""
    return torch.log_softmax(logits.float(), dim=-1)


Sums = LogProbs | Predictions
NewSums = Callable[[], Sums]


def _variation(one: Tensor, other: Tensor) -> Tensor:
    """Total variation of two rows of log-probabilities, (rows,)."""
    return (one.exp() - other.exp()).abs().sum(-1) / 2


def _checked(*rows: Tensor) -> tuple[Tensor, ...]:
    shapes = {tuple(one.shape) for one in rows}
    if len(shapes) > 1:
        raise ValueError(
            f"The models' outputs have different shapes, {' and '.join(map(str, sorted(shapes)))}: behaviours can be compared only where "
            "both models have one vocabulary, or one latent space."
        )
    if not all(bool(torch.isfinite(one).all()) for one in rows):
        raise ValueError("A model's output holds NaN or infinity; try float32, or look at the adapter's scale.")
    return tuple(one.to(rows[0]).float() for one in rows)


def _check_change(rows: int, norm: float) -> None:
    if not rows:
        raise ValueError(
            "The data is empty, or its labels are -100 throughout: there is nothing to compare behaviours on."
        )
    if not norm > 0:
        raise ValueError(
            "On this data the adapter changes nothing on its own source; pass data of the kind that it was trained for."
        )
