"""Open a base for an adapter: `component` may choose in the adapter's file, in the base's pipeline, or in both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from xadapt.adapter_files import Opened
from xadapt.base import CheckpointBase, LiveBase, open_base
from xadapt.contract import Adapter
from xadapt.layouts.opening import DIFFUSERS_NAME
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


def check_choices(component: str | None, variant: str | None, adapters: Sequence[Any], bases: Sequence[Any]) -> None:
    """Refuses a component or variant that nothing given has a choice of. What was opened before may have had one.

    Args:
        adapters, bases: as the user gave them; None for one that was not given.
    """
    given = [*adapters, *bases]
    if component is not None and not any(_has_components(one) or _is_called(one, component) for one in given):
        raise ValueError(
            f"component={component!r} chooses in a pipeline's folder, a model of the Hub or a LoRA file, and none of these was given; "
            "leave component out."
        )
    if variant is not None and not any(is_path(base) or isinstance(base, CheckpointBase) for base in bases):
        raise ValueError(
            f"variant={variant!r} chooses among a base's files, and no base was given by folder or id; leave variant out."
        )


def _is_called(given: Any, component: str) -> bool:
    """Whether it is the folder of that component, taken by itself: naming it then is no mistake."""
    return is_path(given) and Path(given).name == component


def _has_components(given: Any) -> bool:
    if not is_path(given):
        return isinstance(given, CheckpointBase | Opened | Adapter)
    path = Path(given)
    if not path.is_dir():
        return True  # a LoRA file, or an id of the Hub; what neither is, is told when it is opened
    return (path / INDEX).is_file() or (
        (path / DIFFUSERS_NAME).is_file() and not (path / "adapter_config.json").is_file()
    )


def pipeline_of(base: CheckpointBase | LiveBase) -> Mapping[str, Any] | None:
    """The index of the pipeline that a base's folder is a component of; None where it stands alone or is in memory."""
    if not isinstance(base, CheckpointBase):
        return None
    path = base.folder.parent / INDEX
    index = read_object(path) if path.is_file() else {}
    return index if base.folder.name in index else None
