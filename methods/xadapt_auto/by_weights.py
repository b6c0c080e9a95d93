"""The decision without data: check's verdict on each layer, by the weights of both bases."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from statistics import mean
from typing import TYPE_CHECKING

from xadapt import registry
from xadapt.checking.check import measure
from xadapt.checking.decisions import LayerVerdict, Way
from xadapt.contract import Adapter, Carried, Siblings
from xadapt.refused import Refused
from xadapt.relocate import relocate

from .as_lora import LORA
from .candidates import Candidate, as_it_is, attempt, known, mixture

if TYPE_CHECKING:
    from .methods import Auto


MOST = 0.5
"""The relative error of the updates, on average, from which on less than half of them arrives."""


def by_weights(options: Auto, adapter: Adapter, bases: Siblings) -> Carried:
    """The adapter with each layer carried as check advises for it. See `Auto.transfer`."""
    report = measure(adapter, bases)
    ways: dict[Way, str] = {"as it is": as_it_is(adapter), **_spaces(adapter)}
    names = known(options.names, adapter)
    verdicts = {
        layer.target: verdict
        for layer, verdict in zip(report.layers, report.decision.layers, strict=True)
        if layer.target is not None
    }
    nowhere = {
        layer.source: verdict.why
        for layer, verdict in zip(report.layers, report.decision.layers, strict=True)
        if layer.target is None
    }
    hopeless = [verdict for verdict in verdicts.values() if verdict.way not in ways]
    if report.decision.merged:
        raise Refused(f"{report.decision.why}.")
    if report.verdict == "refused" or hopeless:
        raise Refused(
            f"{report.decision.why}. auto measures more with data=…, unlabelled inputs of the kind the adapter is for; or name "
            "a method yourself: a copy may load, and do nothing or harm."
        )
    doubt = f"check finds it doubtful: {report.decision.why}. With data=… auto measures what arrives."
    considered = {"check": {"verdict": report.verdict, "note": doubt}} if report.verdict == "doubtful" else {}
    wanted = {path: ways[verdict.way] for path, verdict in verdicts.items()}
    if missing := {path: name for path, name in wanted.items() if name not in names}:
        path, name = next(iter(missing.items()))
        registry.get(name)  # which says what is wrong with it, if it is installed and broken
        raise Refused(
            f"{len(missing)} of {len(wanted)} layers need a method that is not among the candidates {', '.join(names)}: {path} needs "
            f"{name}, since {verdicts[path].why}."
        )
    if adapter.kind == LORA and set(wanted.values()) == {as_it_is(adapter)}:  # as it is: DoRA's updates are no LoRA
        copied = relocate(adapter, bases)
        told = {path: {"method": name, **_told(verdicts[path])} for path, name in wanted.items()}
        return replace(copied, evidence=told, considered=considered)
    made = {name: attempt(name, adapter, bases, None) for name in dict.fromkeys(wanted.values())}
    for name, result in made.items():
        if isinstance(result, str):
            raise ValueError(f"auto chose {name} for some layers, which says: {result}")
    whole = {name: one for name, one in made.items() if isinstance(one, Candidate)}
    if lost := [path for path, name in wanted.items() if path not in whole[name].parts]:
        raise ValueError(f"auto chose {wanted[lost[0]]} for {lost[0]}, and it did not carry that layer.")
    choice = {path: whole[name] for path, name in wanted.items()}
    mixed = mixture("auto", choice, adapter, bases)
    evidence = {path: {**found, **_told(verdicts[path])} for path, found in mixed.evidence.items()}
    single = next(iter(whole.values())) if len(whole) == 1 else mixed
    _check_loss(evidence)
    return Carried(
        adapter=single.adapter, evidence=evidence, left_out={**mixed.left_out, **nowhere}, considered=considered
    )


def _check_loss(evidence: Mapping[str, Mapping[str, float | str]]) -> None:
    errors = [float(told.get("error", 0.0)) for told in evidence.values()]  # what is taken as it is loses nothing
    if errors and mean(errors) > MOST:
        raise Refused(
            f"Without data auto would lose {mean(errors):.0%} of the updates on average ({max(errors):.0%} at most): the weights do not span "
            "them. data=…, unlabelled inputs of the kind the adapter is for, lets it choose among more methods."
        )


def _spaces(adapter: Adapter) -> dict[Way, str]:
    """The methods that keep one side of a layer's basis."""
    own = getattr(adapter.config, "space", None) if adapter.kind.name in ("input_ada", "output_ada") else None
    return {
        "input space": as_it_is(adapter) if own == "input" else "pinv_input",
        "output space": as_it_is(adapter) if own == "output" else "pinv_output",
    }


def _told(verdict: LayerVerdict) -> dict[str, float | str]:
    return {"way": verdict.way, "why": verdict.why}
