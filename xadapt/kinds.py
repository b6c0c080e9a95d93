"""Formats of adapters: those that PEFT puts on a model, and those with files of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from xadapt.contract import Adapter, Kind

if TYPE_CHECKING:
    from pathlib import Path

    from peft import PeftConfig
    from torch import Tensor, nn

    from xadapt.update import Fold


@dataclass(frozen=True, kw_only=True)
class PeftKind(Kind):
    """A format that PEFT puts on a live model, layer by layer. Its name is the PEFT type in lower case."""

    config: Callable[[], type[PeftConfig]]
    """Imports and returns the PEFT config class. The first call registers the format (all of its family) with PEFT, so
    that core opens a folder of this kind without knowing it."""

    attach: Callable[[nn.Module, PeftConfig], None]
    """Adds fresh trainable layers to a base, in place."""

    tensors: Callable[[nn.Module], Mapping[str, Tensor]]
    """Those layers' live tensors, named by module path in the base + parameter name, without an adapter name."""

    updates: Callable[[PeftConfig, Mapping[str, Tensor]], Mapping[str, Fold] | None] = lambda config, tensors: None
    """What a detached adapter (its config, its tensors) adds to each layer, by module path, where its tensors alone tell, as
    LoRA's do. None where they do not: it is then attached to a base without weights to find out."""

    def serves(self, peft_type: str) -> bool:
        """Whether a folder of `peft_type` is of this kind: "input_ada" serves INPUT_ADA and its family INPUT_ADA_LOHA, …"""
        family = self.name.upper()
        return peft_type == family or peft_type.startswith(f"{family}_")


@dataclass(frozen=True, kw_only=True)
class FileKind(Kind):
    """A format that PEFT does not know, with files of its own."""

    recognises: Callable[[Path], bool]
    """Whether a file or folder is of this kind, by its names and headers alone."""

    read: Callable[[Path, bool], Adapter]
    """The adapter in it. The flag allows pickles. ValueError if it is damaged."""

    write: Callable[[Adapter, Path], None]
    """Puts an adapter into a new folder, which the caller moves into its place when all is written."""

    describe: Callable[[Adapter], Mapping[str, str]] = lambda adapter: {}
    """What `xadapt inspect` says of it beside sizes, by a word or two: {"image projection": "base, 4 tokens"}."""

    applied: str = "`xadapt inspect` says what it is."
    """How a model gets it: a sentence for those who take it for a LoRA."""


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
