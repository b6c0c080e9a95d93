"""Everything xadapt takes from inside PEFT, in one place, with the reason for each name.

PEFT documents none of these as public. `tests/test_peft_internals.py` runs at both ends of the declared range, so that
a release that moves one of them fails there and not in a user's training run.
"""

from typing import TYPE_CHECKING

from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,  # which config class a PEFT type has: the methods to host
    PEFT_TYPE_TO_PREFIX_MAPPING,  # how its tensors' names begin behind a layer's path
    PEFT_TYPE_TO_TUNER_MAPPING,  # which tuner class it has: what ours are put before
)
from peft.tuners.lora.layer import Linear as LoraLinear  # the hosted layer that the fused forward knows
from peft.tuners.tuners_utils import (
    BaseTuner,  # base class of every tuner, ours included
    BaseTunerLayer,  # what PEFT, transformers and diffusers take for an adapter layer
    check_adapters_to_merge,  # PEFT's warnings about what is merged already
    check_target_module_exists,  # the one rule for target_modules, exclude_modules and layers_to_transform
    onload_layer,  # brings back what accelerate has offloaded of a layer
)
from peft.tuners.tuners_utils import (
    _check_lora_target_modules_mamba as check_mamba,  # the layers of Mamba whose weight is read without a call
)
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers as include_all_linear  # "all-linear"
from peft.utils.error import NoMatchingPeftModuleError  # no layer matched: we add which there are
from peft.utils.hotswap import CONFIG_KEYS_TO_CHECK as HOTSWAPPABLE  # what has to agree, by PEFT type
from peft.utils.other import get_pattern_key  # the one rule for rank_pattern
from peft.utils.peft_types import (
    PeftType,  # the enum that a new format has to join
    register_peft_method,  # makes a format known
)
from peft.utils.quantization_utils import (
    QuantizationBackend,  # reads and writes the weight of a quantised layer
    get_quantization_kwargs,  # what a backend needs to know from the model
    resolve_quantization_backend,  # PEFT's recognition of quantised layers
)
from peft.utils.save_and_load import (
    _validate_lora_adapter_state_dict as warn_of_shards,  # LoRA's warning when a sharded model is saved as it is
)

if TYPE_CHECKING:
    from torch import nn

    class HostedLayer(nn.Module, BaseTunerLayer):
        """One of PEFT's adapter layers: a module and a BaseTunerLayer. PEFT has no common class for the two."""

        base_layer: nn.Linear
        _active_adapter: str | list[str]
        _disable_adapters: bool

else:
    HostedLayer = BaseTunerLayer

__all__ = [
    "HOTSWAPPABLE",
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "PEFT_TYPE_TO_PREFIX_MAPPING",
    "PEFT_TYPE_TO_TUNER_MAPPING",
    "BaseTuner",
    "BaseTunerLayer",
    "HostedLayer",
    "LoraLinear",
    "NoMatchingPeftModuleError",
    "PeftType",
    "QuantizationBackend",
    "check_adapters_to_merge",
    "check_mamba",
    "check_target_module_exists",
    "get_pattern_key",
    "get_quantization_kwargs",
    "include_all_linear",
    "onload_layer",
    "register_peft_method",
    "resolve_quantization_backend",
    "warn_of_shards",
]
