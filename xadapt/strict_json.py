"""JSON that every reader takes alike: files that must be one object in which no key stands twice, and numbers that JSON has."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: the file cannot be read, is not JSON, is no object, or gives a key twice.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error}).") from error
    return parse_object(text, str(path))


def parse_object(text: bytes, source: str) -> dict[str, Any]:
    """The same for bytes already read; `source` is what messages call them."""
    try:
        parsed = json.loads(text.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except _DuplicateKey as error:
        raise ValueError(
            f"{source} gives the key {error.args[0]!r} twice; readers differ in which they take. Save it again."
        ) from error
    except (ValueError, RecursionError) as error:  # bad JSON, bytes that are no text, brackets nested by the thousand
        raise ValueError(f"{source} is not JSON ({error}); copy or save it again.") from error
    if not isinstance(parsed, dict):
        raise ValueError(f"{source} holds a JSON {type(parsed).__name__}, not an object; copy or save it again.")
    return parsed


def as_json(value: Any, **options: Any) -> str:
    """JSON text. NaN and infinity, for which JSON has no words, become null; what it does not know becomes its str()."""
    return json.dumps(finite(value), default=str, allow_nan=False, **options)


def finite(value: Any) -> Any:
    """The same mappings and lists, with None for floats that are not finite."""
    if isinstance(value, Mapping):
        return {name: finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class _DuplicateKey(Exception):
    pass


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _DuplicateKey(key)
        found[key] = value
    return found
