"""What this package registers: stock LoRA as a kind, and the copy that every other method is measured against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from xadapt.contract import Adapter, Carried, Method, Siblings
from xadapt.kinds import peft_kind

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import Tensor

    from xadapt.update import Fold


@dataclass(frozen=True, kw_only=True)
class Copy:
    """The adapter as it is, on the layers of another base that have the same shapes: the baseline of every report."""

    def transfer(self, adapter: Adapter, bases: Siblings) -> Carried:
        """The same tensors, under the target's names. Opens no weight; layers of another shape are left out."""
        from xadapt.relocate import relocate

        from .lora import check_start

        check_start(adapter.config)
        return relocate(adapter, bases)


def _config() -> type[PeftConfig]:
    from peft import LoraConfig

    return LoraConfig


def _updates(config: PeftConfig, tensors: Mapping[str, Tensor]) -> Mapping[str, Fold] | None:
    from .lora import updates

    return updates(config, tensors)


LORA = peft_kind("lora", _config, _updates)
COPY = Method(
    name="copy",
    summary="an existing LoRA as it is: the baseline",
    paper="LoRA, https://arxiv.org/abs/2106.09685",
    reads=(LORA,),
    writes=LORA,
    build=Copy,
)
