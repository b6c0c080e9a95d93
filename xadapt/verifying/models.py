"""Models with and without adapters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from peft import PeftModel

from xadapt.contract import Adapter, Base
from xadapt.kinds import PeftKind
from xadapt.wearing import wearing


@contextmanager
def adapted(base: Base, adapter: Adapter) -> Iterator[PeftModel]:
    """The live base with an adapter on it; afterwards it is as before.

    Raises:
        ValueError: the adapter does not fit this base, or is of a format that PEFT does not put on models.
    """
    if not isinstance(adapter.kind, PeftKind):
        raise ValueError(
            f"An adapter of kind {adapter.kind.name!r} is not put on a model by PEFT, so it cannot be run here: run its own model, "
            "and compare with --metric."
        )
    with wearing(base.module(), adapter) as model:
        yield model
