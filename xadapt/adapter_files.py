"""An adapter of any kind from wherever it lies: what PEFT knows, LoRA files, and plug-ins' own formats."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from xadapt.contract import Adapter
from xadapt.sources import adapters_from, file_kind_of, is_path, listed


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


def check_apart(source: Any, out: str | PathLike[str]) -> None:
    """ValueError if one of the adapters lies where something is to be written: what was trained would be replaced by what is made of it."""
    place = Path(out).resolve()
    for one in listed(source):
        given = one.name if isinstance(one, Opened) else one
        if not is_path(given) or not Path(given).exists():
            continue
        read = Path(given).resolve()
        if place == read or place in read.parents:
            raise ValueError(
                f"{out} is where the adapter itself lies, which would be lost. Choose another place to write."
            )


def name_of(source: Any) -> str:
    """What reports call an adapter."""
    if isinstance(source, Opened):
        return source.name
    if isinstance(source, Adapter):
        return f"an adapter of kind {source.kind.name}"
    return str(source) if is_path(source) else f"a live {type(source).__name__}"
