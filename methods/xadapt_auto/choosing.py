"""The policy: from scores to a choice. A pure function of numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Choice:
    """A method's name and why, or None and why not."""

    name: str | None
    why: str


def choose(scores: Mapping[str, float], *, lead: Mapping[str, float], bare: float, gain: float) -> Choice:
    """The candidate to take.

    Args:
        scores: of each candidate, 0 to 1.
        lead: by how much others must beat these candidates, below 0 by how much these must beat others.
        bare: the score of the target without any adapter.
        gain: what the best has to gain over that.
    """
    if not scores:
        return Choice(None, "No candidate could carry the adapter.")
    worth = [name for name, score in scores.items() if score - bare >= gain]
    if not worth:
        best = max(scores, key=lambda name: scores[name])
        return Choice(
            None,
            f"The best candidate, {best}, agrees with the adapter's work on its source by {scores[best]:.3f}, and the bare target by "
            f"{bare:.3f}: less than {gain} is gained.",
        )
    best = max(worth, key=lambda name: (scores[name] + lead.get(name, 0.0), lead.get(name, 0.0)))
    rivals = {name: score for name, score in scores.items() if name != best}
    if not rivals:
        return Choice(best, f"agreement {scores[best]:.3f}, bare {bare:.3f}")
    second = max(rivals, key=lambda name: rivals[name])
    return Choice(best, f"agreement {scores[best]:.3f}, next {second} {rivals[second]:.3f}, bare {bare:.3f}")
