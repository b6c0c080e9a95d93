"""A method for the tests: the copy of a LoRA, weakened."""

from __future__ import annotations

from dataclasses import dataclass, replace

from xadapt.contract import Adapter, Carried, Method, Siblings
from xadapt_weight import COPY


@dataclass(frozen=True, kw_only=True)
class Damp:
    """Multiplies the update by `strength`."""

    strength: float = 0.5

    def transfer(self, adapter: Adapter, bases: Siblings) -> Carried:
        tensors = {
            name: self.strength * tensor if ".lora_B." in name else tensor for name, tensor in adapter.tensors.items()
        }
        return Carried(adapter=replace(adapter, tensors=tensors))


METHOD = Method(
    name="damped_lora",
    summary="the copy of a LoRA, weakened",
    paper="none: this is a test",
    reads=COPY.reads,
    writes=COPY.writes,
    build=Damp,
)
