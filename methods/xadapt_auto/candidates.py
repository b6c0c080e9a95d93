"""The candidates: each method is tried, and what it gives is a LoRA on the target, or a reason why not."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from xadapt import registry
from xadapt.contract import Adapter, Carried, Learner, Siblings, Transfer
from xadapt.errors import did_you_mean
from xadapt.folding import layers_of
from xadapt.journal import within

from .as_lora import LORA, FullRank, Parts, as_lora, parts_of

TRAINING = "distil"
NOT_MEANT = ("auto", TRAINING, "distil_input", "distil_output")  # where all candidates are meant: these train


@dataclass(frozen=True)
class Candidate:
    """What one method, or a mixture of several, makes of the adapter."""

    name: str
    adapter: Adapter  # a LoRA for the target
    parts: Parts = field(repr=False)  # none of one that is whole or not at all, as DoRA
    evidence: Mapping[str, Mapping[str, float | str]] = field(repr=False)
    left_out: Mapping[str, str] = field(default_factory=dict)


def as_it_is(adapter: Adapter) -> str:
    """The method that takes adapters of this kind along unchanged."""
    return "copy" if adapter.kind == LORA else adapter.kind.name


def known(names: Iterable[str], adapter: Adapter) -> list[str]:
    """The methods among these that read this adapter, the one that leaves it as it is first.

    Args:
        names: of methods; all that are installed and do not train, if there are none.

    Raises:
        ValueError: a name is of no method that works, or none reads the adapter.
    """
    installed, broken = registry.load_all()
    given = list(names) or [name for name in installed if name not in NOT_MEANT]
    for name in given:
        if name in broken:
            raise broken[name]
        if name not in installed:
            raise ValueError(f"candidates names {name!r}. {did_you_mean(name, sorted(installed))}")
    fit = [name for name in given if adapter.kind in installed[name].reads and name != "auto"]
    if not fit:
        raise ValueError(f"None of the candidates {', '.join(given)} reads adapters of kind {adapter.kind.name!r}.")
    return sorted(fit, key=lambda name: name != as_it_is(adapter))


def attempt(
    name: str, adapter: Adapter, bases: Siblings, batches: list[Any] | None, options: Mapping[str, Any] | None = None
) -> Candidate | str:
    """What a method makes of the adapter, or why it cannot. One that breaks, as a plug-in may, does not take the others with it."""
    step = registry.get(name).build(**options or {})
    try:
        if isinstance(step, Learner) and not isinstance(step, Transfer):
            if batches is None:
                return "it needs data"
            step = step.fit(adapter, bases, batches)
        assert isinstance(step, Transfer)
        with within(name):
            carried = step.transfer(adapter, bases)
        return _candidate(name, carried, adapter, bases)
    except ValueError as error:
        return str(error)
    except Exception as error:  # no refusal but a defect, or memory that ran out
        why = f"{type(error).__name__}: {error}"
        warnings.warn(f"auto goes on without {name}, which failed with {why}", stacklevel=2)
        return why


def mixture(name: str, choice: Mapping[str, Candidate], adapter: Adapter, bases: Siblings) -> Candidate:
    """A candidate whose layers come from several others: by path in the target."""
    parts = {path: one.parts[path] for path, one in choice.items()}
    evidence = {path: {"method": one.name, **one.evidence.get(path, {})} for path, one in choice.items()}
    covered = set(parts)
    left_out = {
        path: why
        for one in choice.values()
        for path, why in one.left_out.items()
        if not any(line.target in covered for line in bases.modules.of(path))
    }
    return Candidate(name, as_lora(parts, bases.target, adapter), parts, evidence, left_out)


def _candidate(name: str, carried: Carried, adapter: Adapter, bases: Siblings) -> Candidate:
    try:
        parts = parts_of(carried.adapter, bases.target)
    except FullRank:
        if carried.adapter.kind != LORA:
            raise
        layers = [layer.path for layer in layers_of([carried.adapter], bases.target)]
        told = {path: {"method": name, **carried.evidence.get(path, {})} for path in layers}
        return Candidate(name, carried.adapter, {}, told, carried.left_out)
    plain = carried.adapter if carried.adapter.kind == LORA else as_lora(parts, bases.target, adapter)
    evidence = {path: {"method": name, **carried.evidence.get(path, {})} for path in parts}
    return Candidate(name, plain, parts, evidence, carried.left_out)
