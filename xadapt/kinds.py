"""Kinds whose adapters sit on a model as PEFT puts them there: all but the ones that PEFT does not know."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from xadapt.contract import PeftKind

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import Tensor, nn

    from xadapt.update import Fold


def peft_kind(
    name: str,
    config: Callable[[], type[PeftConfig]],
    updates: Callable[[PeftConfig, Mapping[str, Tensor]], Mapping[str, Fold] | None] = lambda config, tensors: None,
) -> PeftKind:
    """A kind that is attached and read through PEFT's own functions."""
    return PeftKind(name=name, config=config, attach=_attach, tensors=_tensors, updates=updates)


def stock_kind(peft_type: str) -> PeftKind:
    """A kind for one of PEFT's own types that no plug-in serves: it can be read, exported and merged."""
    from xadapt.peft_internals import PEFT_TYPE_TO_CONFIG_MAPPING, PeftType

    return peft_kind(peft_type.lower(), lambda: PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(peft_type)])


def _attach(model: nn.Module, config: PeftConfig) -> None:
    from peft import inject_adapter_in_model

    inject_adapter_in_model(config, model)


def _tensors(model: nn.Module) -> Mapping[str, Tensor]:
    from peft import get_peft_model_state_dict

    tensors: dict[str, Tensor] = get_peft_model_state_dict(model)
    return tensors
