"""No other tuner's layer around a FeatureLayer: PEFT's would merge into a weight that is not what they adapt.

PEFT has no such check of its own, and its tuners do not ask a target whether it may be wrapped. What they all do is make
the target the `base_layer` of a new layer, and PyTorch tells of every child module that is set. At that time the
FeatureLayer is still in its place. What cannot be caught: layers that the same tuner has wrapped before it came to this
one stay wrapped, and the name of the new adapter stays in the model's `peft_config`.
"""

from __future__ import annotations

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from xadapt.peft_internals import BaseTunerLayer

from .layer import FeatureLayer


def refuse_nesting() -> None:
    """From here on, a tuner that wraps a FeatureLayer gets a ValueError."""
    register_module_module_registration_hook(_check)


def _check(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    if name == "base_layer" and isinstance(child, FeatureLayer) and isinstance(parent, BaseTunerLayer):
        raise ValueError(
            f"A layer that carries an adapter in {child.space.name} space cannot be wrapped in another one "
            f"({type(parent).__module__}.{type(parent).__name__}): the two would not merge as they run. Merge or unload "
            "the first adapter, or leave its layers out with exclude_modules; HybridAdaConfig combines LoRA with "
            "adaptation in feature space."
        )
