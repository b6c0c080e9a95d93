"""What this package registers: one kind per adapter format, and the method that takes it to another base as it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from xadapt.contract import Adapter, Carried, Method, Siblings
from xadapt.kinds import peft_kind

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import Tensor

    from xadapt.counterparts import Side
    from xadapt.update import Fold

PAPER = "Revisit Model Adaptation from Parameters to Features"


@dataclass(frozen=True, kw_only=True)
class Reuse:
    """The adapter as it is: in feature space, the weights of the new base modulate it (§3.2 of the paper)."""

    def transfer(self, adapter: Adapter, bases: Siblings) -> Carried:
        """The same tensors, under the target's names. Opens no weight; layers whose adapted width differs are left out."""
        from xadapt.relocate import relocate

        return relocate(adapter, bases, _side(adapter.config))


def _side(config: Any) -> Side:
    """The width that the adapter's tensors depend on; a hybrid has a part of its rank on the weight, which has both."""
    return "both" if hasattr(config, "feature_r") else config.space


def _updates(config: PeftConfig, tensors: Mapping[str, Tensor]) -> Mapping[str, Fold] | None:
    from .detached import updates

    return updates(config, tensors)


@dataclass(frozen=True)
class _ConfigClass:
    """Imports a config class, and with it the registration with PEFT, when called."""

    name: str

    def __call__(self) -> type[PeftConfig]:
        config: type[PeftConfig] = getattr(import_module("xadapt_feature"), self.name)
        return config


def _method(name: str, config: str, summary: str) -> Method:
    kind = peft_kind(name, _ConfigClass(config), _updates)
    return Method(name=name, summary=summary, paper=PAPER, reads=(kind,), writes=kind, build=Reuse)


INPUT_ADA = _method("input_ada", "InputAdaConfig", "any PEFT method on a layer's input features, y = WΦ(x) + b")
OUTPUT_ADA = _method("output_ada", "OutputAdaConfig", "any PEFT method on a layer's output features, y = Φ(Wx + b)")
HYBRID_ADA = _method("hybrid_ada", "HybridAdaConfig", "LoRA with a part of its rank in feature space (Eq. 6)")
FULL_ADA = _method("full_ada", "FullAdaConfig", "a whole matrix on a layer's input or output features")
