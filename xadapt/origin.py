"""Whether an adapter was trained on a base, by the fingerprint in its config; and a base's fingerprint to write there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from xadapt.contract import Adapter, Base
from xadapt.fingerprint import Match, compare, layer_print
from xadapt.layouts.names import in_base

PROVENANCE = "xadapt_transfer"
"""The key of a transfer's record in an adapter_config.json: within `auto_mapping`, which every PEFT config has, stock ones too."""


def recorded_fingerprint(adapter: Adapter) -> Mapping[str, str]:
    """Layer path → fingerprint of the base that the adapter is for; empty where none is recorded."""
    own = getattr(adapter.config, "base_fingerprint", None)
    if own:
        return dict(own)
    record = (getattr(adapter.config, "auto_mapping", None) or {}).get(PROVENANCE)
    return dict(record.get("target_fingerprint") or {}) if isinstance(record, dict) else {}


def match_base(adapter: Adapter, base: Base) -> dict[Match, int]:
    """How many of the recorded layers are the same in this base, differ, have another shape, or cannot be told.

    Reads about a thousand numbers of each. Empty where nothing is recorded.
    """
    modules = base.modules()
    recorded = {in_base(path, modules) or path: text for path, text in recorded_fingerprint(adapter).items()}
    return dict(Counter(compare(recorded, base.weights()).values()))


def fingerprint_of(base: Base, paths: Iterable[str]) -> dict[str, str]:
    """The fingerprint of these layers, as text by path. Layers without a weight of their own are left out."""
    weights: Any = base.weights()
    return {path: layer_print(weights[f"{path}.weight"]).as_text() for path in paths if f"{path}.weight" in weights}
