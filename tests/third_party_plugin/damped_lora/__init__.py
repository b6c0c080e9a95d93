"""A method for the tests: the copy of a LoRA, weakened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from xadapt.contract import Adapter, Base, Kind, Method

if TYPE_CHECKING:  # listing methods must not import torch
    from peft import PeftConfig
    from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Damp:
    """Multiplies the update by `strength`."""

    strength: float = 0.5

    def transfer(self, adapter: Adapter, source: Base, target: Base) -> Adapter:
        tensors = {
            name: self.strength * tensor if ".lora_B." in name else tensor for name, tensor in adapter.tensors.items()
        }
        return replace(adapter, tensors=tensors)


def _config() -> type[PeftConfig]:
    from peft import LoraConfig

    return LoraConfig


def _attach(model: nn.Module, config: PeftConfig) -> None:
    from peft import inject_adapter_in_model

    inject_adapter_in_model(config, model)


def _tensors(model: nn.Module) -> Mapping[str, Tensor]:
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(model)


LORA = Kind(name="lora", config=_config, attach=_attach, tensors=_tensors)

METHOD = Method(
    name="damped_lora",
    summary="the copy of a LoRA, weakened",
    paper="none: this is a test",
    reads=(LORA,),
    writes=LORA,
    build=Damp,
)
