"""The verb: what carrying an adapter to another base would meet, measured before anything is carried."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from os import PathLike
from typing import Any

from xadapt import registry
from xadapt.adapter_files import name_of, open_adapter
from xadapt.contract import Adapter, Siblings
from xadapt.data.amount import Amount
from xadapt.data.opening import open_data
from xadapt.kinds import PeftKind
from xadapt.opening import check_choices, open_for
from xadapt.origin import match_base
from xadapt.progress import showing
from xadapt.siblings import Pair

from .activations import measure_activations
from .decisions import Decision, decide
from .measures import LayerMeasures
from .report import CheckReport, belongs
from .thresholds import Thresholds
from .weights import measure_weights, pairs_with_features


def check(
    adapter: Any,
    source: Any,
    target: Any,
    data: Any = None,
    *,
    component: str | None = None,
    map: Mapping[str, str | None] | str | PathLike[str] | None = None,
    amount: Amount | None = None,
    tokenizer: Any = None,
    thresholds: Thresholds | None = None,
    variant: str | None = None,
    allow_pickle: bool = False,
    progress: bool = False,
) -> CheckReport:
    """Measures what an adapter would meet on another base. Without data it opens headers and weights only, a pair at a time.

        report = xadapt.check("my-adapter", "llama", "llama-instruct")
        report.verdict, report.decision.why, report.recommended

    Args:
        adapter: a PEFT folder, a LoRA file, a PeftModel, or what `read_adapter` returns.
        source: the base it was trained on: a folder, a hub id or a live model.
        target: the base it is meant for.
        data: what activations are measured on besides; see `xadapt.data.open_data`. Both models are loaded for it.
        component: which part of pipelines and of a LoRA file.
        map: lines of your own for the module map, a dict or a JSON file.
        amount: how much of the data.
        tokenizer: for live models.
        thresholds: other numbers for the verdicts.

    Raises:
        ValueError: something is asked for that says nothing here, the adapter does not fit the source, a base or the data cannot be used, or something holds NaN or infinity.
    """
    if data is None and (amount is not None or tokenizer is not None):
        given = "amount" if tokenizer is None else "tokenizer"
        raise ValueError(f"{given} says how data is read, and no data was given: pass data=…, or leave {given} out.")
    check_choices(component, variant, [adapter], [source, target])
    read = open_adapter(adapter, component, allow_pickle)
    here, there = (open_for(base, component, allow_pickle, variant) for base in (source, target))
    bases = Pair(here, there, map)
    batches = None if data is None else open_data(data, bases.source, bases.target, amount, tokenizer=tokenizer)
    with showing(progress):
        report = measure(read, bases, batches, thresholds=thresholds)
    told = report if batches is None else replace(report, data=batches.said)
    if batches is not None and batches.random:
        told = replace(told, notes=(*told.notes, "The activations are those of random latents, not of pictures."))
    return replace(told, adapter=name_of(adapter))


def measure(
    adapter: Adapter,
    bases: Siblings,
    batches: Iterable[Mapping[str, Any]] | None = None,
    *,
    thresholds: Thresholds | None = None,
) -> CheckReport:
    """`check` for what is open already: for methods that decide by what it measures."""
    if not isinstance(adapter.kind, PeftKind):
        raise ValueError(
            f"An adapter of kind {adapter.kind.name!r} adds nothing to single layers, so there is none to compare. Methods that "
            f"carry it: {', '.join(readers(adapter)) or 'none is installed'}."
        )
    limits = thresholds or Thresholds()
    belonging = match_base(adapter, bases.source)
    layers = measure_weights(adapter, bases)
    if batches is not None:
        layers = _with_features(layers, bases, batches)
    decision = decide(layers, limits)
    return CheckReport(
        adapter=name_of(adapter),
        kind=adapter.kind.name,
        source=bases.source.name,
        target=bases.target.name,
        belongs=belonging,
        coverage=str(bases.modules.restricted([layer.source for layer in layers]).coverage),
        data=None if batches is None else "batches as given",
        layers=layers,
        decision=decision,
        recommended=_recommended(adapter, decision),
        thresholds=limits,
        notes=_notes(adapter, belonging, bases),
    )


def readers(adapter: Adapter) -> list[str]:
    """The installed methods that read this kind of adapter."""
    working, _ = registry.load_all()
    return [name for name, method in working.items() if adapter.kind in method.reads]


def _with_features(
    layers: Sequence[LayerMeasures], bases: Siblings, batches: Iterable[Mapping[str, Any]]
) -> tuple[LayerMeasures, ...]:
    moved = measure_activations(dict(pairs_with_features(tuple(layers))), bases, batches)
    return tuple(_with(layer, moved.get(layer.source)) for layer in layers)


def _with(layer: LayerMeasures, moved: Any) -> LayerMeasures:
    if moved is None:
        return layer
    found = asdict(moved)
    return replace(
        layer,
        inputs_moved=found["inputs"],
        outputs_moved=found["outputs"],
        inputs_cka=found["inputs_cka"],
        outputs_cka=found["outputs_cka"],
    )


def _recommended(adapter: Adapter, decision: Decision) -> str | None:
    """The installed method that does what was decided; one that chooses by layer where the layers differ."""
    known = readers(adapter)
    wanted: tuple[str, ...]
    if decision.verdict == "refused":
        return None
    if decision.verdict == "needs data":
        wanted = ("auto", *(name for name in known if name.startswith("aligned")), "distil")
    elif len(decision.ways) > 1:
        wanted = ("auto",)
    else:
        (way,) = decision.ways
        own = "copy" if adapter.kind.name == "lora" else adapter.kind.name
        space = way.partition(" ")[0]
        wanted = {
            "as it is": (own,),
            "input space": (own if getattr(adapter.config, "space", None) == space else "pinv_input", own),
            "output space": (own if getattr(adapter.config, "space", None) == space else "pinv_output", own),
        }.get(way, ("auto",))
    return next((name for name in wanted if name in known), None)


def _notes(adapter: Adapter, belonging: dict[Any, int], bases: Siblings) -> tuple[str, ...]:
    notes = []
    if not belonging:
        notes.append(
            "No fingerprint of its base is recorded in the adapter, so whether this is its source was not tested."
        )
    elif not belongs(belonging):
        trained_on = getattr(adapter.config, "base_model_name_or_path", None) or "another base"
        notes.append(
            f"{bases.source.name} is not the base that the adapter was trained on ({trained_on}): "
            f"{belonging.get('differs', 0) + belonging.get('other shape', 0)} of {sum(belonging.values())} layers are others."
        )
    return tuple(notes)
