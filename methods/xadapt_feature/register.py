"""Registers every format with PEFT: a config class and a tuner class for each space of each hosted PEFT method.

Importing this module is what makes `get_peft_model`, `PeftModel.from_pretrained` and transformers' `load_adapter` know
the formats. `xadapt.load` and every config do so by themselves.
"""

from __future__ import annotations

import dataclasses
from typing import Any, cast

from aenum import extend_enum
from peft import PeftConfig

from xadapt.peft_internals import (
    HOTSWAPPABLE,
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
    BaseTuner,
    LoraLinear,
    PeftType,
    register_peft_method,
)

from .config import FeatureConfig, InputAdaConfig, InputConfig, OutputAdaConfig, OutputConfig
from .full import FullAdaConfig, FullModel
from .hosts import HOSTS, RANKS
from .hybrid import HybridAdaConfig, HybridLayer, HybridTuner
from .layer import FeatureLayer
from .nesting import refuse_nesting
from .tie import TiedLayer
from .tuner import FeatureTuner, poses_as, refuse_mixed_batches

# The config class of each hosted PEFT method in each space: (space, PEFT type of the method) -> class.
CONFIGS: dict[tuple[str, str], type[FeatureConfig]] = {}


def _publish(cls: type) -> None:
    """Generated classes are attributes of this module, so that they can be pickled."""
    cls.__module__ = __name__
    cls.__qualname__ = cls.__name__
    globals()[cls.__name__] = cls


def _register(
    config_cls: type[FeatureConfig],
    hosted_tuner: type[BaseTuner],
    phi_name: str,
    tuner: type[FeatureTuner] = FeatureTuner,
    layer: type[FeatureLayer] = FeatureLayer,
) -> None:
    """Make PEFT know `config_cls`, with a tuner that puts `tuner` before the one of the hosted method."""
    name = config_cls.type_name
    # How the adapter's keys go on behind the layer's path. transformers inserts the adapter's name behind the one
    # component that this ends in: q_proj.input_ada_phi.lora_A.<adapter>.weight.
    prefix = f"{phi_name}.{hosted_tuner.prefix}"
    layer_cls = poses_as(hosted_tuner.tuner_layer_cls, config_cls.__name__.replace("Config", "Linear"), layer)
    tied_cls = type("Tied" + layer_cls.__name__, (TiedLayer, layer_cls), {})
    members: dict[str, Any] = {
        "prefix": prefix,
        "phi_name": phi_name,
        "tuner_layer_cls": layer_cls,
        "layer_cls": layer_cls,
        "tied_cls": tied_cls,
    }
    if not hasattr(hosted_tuner, "_enable_peft_forward_hooks"):
        members["_enable_peft_forward_hooks"] = refuse_mixed_batches
    tuner_cls = type(config_cls.__name__.replace("Config", "Model"), (tuner, hosted_tuner), members)
    _publish(layer_cls)
    _publish(tied_cls)
    _publish(tuner_cls)
    extend_enum(PeftType, name, name)
    register_peft_method(name=name.lower(), config_cls=config_cls, model_cls=tuner_cls, prefix=prefix)


def _hosted_config(space: type[FeatureConfig], peft_type: str, hosted: type[PeftConfig]) -> type[FeatureConfig]:
    """The config of a PEFT method in a space, e.g. InputLoHaConfig from LoHaConfig."""
    side = cast(Any, space).space
    takes = {field.name for field in dataclasses.fields(cast(Any, hosted))}
    made = type(
        side.capitalize() + hosted.__name__,
        (space, hosted),
        {
            "__annotations__": {},
            "__doc__": f"{hosted.__name__} in {side} space: each of its options keeps its name and meaning.",
            "type_name": f"{side.upper()}_ADA_{peft_type}",
            "ranks": RANKS.get(peft_type, ("r",) if "r" in takes else ()),
        },
    )
    _publish(made)
    return cast("type[FeatureConfig]", dataclasses.dataclass(made))


def _make_hotswappable(config_cls: type[FeatureConfig]) -> None:
    """Let PEFT swap one adapter for another in place; it does so for LoRA's linear, which hosts this one."""
    peft_type = PeftType(config_cls.type_name)
    HOTSWAPPABLE[peft_type] = HOTSWAPPABLE[PeftType.LORA]
    LoraLinear.register(cast(Any, PEFT_TYPE_TO_TUNER_MAPPING[peft_type]).layer_cls)


def _register_all() -> None:
    tuner_of = PEFT_TYPE_TO_TUNER_MAPPING
    for space, lora_config in ((InputConfig, InputAdaConfig), (OutputConfig, OutputAdaConfig)):
        side = cast(Any, space).space
        CONFIGS[side, "LORA"] = lora_config
        _register(lora_config, tuner_of[PeftType.LORA], f"{side}_ada_phi")
        _make_hotswappable(lora_config)
        for peft_type in HOSTS:
            hosted = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(peft_type)]
            CONFIGS[side, peft_type] = _hosted_config(space, peft_type, hosted)
            # It starts as the type does, by which transformers knows an adapter's keys, and holds no prefix of PEFT's:
            # AdaLoRA's rank allocator takes every parameter with "lora_" in its name for one of its own.
            phi_name = f"{side}_ada_{peft_type.lower()}"
            _register(CONFIGS[side, peft_type], tuner_of[PeftType(peft_type)], phi_name)
    _register(HybridAdaConfig, tuner_of[PeftType.LORA], "hybrid_ada_phi", HybridTuner, HybridLayer)
    _register(FullAdaConfig, FullModel, "full_ada_phi")


_register_all()
refuse_nesting()
