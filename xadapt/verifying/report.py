"""What verify returns: each way of having the adapter on the target, beside the bare target and the copy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from .behaviour import Agreement

CLOSE = 0.005
"""Scores nearer than this are not told apart."""


@dataclass(frozen=True, kw_only=True)
class Verified:
    """One row: a model with or without an adapter."""

    name: str  # "bare source", "adapted source", "bare", "copy", "transferred"
    agreement: Agreement | None = None
    """With what the adapter did on its source; None for the source itself, and for what could not be loaded."""

    retention: float | None = None
    """On neutral inputs, 0 to 1: how much of the bare target's behaviour is left."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    error: str | None = None
    """Why it could not be loaded."""

    images: tuple[str, ...] = ()
    """Data URIs of what the model draws, for pipelines."""


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """Whether the carried adapter does on the target what it did on its source."""

    adapter: str
    transferred: str
    source: str
    target: str
    data: str
    neutral: str | None
    rows: tuple[Verified, ...]
    prompts: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def score(self) -> float | None:
        """Of the transferred adapter, 0 to 1, without labels; None where it could not be loaded."""
        return self._score("transferred")

    @property
    def loses_to(self) -> tuple[str, ...]:
        """ "bare" or "copy", where they do better than what was transferred."""
        own = self.score
        if own is None:
            return ()
        return tuple(name for name in ("bare", "copy") if (self._score(name) or 0.0) > own + CLOSE)

    @property
    def refused(self) -> bool:
        """The transferred adapter cannot be loaded, or does less than the bare target or the copy."""
        return self.score is None or bool(self.loses_to)

    @property
    def verdict(self) -> str:
        """In a sentence."""
        row = self._row("transferred")
        if row.error is not None:
            return f"the transferred adapter cannot be loaded: {row.error}"
        assert row.agreement is not None
        said = f"score {row.agreement.score:.2f}, direction {row.agreement.direction:.2f}, strength {row.agreement.strength:.2f}"
        if self.loses_to:
            return f"worse than the {' and the '.join(_LONG[name] for name in self.loses_to)}: {said}"
        bare = self._score("bare")
        if bare is not None and row.agreement.score <= bare + CLOSE:
            return f"no better than the bare target: {said}"
        return said

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "adapter": self.adapter,
            "transferred": self.transferred,
            "source": self.source,
            "target": self.target,
            "data": self.data,
            "neutral": self.neutral,
            "score": self.score,
            "loses_to": list(self.loses_to),
            "refused": self.refused,
            "verdict": self.verdict,
            "rows": [asdict(row) for row in self.rows],
            "prompts": list(self.prompts),
            "notes": list(self.notes),
        }

    def _row(self, name: str) -> Verified:
        return next(row for row in self.rows if row.name == name)

    def _score(self, name: str) -> float | None:
        agreement = self._row(name).agreement
        return None if agreement is None else agreement.score


_LONG = {"bare": "bare target", "copy": "plain copy"}
