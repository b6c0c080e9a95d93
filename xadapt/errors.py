"""Turns of phrase that error messages share."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches


def did_you_mean(given: str, known: Sequence[str], limit: int | None = None) -> str:
    """What follows "unknown name": the nearest known one if there is one, and all of them, or the first `limit`."""
    lowered = {name.lower(): name for name in known}
    near = [lowered[match] for match in get_close_matches(given.lower(), lowered, n=1)]
    suggestion = f"Did you mean {near[0]!r}? " if near else ""
    return f"{suggestion}Known: {some(known, limit or len(known)) or 'none'}."


def some(items: Sequence[str], limit: int = 5, separator: str = ", ") -> str:
    """The first few of a list that may be long: "a, b, c and 40 more"."""
    more = f"{separator}and {len(items) - limit} more" if len(items) > limit else ""
    return separator.join(items[:limit]) + more
