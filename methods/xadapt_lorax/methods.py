"""What this package registers: LoRA-X adapters, and how one of them is taken to another base."""

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
class OnOwnDirections:
    """The same small matrix, between the target's own singular vectors.

    `evidence` has for each layer whose weights were compared how alike the directions are that share a number ("overlap", 0 to 1).
    """

    def transfer(self, adapter: Adapter, bases: Siblings) -> Carried:
        """Opens the weights of both bases only for the full form: of the diagonal one, no sign can be wrong."""
        from .carrying import carry

        return carry(adapter, bases)


def _config() -> type[PeftConfig]:
    from xadapt_lorax import LoraXConfig

    return LoraXConfig


def _updates(config: PeftConfig, tensors: Mapping[str, Tensor]) -> Mapping[str, Fold] | None:
    from .carrying import updates

    return updates(config, tensors)


KIND = peft_kind("lorax", _config, _updates)
LORAX = Method(
    name="lorax",
    summary="an adapter trained as LoRA-X: its small matrix, between the target's own singular vectors",
    paper="LoRA-X, https://arxiv.org/abs/2501.16559",
    reads=(KIND,),
    writes=KIND,
    build=OnOwnDirections,
)
