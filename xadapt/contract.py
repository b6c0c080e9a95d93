"""The plug-in contract: adapters, bases, and the methods that carry the ones between the others. Formats: `xadapt.kinds`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:  # `xadapt --help` need not wait seconds for torch and peft
    from torch import Tensor, nn

    from xadapt.module_map import ModuleMap


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One adapter format: "lora", "input_ada", "ip_adapter"."""

    name: str


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


class Siblings(Protocol):
    """The two bases of a transfer. `xadapt.siblings.Pair` is one."""

    @property
    def source(self) -> Base: ...  # ValueError if none was given: not every method needs it
    @property
    def target(self) -> Base: ...
    @property
    def modules(self) -> ModuleMap: ...  # which layer of the one is which of the other; made on first use


@dataclass(frozen=True, kw_only=True)
class Carried:
    """What a transfer gives: the adapter for the target, and how it came about."""

    adapter: Adapter
    evidence: Mapping[str, Mapping[str, float | str]] = field(default_factory=dict)
    """By layer of the target, what was measured and decided there: {"error": 0.03}."""

    left_out: Mapping[str, str] = field(default_factory=dict)
    """By layer of the source, why it was not carried. Whether the rest will do is the caller's decision (`--partial`)."""

    considered: Mapping[str, Mapping[str, float | str]] = field(default_factory=dict)
    """Of a method that chooses among others: by their names, what was measured of each."""


@runtime_checkable
class Transfer(Protocol):
    """Carries an adapter from one base to another. Changes neither base, nor the adapter it is given."""

    def transfer(self, adapter: Adapter, bases: Siblings) -> Carried: ...


@runtime_checkable
class Learner(Protocol):
    """Learns the Transfer for one pair of bases, from batches: dicts of arguments for the target's forward, and maybe labels, which
    leave out what does not count (`xadapt.data.counting`). One that reads the user's data itself has `batches(data, bases)` as well.
    """

    def fit(self, adapter: Adapter, bases: Siblings, batches: Iterable[Any]) -> Transfer: ...


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
