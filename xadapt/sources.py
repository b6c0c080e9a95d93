"""What users pass as "the adapter": a path, a live model, a detached adapter, or several of them."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any, TypeGuard, Union

from peft import PeftModel

from xadapt import registry
from xadapt.contract import Adapter
from xadapt.kinds import FileKind
from xadapt.reading import detach, read_adapter

AdapterSource = Union[str, "PathLike[str]", PeftModel, Adapter]


def adapters_from(
    source: AdapterSource | Sequence[AdapterSource], component: str | None = None, allow_pickle: bool = False
) -> list[Adapter]:
    """Every adapter that is meant, each read once.

    Raises:
        ValueError: one of them cannot be read, or there is none.
        TypeError: it is nothing that could be an adapter.
    """
    if isinstance(source, (list, tuple)):
        if not source:
            raise ValueError("An empty list of adapters: pass at least one.")
        return [one for item in source for one in adapters_from(item, component, allow_pickle)]
    if isinstance(source, Adapter):
        return [source]
    if isinstance(source, PeftModel):
        return [detach(source)]
    own = file_kind_of(source)
    if own is not None:
        raise ValueError(
            f"{source} is an adapter of kind {own.name!r}, which adds nothing to single weights: it is no LoRA, and cannot be made one. "
            f"{own.applied}"
        )
    if is_path(source):
        return [read_adapter(source, component=component, allow_pickle=allow_pickle)]
    raise TypeError(
        f"An adapter is a folder or file, a PeftModel, or what xadapt.read_adapter returns; got {type(source).__name__}."
    )


def file_kind_of(source: Any) -> FileKind | None:
    """The plug-in's format that a path is of; None for all that PEFT knows, and for what is no path."""
    if not is_path(source) or not Path(source).exists():
        return None
    kinds = (kind for kind in registry.kinds() if isinstance(kind, FileKind))
    return next((kind for kind in kinds if kind.recognises(Path(source))), None)


def listed(source: Any) -> list[Any]:
    """What is one adapter or several, as a list."""
    return list(source) if isinstance(source, list | tuple) else [source]


def is_path(source: object) -> TypeGuard[str | PathLike[str]]:
    """Whether a base or an adapter is given by where it lies."""
    return isinstance(source, (str, PathLike))
