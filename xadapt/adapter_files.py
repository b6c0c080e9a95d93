"""An adapter of any kind from wherever it lies: what PEFT knows, LoRA files, and plug-ins' own formats."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xadapt.contract import Adapter
from xadapt.sources import adapters_from, file_kind_of, is_path


@dataclass(frozen=True)
class Opened:
    """An adapter that was read once for several uses, with the name it goes by in reports."""

    adapter: Adapter
    name: str


def open_adapter(source: Any, component: str | None = None, allow_pickle: bool = False) -> Adapter:
    """One adapter: a path, a PeftModel, or an adapter that is read already.

    Raises:
        ValueError: it cannot be read, or is several.
        TypeError: it is nothing that could be an adapter.
    """
    if isinstance(source, Opened):
        return source.adapter
    own = file_kind_of(source)
    if own is not None:
        return own.read(Path(source), allow_pickle)
    found = adapters_from(source, component, allow_pickle)
    if len(found) != 1:
        raise ValueError(
            f"{len(found)} adapters were given, and one at a time is carried; add them up first: xadapt export."
        )
    return found[0]


def name_of(source: Any) -> str:
    """What reports call an adapter."""
    if isinstance(source, Opened):
        return source.name
    if isinstance(source, Adapter):
        return f"an adapter of kind {source.kind.name}"
    return str(source) if is_path(source) else f"a live {type(source).__name__}"
