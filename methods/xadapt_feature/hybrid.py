"""Hybrid adaptation (Revisit Model Adaptation, Eq. 6): a part of the rank in feature space, the rest on the weight as in LoRA."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

from peft import LoraConfig
from torch import Tensor, nn

from xadapt.peft_internals import HostedLayer
from xadapt.update import Update, calculating_in, total

from .action import phi_of
from .base_layer import CONVOLUTIONS
from .config import FeatureConfig, rank_error
from .identity import ZeroLinear
from .layer import FeatureLayer
from .spaces import get_space
from .tuner import FeatureTuner


@dataclass
class HybridAdaConfig(FeatureConfig, LoraConfig):
    """y = W(x + s·B₁A₁x) + s·B₂A₂x + b, or y = Φ(Wx + b) + s·B₂A₂x (Revisit Model Adaptation, Eq. 6).

    `r` is the rank in total, `feature_r` of it acts in the feature space; both parts have the scaling of rank `r`.
    Takes every other option of `LoraConfig` except rank_pattern and alpha_pattern.

    Raises:
        ValueError: feature_r is not between 1 and r - 1 (the ends are InputAdaConfig, OutputAdaConfig, LoraConfig).
    """

    space: str = field(default="output", metadata={"help": "The feature space: 'input' or 'output'."})
    feature_r: int = field(default=1, metadata={"help": "How much of the rank r acts in the feature space."})

    type_name: ClassVar[str] = "HYBRID_ADA"
    ranks: ClassVar[tuple[str, ...]] = ("r",)
    low_rank: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        get_space(self.space)
        if not isinstance(self.feature_r, int) or isinstance(self.feature_r, bool) or self.feature_r < 1:
            raise rank_error("feature_r", self.feature_r)
        if self.feature_r >= self.r:
            raise ValueError(
                f"feature_r={self.feature_r} leaves nothing of r={self.r} to the weight. Choose feature_r < r, or use "
                f"{self.space.capitalize()}AdaConfig(r={self.r}) for all of it in the feature space."
            )
        for name in ("rank_pattern", "alpha_pattern", "use_dora", "lora_bias"):
            if getattr(self, name):
                raise ValueError(
                    f"HybridAdaConfig does not take {name}: it would not say which of its two parts is meant."
                )

    def part(self, rank: int) -> LoraConfig:
        """The config of one part: its own rank, the scaling of the whole."""
        part = copy.copy(self)
        part.r = rank
        share = rank / self.r
        part.lora_alpha = self.lora_alpha * (math.sqrt(share) if self.use_rslora else share)  # type: ignore[assignment]  # annotated int, but any number works
        return part


class HybridLayer(FeatureLayer):
    """A FeatureLayer with a second hosted LoRA, on a zero linear, whose output is added to the layer's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.parameter_space = nn.Module()  # its child has the name of the first part's, by which keys are recognised
        zero = ZeroLinear(self.in_features, self.out_features, beside=self.base_layer)
        self.parameter_space.add_module(self.phi_name, zero)

    @property
    def delta(self) -> HostedLayer:
        """PEFT's LoRA on the zero linear: the part of the adapter in parameter space."""
        return cast(HostedLayer, self.parameter_space._modules[self.phi_name])

    @property
    def hosts(self) -> tuple[HostedLayer, ...]:
        if "parameter_space" not in self._modules:
            return super().hosts
        return (self.hosted, self.delta)

    # The second part's state goes by the names of the first with `delta_` before them.

    @property
    def adapter_layer_names(self) -> tuple[str, ...]:  # type: ignore[override]  # a plain attribute in PEFT
        names = self.hosted.adapter_layer_names
        return (*names, *(f"delta_{name}" for name in names))

    @property
    def other_param_names(self) -> tuple[str, ...]:  # type: ignore[override]  # likewise
        names = self.hosted.other_param_names
        return (*names, *(f"delta_{name}" for name in names))

    def _hosted_attribute(self, name: str) -> Any:
        if name.startswith("delta_"):
            return getattr(self.delta, name.removeprefix("delta_"))
        return super()._hosted_attribute(name)

    def set_scale(self, adapter: str, scale: float) -> None:
        for hosted in self.hosts:
            cast(Any, hosted).set_scale(adapter, scale)

    def scale_layer(self, scale: float) -> None:
        for hosted in self.hosts:
            cast(Any, hosted).scale_layer(scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        for hosted in self.hosts:
            cast(Any, hosted).unscale_layer(scale)

    def adapted(self, x: Tensor, base: Any, adapter_arguments: dict[str, Any]) -> Any:
        return super().adapted(x, base, adapter_arguments) + self.delta(x, **adapter_arguments)

    def folded(self, adapter_names: Sequence[str], weight: Tensor, bias: Tensor | None) -> Update:
        parameter = phi_of(self.delta, adapter_names, calculating_in(weight))
        return total([super().folded(adapter_names, weight, bias), Update(parameter.delta)])


class HybridTuner(FeatureTuner):
    """Hosts PEFT's LoRA twice per layer."""

    def _check_target(self, config: Any, path: str, module: nn.Module) -> None:
        super()._check_target(config, path, module)
        if isinstance(module, (nn.Embedding, *CONVOLUTIONS)):
            raise ValueError(
                f"{path}: HybridAdaConfig adapts linear layers, not {type(module).__name__}. Leave it out with "
                "exclude_modules, or use OutputAdaConfig."
            )

    def _host(self, config: Any, adapter_name: str, layer: FeatureLayer, path: str) -> None:
        assert isinstance(layer, HybridLayer)
        super()._host(config.part(config.feature_r), adapter_name, layer, path)
        part = config.part(config.r - config.feature_r)
        self._hosted_create(part, adapter_name, layer.delta, layer.phi_name, layer.parameter_space, current_key=path)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Not for hybrids.

        Raises:
            ValueError: always; activate both adapters instead.
        """
        raise ValueError(
            "add_weighted_adapter would combine only one of a hybrid adapter's two parts. "
            "Activate both adapters instead: model.base_model.set_adapter([...])."
        )
