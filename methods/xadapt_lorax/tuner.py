"""The tuner of `LoraXConfig`, as PEFT's are. Importing this module is what makes PEFT know the format."""

from __future__ import annotations

import warnings
from typing import Any, cast

import torch
from aenum import extend_enum
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from xadapt.finite import is_finite
from xadapt.peft_internals import (
    BaseTuner,
    BaseTunerLayer,
    PeftType,
    check_adapters_to_merge,
    register_peft_method,
)
from xadapt.update import to_stored

from .config import LoraXConfig
from .directions import leading, product


class LoraXLayer(BaseTunerLayer):
    """Marks the layers of this method; `LoraXLinear` is the only one."""


class LoraXLinear(nn.Module, LoraXLayer):
    """y = base(x) + Σ Uᵢ Mᵢ Vᵢᵀ x over the active adapters."""

    adapter_layer_names: tuple[str, ...] = ("lorax_core",)
    other_param_names: tuple[str, ...] = ()

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraXConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lorax_core = nn.ParameterDict()
        self._active_adapter: str | list[str] = adapter_name
        self.merged_adapters: list[str] = []
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: LoraXConfig) -> None:
        """Adds an adapter. ValueError while others are merged: the singular vectors would be those of the changed weight."""
        if self.merged:
            raise ValueError(
                "Adapters are merged into this layer; unmerge them before another LoRA-X adapter is added."
            )
        base: Any = self.get_base_layer()
        u, v = leading(to_stored(base, base.weight.detach()), config.r)
        # Not among the saved tensors: each base has its own.
        self.register_buffer(f"_u_{adapter_name}", u, persistent=False)
        self.register_buffer(f"_v_{adapter_name}", v, persistent=False)
        shape = (config.r,) if config.form == "diagonal" else (config.r, config.r)
        self.lorax_core[adapter_name] = nn.Parameter(torch.zeros(shape))
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """U M (out, r) and Vᵀ (r, in)"""
        core = self.lorax_core[adapter_name]
        u, v = getattr(self, f"_u_{adapter_name}"), getattr(self, f"_v_{adapter_name}")
        return product(u.to(core), core, v.to(core))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        result = cast(Tensor, self.base_layer(x, *args, **kwargs))
        if self.disable_adapters or self.merged:
            return result
        dtype = result.dtype
        for name in self.active_adapters:
            if name in self.lorax_core:
                left, right = self.factors(name)
                given = self._cast_input_dtype(x, right.dtype)
                result = result + nn.functional.linear(nn.functional.linear(given, right), left)
        return result.to(dtype)

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """ΔW in the layout that the base layer stores."""
        left, right = self.factors(adapter_name)
        return to_stored(self.get_base_layer(), left @ right)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds the adapters to the base weight. ValueError, with the weight as it was, if that is not finite."""
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.lorax_core:
                continue
            weight = cast(Tensor, self.get_base_layer().weight)
            delta = self.get_delta_weight(name)
            if not is_finite(delta) or (safe_merge and not is_finite(weight + delta)):
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
            weight.data += delta.to(weight)
            self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Subtracts again what merging has added."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        while self.merged_adapters:
            weight = cast(Tensor, self.get_base_layer().weight)
            weight.data -= self.get_delta_weight(self.merged_adapters.pop()).to(weight)

    def __repr__(self) -> str:
        return "lorax." + super().__repr__()


class LoraXModel(BaseTuner):
    """Puts a LoraXLinear on each target."""

    prefix = "lorax_"
    tuner_layer_cls = LoraXLayer
    target_module_mapping = cast("dict[str, list[str]]", TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        try:
            if isinstance(target, LoraXLinear):
                target.update_layer(adapter_name, peft_config)
                return
            _check(target)
            new = LoraXLinear(target, adapter_name, peft_config)
        except ValueError as error:
            raise ValueError(f"{current_key}: {error}") from None
        if adapter_name not in self.active_adapters:
            new.requires_grad_(False)
        self._replace_module(parent, target_name, new, target)


def _check(target: nn.Module) -> None:
    """ValueError for what is no plain linear."""
    weight = getattr(target, "weight", None)
    plain = isinstance(target, (nn.Linear, Conv1D)) and isinstance(weight, Tensor) and weight.is_floating_point()
    if not plain or isinstance(target, BaseTunerLayer):
        raise ValueError(
            f"LoRA-X is for linears with a weight in floating point, and this is {type(target).__name__}. Leave it out with "
            "exclude_modules, or take InputAdaConfig or OutputAdaConfig."
        )


extend_enum(PeftType, "LORAX", "LORAX")
register_peft_method(name="lorax", config_cls=LoraXConfig, model_cls=LoraXModel, prefix=LoraXModel.prefix)
