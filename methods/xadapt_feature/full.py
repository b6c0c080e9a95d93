"""Full adaptation: Φ = I + A with A a whole matrix, zero at the start (Revisit Model Adaptation, §3.3 "including full fine-tuning")."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from peft import PeftConfig
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn

from xadapt.peft_internals import BaseTuner, BaseTunerLayer

from .config import FeatureConfig
from .spaces import get_space


@dataclass
class FullAdaConfig(FeatureConfig, PeftConfig):
    """y = W(x + Ax) + b, or y = (I + A)(Wx + b): every feature may move every other.

    A is (d, d), d the layer's input or output width, and starts at zero. The same options as in `LoraConfig` choose
    the layers.
    """

    space: str = field(default="input", metadata={"help": "The feature space: 'input' or 'output'."})
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names of the layers to adapt, a regular expression, or 'all-linear'."}
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names of layers to leave out, or a regular expression."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the blocks to adapt; all by default."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list of blocks, if it is not one of the usual ones."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules to train whole and save beside the adapter."}
    )

    type_name: ClassVar[str] = "FULL_ADA"

    def __post_init__(self) -> None:
        super().__post_init__()
        get_space(self.space)
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern says where to count, layers_to_transform what: pass both.")


class FullLayer(BaseTunerLayer):
    """Marks the layers of this method; `FullLinear` is the only one."""


class FullLinear(nn.Module, FullLayer):
    """y = base(x) + Σ sᵢAᵢx over the active adapters, A (out, in); s is 1 until `set_scale` says otherwise."""

    adapter_layer_names: tuple[str, ...] = ("full_A",)
    other_param_names: tuple[str, ...] = ("scaling",)

    def __init__(self, base_layer: nn.Linear, adapter_name: str, inference_mode: bool) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.full_A = nn.ParameterDict()
        self.scaling: dict[str, float] = {}
        self._active_adapter: str | list[str] = adapter_name
        self.merged_adapters: list[str] = []
        self.update_layer(adapter_name, inference_mode)

    def update_layer(self, adapter_name: str, inference_mode: bool) -> None:
        base = self.base_layer
        self.full_A[adapter_name] = nn.Parameter(torch.zeros(base.out_features, base.in_features))
        self.scaling[adapter_name] = 1.0
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def forward(self, x: Tensor) -> Tensor:
        result = cast(Tensor, self.base_layer(x))
        if self.disable_adapters:
            return result
        dtype = result.dtype
        for name in self.active_adapters:
            if name in self.full_A:
                matrix = self.full_A[name]
                result = result + self.scaling[name] * nn.functional.linear(
                    self._cast_input_dtype(x, matrix.dtype), matrix
                )
        return result.to(dtype)

    # By these three, diffusers weighs adapters.

    def set_scale(self, adapter: str, scale: float) -> None:
        if adapter in self.scaling:
            self.scaling[adapter] = scale

    def scale_layer(self, scale: float) -> None:
        for name in self.active_adapters:
            self.set_scale(name, self.scaling.get(name, 1.0) * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        for name in self.active_adapters:
            self.set_scale(name, 1.0 if scale is None else self.scaling.get(name, 1.0) / scale)


class FullModel(BaseTuner):
    """The tuner of `FullAdaConfig`, as PEFT's are: it puts a FullLinear on a linear."""

    prefix = "full_"
    tuner_layer_cls = FullLayer
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
        if isinstance(target, FullLinear):
            target.update_layer(adapter_name, peft_config.inference_mode)
            return
        new = FullLinear(cast(nn.Linear, target), adapter_name, peft_config.inference_mode)
        if adapter_name not in self.active_adapters:
            new.requires_grad_(False)
        self._replace_module(parent, target_name, new, target)
