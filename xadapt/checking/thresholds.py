"""The numbers at which check's verdicts change. All of them, and only here."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """Distances are relative: 0 is the same, and two unrelated sets of features of one size are √2 apart."""

    same: float = 1e-3
    """A weight drift up to this is rounding: the two layers are one."""

    clearly: float = 3.0
    """One side of a layer must have moved this many times as far as the other for its basis to have changed."""

    rounding: float = 0.1
    """A distance below this counts as this where the two sides are compared."""

    unrelated: float = 1.0
    """Where both sides moved at least this far, neither basis is the source's any more."""

    unrelated_cosine: float = 0.2
    """The same without data: weights whose cosine is lower have nothing in common as they stand."""

    drifted: float = 0.3
    """A weight drift from this on is more than an ordinary one: what is carried is doubtful."""

    strong: float = 1.5
    """An adapter whose update, for its layer's weight, grows or shrinks by more than this factor on the target is out of scale."""

    merged: float = 0.5
    """A cosine of drift and update from this on, and this share of the update in the drift, mean that the target has it already."""

    refused: float = 0.5
    """The share of the adapter's layers without a way to carry them from which on the whole is refused."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
                raise ValueError(
                    f"{field.name}={value!r}: a threshold is a number from 0 on, for example {field.default!r}."
                )
