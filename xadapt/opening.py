"""Open a base for an adapter: `component` may choose in the adapter's file, in the base's pipeline, or in both."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xadapt.base import CheckpointBase, LiveBase, open_base
from xadapt.sources import is_path
from xadapt.strict_json import read_object

INDEX = "model_index.json"


def open_for(
    base: Any, component: str | None = None, allow_pickle: bool = False, variant: str | None = None
) -> CheckpointBase | LiveBase:
    """`open_base` with the component only where the base has components: a pipeline, or an id of the Hub. What is open already, as one
    of several bases may be, has neither component nor variant to choose."""
    if not is_path(base):
        return open_base(base)
    alone = Path(base).is_dir() and not (Path(base) / INDEX).is_file()
    return open_base(base, component=None if alone else component, allow_pickle=allow_pickle, variant=variant)


def pipeline_of(base: CheckpointBase | LiveBase) -> Mapping[str, Any] | None:
    """The index of the pipeline that a base's folder is a component of; None where it stands alone or is in memory."""
    if not isinstance(base, CheckpointBase):
        return None
    path = base.folder.parent / INDEX
    index = read_object(path) if path.is_file() else {}
    return index if base.folder.name in index else None
