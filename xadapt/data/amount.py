"""How much data is read."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Amount:
    """The first of the data, in its own order: the same in every run."""

    samples: int = 64
    """Lines, messages, images or rows."""

    max_tokens: int = 256
    """Of each text; what is beyond is cut off."""

    batch: int = 8
    """Samples in one forward."""

    seed: int = 0
    """Of noise and random conditioning, for denoisers."""

    def chosen(self, *names: str) -> list[str]:
        """Which of these are others than by default."""
        return [name for name in names if getattr(self, name) != getattr(Amount, name)]

    def __post_init__(self) -> None:
        for name in ("samples", "max_tokens", "batch"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}: a positive integer, for example {name}={getattr(Amount, name)}.")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ValueError(f"seed={self.seed!r}: an integer, for example seed=0.")
