"""The plug-in contract: adapter kinds, and the methods that carry adapters between bases."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:  # `xadapt --help` need not wait seconds for torch and peft
    from peft import PeftConfig
    from torch import Tensor, nn

    from xadapt.update import Fold


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One adapter format: "lora", "input_ada", "ip_adapter"."""

    name: str


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
class Adapter:
    """Trained adapter weights, detached from any base. On disk: a PEFT folder, for a PeftKind."""

    kind: Kind
    config: Any  # of a PeftKind, the PeftConfig; of others, what their plug-in makes of it
    tensors: Mapping[str, Tensor]  # of a PeftKind, named as its `tensors` names them


class Base(Protocol):
    """A frozen pretrained model, opened only as far as a method reaches into it."""

    @property
    def name(self) -> str: ...  # what messages call it
    def weights(self) -> Mapping[str, Tensor]: ...  # by the live network's names; streamed, one tensor per lookup
    def modules(self) -> Mapping[str, nn.Module]: ...  # by path, without weights on disk bases; only to be looked at
    def skeleton(self) -> nn.Module: ...  # the network without weights, on the meta device; the caller's own
    def module(self) -> nn.Module: ...  # the live network, loaded on first use


@runtime_checkable
class Transfer(Protocol):
    """Carries an adapter from one base to another. Changes neither base, nor the adapter it is given."""

    def transfer(self, adapter: Adapter, source: Base, target: Base) -> Adapter: ...


@runtime_checkable
class Learner(Protocol):
    """Learns the Transfer for one pair of bases. What it returns is an nn.Module as well, so it can be saved."""

    def fit(self, adapter: Adapter, source: Base, target: Base, batches: Iterable[Any]) -> Transfer: ...


@dataclass(frozen=True, kw_only=True)
class Method:
    """An arrow from the kinds it reads to the kind it writes: what an entry point of the group "xadapt.methods" names."""

    name: str  # the entry point's name
    summary: str  # one line for `xadapt methods`
    paper: str  # where it was published: a link, or a citation in a few words
    reads: tuple[Kind, ...]
    writes: Kind
    build: Callable[..., Transfer | Learner]  # a dataclass; its fields are the method's options

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """Every kind this method reads or writes, once each."""
        return tuple(dict.fromkeys((*self.reads, self.writes)))
