"""What this package registers: one kind per adapter format, and the method that takes it to another base as it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from typing import TYPE_CHECKING

from xadapt.contract import Adapter, Base, Kind, Method

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import Tensor, nn

PAPER = "Revisit Model Adaptation from Parameters to Features (paper 002)"


@dataclass(frozen=True, kw_only=True)
class Reuse:
    """The adapter as it is: in feature space, the weights of the new base modulate it (paper 002, §3.2)."""

    def transfer(self, adapter: Adapter, source: Base, target: Base) -> Adapter:
        """The same tensors for `target`. Opens neither base."""
        return replace(adapter, tensors=dict(adapter.tensors))


def _attach(model: nn.Module, config: PeftConfig) -> None:
    from peft import inject_adapter_in_model

    inject_adapter_in_model(config, model)


def _tensors(model: nn.Module) -> Mapping[str, Tensor]:
    from peft import get_peft_model_state_dict

    tensors: dict[str, Tensor] = get_peft_model_state_dict(model)
    return tensors


@dataclass(frozen=True)
class _ConfigClass:
    """Imports a config class, and with it the registration with PEFT, when called."""

    name: str

    def __call__(self) -> type[PeftConfig]:
        config: type[PeftConfig] = getattr(import_module("xadapt_feature"), self.name)
        return config


def _method(name: str, config: str, summary: str) -> Method:
    kind = Kind(name=name, config=_ConfigClass(config), attach=_attach, tensors=_tensors)
    return Method(name=name, summary=summary, paper=PAPER, reads=(kind,), writes=kind, build=Reuse)


INPUT_ADA = _method("input_ada", "InputAdaConfig", "any PEFT method on a layer's input features, y = WΦ(x) + b")
OUTPUT_ADA = _method("output_ada", "OutputAdaConfig", "any PEFT method on a layer's output features, y = Φ(Wx + b)")
HYBRID_ADA = _method("hybrid_ada", "HybridAdaConfig", "LoRA with a part of its rank in feature space (Eq. 6)")
FULL_ADA = _method("full_ada", "FullAdaConfig", "a whole matrix on a layer's input or output features")
