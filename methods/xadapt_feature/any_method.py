"""`feature_space(config, space)`: any PEFT config, in its input or output form."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

from peft import PeftConfig

from .config import FeatureConfig
from .refusals import PEFT_TYPES
from .register import CONFIGS
from .spaces import get_space


def feature_space(config: PeftConfig, space: str, **options: Any) -> PeftConfig:
    """The same PEFT method with the same options, acting on the input or output features (Revisit Model Adaptation, Eq. 4).

    Args:
        config: the config of a PEFT method, e.g. `LoHaConfig(r=8, target_modules=["q_proj"])`. It is not changed.
        space: "input" or "output".
        options: options of the feature space itself (`tie` in input space), or changes to the config.

    Example:
        >>> model = get_peft_model(model, feature_space(LoHaConfig(r=8, target_modules=["q_proj"]), "input"))

    Raises:
        TypeError: `config` is no PeftConfig.
        ValueError: the method has no such form; the message says why.
    """
    get_space(space)
    if not isinstance(config, PeftConfig):
        raise TypeError(f"feature_space takes a PEFT config such as LoraConfig(...), got {type(config).__name__}.")
    if isinstance(config, FeatureConfig):
        raise ValueError(f"{type(config).__name__} acts in feature space already.")
    method = str(getattr(config.peft_type, "value", config.peft_type))
    if (space, method) not in CONFIGS:
        supported = ", ".join(sorted(name for side, name in CONFIGS if side == space))
        reason = PEFT_TYPES.get(method, "it is not known to this version of xadapt")
        raise ValueError(f"{method} has no form in {space} space: {reason}. These have one: {supported}.")
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.init and f.name != "peft_type"}
    return cast(PeftConfig, CONFIGS[space, method](**{**values, **options}))
