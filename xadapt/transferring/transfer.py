"""The verb: an adapter carried to another base, and written there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from xadapt import registry
from xadapt.adapter_files import Opened, check_apart, name_of, open_adapter
from xadapt.carried_along import without_base_tensors
from xadapt.contract import Adapter, Base, Carried, Learner, Method, Transfer
from xadapt.data.amount import Amount
from xadapt.data.batches import Batches, beside
from xadapt.data.opening import open_data
from xadapt.errors import some
from xadapt.fingerprint import Match
from xadapt.kinds import PeftKind
from xadapt.method_options import build, chosen, fields_of, unprefixed
from xadapt.opening import check_choices, open_for
from xadapt.origin import fingerprint_of, match_base
from xadapt.refused import Refused
from xadapt.siblings import Pair

from .foreseeing import Foreseen, foresee, foresee_learning
from .layers import adapted_layers, planned_layers
from .noting import notes_on
from .processes import writes
from .result import CarriedLayer, PlannedLayer, TransferPlan, TransferResult
from .resuming import resumable
from .writing import check_free, write_transferred

Map = Mapping[str, "str | None"] | str | PathLike[str] | None


def transfer(
    adapter: Any,
    source: Any,
    target: Any,
    method: str = "auto",
    *,
    out: str | PathLike[str],
    data: Any = None,
    neutral: Any = None,
    partial: bool = False,
    trust_source: bool = False,
    map: Map = None,
    component: str | None = None,
    amount: Amount | None = None,
    tokenizer: Any = None,
    seed: int = 0,
    variant: str | None = None,
    allow_pickle: bool = False,
    overwrite: bool = False,
    **options: Any,
) -> TransferResult:
    """Carries an adapter to another base, and writes it there: a PEFT folder, or the method's own format.

        xadapt.transfer("my-adapter", "llama", "llama-instruct", method="prolora", out="there", rank=64)

    Of several processes that learn together (`accelerate launch`), the first writes. It appears under `out` when it is whole and was read back, or not at all. Interrupted, the same call goes on where it stopped. Beside the tensors lie the record of how it came
    about (`xadapt_transfer.json`, and in the config's `auto_mapping`): method, options, both bases' fingerprints, what each layer
    lost.

    Args:
        adapter: a folder or file, a PeftModel, or what `read_adapter` returns.
        source: the base it was trained on: a folder, a hub id, a live model. None for methods that do not look at it.
        target: the base it is carried to.
        method: one of `xadapt methods`.
        out: the folder to write.
        data: for methods that learn or measure; see `xadapt.data.open_data`.
        neutral: inputs that are not the adapter's business, to learn from as well: alignment sees more of both models. auto does
            not judge by them.
        partial: write what could be carried, where some layers could not.
        trust_source: go on although the adapter's fingerprint says it was trained on another base than `source`.
        map: lines of your own for the module map, a dict or a JSON file.
        component: which part of pipelines and of a LoRA file.
        amount: how much of the data.
        tokenizer: for live models.
        seed: of the method, where it draws anything, and of random data.
        overwrite: replace an adapter that lies at `out`.
        options: the method's own; `xadapt transfer --method NAME --help` lists them. One that this function has too is
            written with `method_`: method_map="identity".

    Raises:
        Refused: the adapter is another base's, or layers would be left out. Nothing is written.
        ValueError: something given cannot be used. Nothing is written.
        TypeError: the method has no such option.
    """
    check_apart(adapter, out)
    check_free(Path(out), overwrite)
    job = _prepare(adapter, source, target, method, data, neutral, map, component, seed, variant, allow_pickle, options)
    belongs = _check_source(job, trust_source)
    much = amount or Amount(seed=seed)
    carried, said = _carry(job, Path(out), data, neutral, much, tokenizer)
    if carried.left_out and not partial:
        reasons = [f"{path}: {why}" for path, why in carried.left_out.items()]
        raise Refused(
            f"{len(reasons)} of the adapter's layers cannot be carried to {job.bases.target.name} by {method}:\n  "
            + some(reasons, separator="\n  ")
            + "\nNothing was written. partial=True writes the others; another method may carry all."
        )
    result = _result(job, carried, Path(out), belongs, said, trust_source)
    learnt = isinstance(job.step, Learner) and data is not None
    if not learnt or writes():
        write_transferred(carried.adapter, job.bases.target, result, overwrite)
    return result


def transfer_all(
    adapter: Any,
    source: Any,
    targets: Mapping[str, Any],
    method: str = "auto",
    *,
    out: str | PathLike[str],
    **settings: Any,
) -> dict[str, TransferResult | ValueError]:
    """`transfer` to several targets, with the adapter and the source read once. Each gets a folder of its own under `out`.

    Args:
        targets: the folder's name → the base.
        settings: as `transfer` takes them.

    Returns:
        By name, the result, or the error that kept this target from being written; the others are written nevertheless.
    """
    once = [name for name in ("data", "neutral") if isinstance(settings.get(name), Iterator)]
    if once and len(targets) > 1:
        raise ValueError(
            f"{once[0]} is an iterator, which can be read once, and there are several targets: pass a list of batches, a DataLoader "
            "or a file."
        )
    from_file = {name: settings.get(name) for name in ("component", "variant")}
    allow_pickle = bool(settings.get("allow_pickle"))
    check_choices(from_file["component"], from_file["variant"], [adapter], [source, *targets.values()])
    read = Opened(open_adapter(adapter, from_file["component"], allow_pickle), name_of(adapter))
    opened = None if source is None else open_for(source, from_file["component"], allow_pickle, from_file["variant"])
    results: dict[str, TransferResult | ValueError] = {}
    for name, target in targets.items():
        try:
            results[name] = transfer(read, opened, target, method, out=Path(out) / name, **settings)
        except ValueError as error:
            results[name] = error
    return results


def plan_transfer(
    adapter: Any,
    source: Any,
    target: Any,
    method: str = "auto",
    *,
    out: str | PathLike[str],
    data: Any = None,
    neutral: Any = None,
    partial: bool = False,
    trust_source: bool = False,
    map: Map = None,
    component: str | None = None,
    seed: int = 0,
    variant: str | None = None,
    allow_pickle: bool = False,
    overwrite: bool = False,
    **options: Any,
) -> TransferPlan:
    """What `transfer` would do, and how large it is. Reads the adapter, headers, fingerprints and, where blocks have to be
    aligned, a sample of these; writes nothing. Arguments as there."""
    check_apart(adapter, out)
    check_free(Path(out), overwrite)
    job = _prepare(adapter, source, target, method, data, neutral, map, component, seed, variant, allow_pickle, options)
    learns = isinstance(job.step, Learner)
    layers = planned_layers(job.adapter, job.bases) if job.bases.has_source else ()
    foreseen = _foreseen(job, layers, partial, trust_source, data is not None)
    return TransferPlan(
        adapter=job.name,
        source=_source_name(job.bases),
        target=job.bases.target.name,
        out=Path(out),
        method=method,
        options=chosen(job.method, job.step),
        reads=job.adapter.kind.name,
        writes=job.method.writes.name,
        learns=learns and (data is not None or not isinstance(job.step, Transfer)),
        loads=_loaded(job, data is not None or (learns and not isinstance(job.step, Transfer))),
        layers=layers,
        adapter_bytes=sum(tensor.nbytes for tensor in job.adapter.tensors.values()),
        refused=foreseen.refused,
        untested=foreseen.untested,
    )


def _loaded(job: _Job, learning: bool) -> tuple[str, ...]:
    """The bases that learning runs. A method that reads the user's data by itself makes of it what its target takes."""
    if not learning:
        return ()
    bases = [job.bases.target]
    if job.bases.has_source and not hasattr(job.step, "batches"):
        bases.insert(0, job.bases.source)
    return tuple(base.name for base in bases)


def _foreseen(job: _Job, layers: Sequence[PlannedLayer], partial: bool, trust_source: bool, has_data: bool) -> Foreseen:
    """Why a transfer would be refused, by what is known before it."""
    try:
        _check_source(job, trust_source)
    except Refused as error:
        return Foreseen(refused=str(error))
    lost = [layer.source for layer in layers if layer.target is None]
    if not isinstance(job.step, Transfer) or (has_data and isinstance(job.step, Learner)):
        return foresee_learning(job.method.name, lost, partial)
    return foresee(job.step, job.method.name, job.adapter, job.bases, lost, partial)


@dataclass(frozen=True)
class _Job:
    """What was asked for, opened as far as its headers."""

    name: str
    adapter: Adapter
    bases: Pair
    method: Method
    step: Transfer | Learner


def _prepare(
    adapter: Any,
    source: Any,
    target: Any,
    method: str,
    data: Any,
    neutral: Any,
    map: Map,
    component: str | None,
    seed: int,
    variant: str | None,
    allow_pickle: bool,
    options: Mapping[str, Any],
) -> _Job:
    if neutral is not None and data is None:
        raise ValueError("neutral goes with data of the adapter's own kind, and none was given: pass data=… as well.")
    found = registry.get(method)
    names = {field.name for field in fields_of(found)}
    if isinstance(map, str) and "map" in names and not Path(map).exists():
        raise ValueError(
            f"map={map!r} is no file: map is for the module map, a dict or a JSON file. The option of that name that the method "
            f"{method!r} has is method_map={map!r}."
        )
    step = build(found, {**({"seed": seed} if "seed" in names else {}), **unprefixed(found, options)})
    if not isinstance(step, Transfer | Learner):
        raise TypeError(f"The method {method!r} builds {type(step).__name__}, which has neither transfer nor fit.")
    check_choices(component, variant, [adapter], [source, target])
    read = open_adapter(adapter, component, allow_pickle)
    if read.kind not in found.reads:
        working, _ = registry.load_all()
        others = [name for name, other in working.items() if read.kind in other.reads]
        kinds = ", ".join(kind.name for kind in found.reads)
        raise ValueError(
            f"The method {method!r} reads {kinds}, and this adapter is of kind {read.kind.name!r}. Methods that read it: "
            f"{', '.join(others) or 'none is installed'}."
            + ("" if others or not isinstance(read.kind, PeftKind) else _AS_LORA)
        )
    if isinstance(step, Learner) and not isinstance(step, Transfer) and data is None:
        raise ValueError(
            f"The method {method!r} learns from data: pass data=… (--data), a text or JSONL file, a folder of pictures or what else "
            "xadapt.data.open_data takes. No labels are needed."
        )
    if data is not None and not isinstance(step, Learner):
        raise ValueError(f"The method {method!r} needs no data; leave data out, or choose one that learns.")
    opened = None if source is None else open_for(source, component, allow_pickle, variant)
    if opened is not None and isinstance(read.kind, PeftKind):
        read = without_base_tensors(read, opened)
    return _Job(
        name_of(adapter), read, Pair(opened, open_for(target, component, allow_pickle, variant), map), found, step
    )


_AS_LORA = " As a LoRA it can be carried: xadapt export --base SOURCE --rank 16, or --energy 0.99."


def _check_source(job: _Job, trust_source: bool) -> dict[Match, int]:
    """Whether the adapter was trained on the source, as far as it says so."""
    try:
        source = job.bases.source
    except ValueError:  # none was given: whether one is needed is the method's to say
        return {}
    found = match_base(job.adapter, source)
    others = found.get("differs", 0) + found.get("other shape", 0)
    if others > found.get("same", 0) and not trust_source:
        trained_on = getattr(job.adapter.config, "base_model_name_or_path", None) or "another base"
        raise Refused(
            f"{job.name} was not trained on {source.name}: {others} of {sum(found.values())} layers have other weights than its "
            f"fingerprint says (it names {trained_on}). Pass that base as source; trust_source=True goes on with this one."
        )
    return found


def _carry(job: _Job, out: Path, data: Any, neutral: Any, amount: Amount, tokenizer: Any) -> tuple[Carried, str | None]:
    step, said = job.step, None
    if isinstance(step, Learner) and data is not None:
        own = getattr(step, "batches", None)
        if own is not None:
            _check_own_reading(job.method.name, amount, tokenizer, neutral)
            batches, said = own(data, job.bases), str(data) if isinstance(data, str | PathLike) else "data as given"
        else:
            source = job.bases.source if job.bases.has_source else None
            batches = open_data(data, source, job.bases.target, amount, tokenizer=tokenizer)
            if neutral is not None:
                batches = beside(batches, _neutral(neutral, source, job.bases.target, amount, tokenizer))
            said = batches.said
        step = step.fit(job.adapter, job.bases, batches)
    elif told := [*amount.chosen("samples", "max_tokens", "batch"), *(["tokenizer"] if tokenizer is not None else [])]:
        raise ValueError(
            f"{some(told)} says how data is read, and no data was given: pass data=…, or leave {some(told)} out."
        )
    assert isinstance(step, Transfer)
    if data is not None or not job.bases.has_source:
        return step.transfer(job.adapter, job.bases), said
    with resumable(job.adapter, job.bases, job.method.name, chosen(job.method, job.step), out):
        return step.transfer(job.adapter, job.bases), said


def _neutral(data: Any, source: Base | None, target: Base, amount: Amount, tokenizer: Any) -> Batches:
    try:
        return open_data(data, source, target, amount, tokenizer=tokenizer)
    except ValueError as error:
        raise ValueError(f"neutral: {error}") from error


def _check_own_reading(method: str, amount: Amount, tokenizer: Any, neutral: Any) -> None:
    """ValueError if a method that reads its data by itself is told what only `open_data` heeds."""
    told = amount.chosen("samples", "max_tokens", "batch")
    told += [name for name, one in (("tokenizer", tokenizer), ("neutral", neutral)) if one is not None]
    if told:
        raise ValueError(
            f"The method {method!r} reads its data by itself and takes no {some(told)}; leave that out. Its own options say how "
            f"much of it is used: xadapt transfer --method {method} --help."
        )


def _source_name(bases: Pair) -> str:
    return bases.source.name if bases.has_source else "a base that was not given"


def _result(
    job: _Job, carried: Carried, out: Path, belongs: dict[Match, int], said: str | None, trusted: bool
) -> TransferResult:
    target = job.bases.target
    paths = adapted_layers(carried.adapter, target) or tuple(carried.evidence)
    layers = [
        CarriedLayer(path, str(evidence.get("method", job.method.name)), evidence)
        for path in paths
        for evidence in [dict(carried.evidence.get(path, {}))]
    ]
    here = adapted_layers(job.adapter, job.bases.source) if job.bases.has_source else ()
    others = belongs.get("differs", 0) + belongs.get("other shape", 0)
    return TransferResult(
        out=out,
        adapter=job.name,
        source=_source_name(job.bases),
        target=target.name,
        method=job.method.name,
        options=chosen(job.method, job.step),
        read=job.adapter.kind.name,
        written=carried.adapter.kind.name,
        layers=tuple(layers),
        left_out=dict(carried.left_out),
        considered=dict(carried.considered),
        belongs={str(match): count for match, count in belongs.items()},
        source_fingerprint=fingerprint_of(job.bases.source, here) if here else {},
        target_fingerprint=fingerprint_of(target, paths),
        parameters=sum(tensor.numel() for tensor in carried.adapter.tensors.values()),
        bytes=sum(tensor.nbytes for tensor in carried.adapter.tensors.values()),
        data=said,
        notes=notes_on(job.adapter, carried, job.bases, belongs),
        trusted=trusted and others > belongs.get("same", 0),
    )


__all__: Sequence[str] = ["plan_transfer", "transfer", "transfer_all"]
