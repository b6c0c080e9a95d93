"""Where an adapter comes from, told when it is loaded onto another base."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from torch import nn

from xadapt.fingerprint import compare
from xadapt.peft_internals import BaseTunerLayer

_log = logging.getLogger("xadapt")
_told: set[tuple[str, str]] = set()


def tell_of_the_base(model: nn.Module, folder: Path) -> None:
    """Says, once, that this is another base than the one the adapter was trained on. That is what adapters in feature space
    are for, and also what a mistaken path looks like."""
    config: Any = PeftConfig.from_pretrained(str(folder))
    recorded = getattr(config, "base_fingerprint", None) or {}
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    weights = {}
    for path, module in base.named_modules():
        if path in recorded:
            layer: Any = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
            weights[f"{path}.weight"] = layer.weight
    others = [path for path, match in compare(recorded, weights).items() if match in ("differs", "other shape")]
    told = (str(folder.resolve()), str(getattr(base, "name_or_path", "")))
    if others and told not in _told:
        _told.add(told)
        trained_on = config.base_model_name_or_path or "another base"
        _log.warning(
            "The adapter in %s was trained on %s; %d of its %d layers have other weights here, which modulate it from now on.",
            folder,
            trained_on,
            len(others),
            len(recorded),
        )
