"""What a reader of the result should know, and what its numbers do not say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xadapt.carried_along import saved_modules
from xadapt.contract import Adapter, Carried
from xadapt.errors import some
from xadapt.kinds import PeftKind
from xadapt.siblings import Pair


def notes_on(adapter: Adapter, carried: Carried, bases: Pair, belongs: Mapping[Any, int]) -> tuple[str, ...]:
    """In whole sentences. `belongs`: the adapter's fingerprint against the source; empty where it has none."""
    notes = []
    if bases.has_source and not belongs:
        named = getattr(adapter.config, "base_model_name_or_path", None)
        notes.append(
            f"The adapter records no fingerprint of its base, so whether that is {bases.source.name} was not tested"
            + (f"; its config names {named}." if named and named != bases.source.name else ".")
        )
    if isinstance(carried.adapter.kind, PeftKind) and (whole := sorted(saved_modules(carried.adapter))):
        notes.append(f"{some(whole)}: taken along whole, in the place of the target's own.")
    notes += [str(told["note"]) for told in carried.considered.values() if "note" in told]
    return tuple(notes)
