"""The decision with data: every candidate is tried, and what it changes on the target is compared with the change on the source."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from xadapt.checking.check import measure
from xadapt.checking.report import CheckReport
from xadapt.contract import Adapter, Carried, Siblings
from xadapt.data.counting import anything_counts
from xadapt.refused import Refused
from xadapt.verifying.behaviour import Agreement
from xadapt.verifying.continuing import continued

from .candidates import TRAINING, Candidate, as_it_is, attempt, known, mixture
from .choosing import Choice, choose
from .halving import batches_in_one, halves
from .scoring import bare_score, scores

if TYPE_CHECKING:
    from .methods import Auto

BY_LAYER = "by layer"


@dataclass(frozen=True)
class Decided:
    """A decision for one adapter."""

    carried: Carried
    decided_for: Adapter = field(repr=False)

    def transfer(self, adapter: Adapter, bases: Siblings) -> Carried:
        """What was decided on. ValueError for another adapter than the one that it was decided for."""
        same = adapter.tensors.keys() == self.decided_for.tensors.keys() and all(
            tensor is self.decided_for.tensors[name] or tensor.equal(self.decided_for.tensors[name])
            for name, tensor in adapter.tensors.items()
        )
        if not same:
            raise ValueError("This was decided for another adapter; call fit with this one.")
        return self.carried


def decide(options: Auto, adapter: Adapter, bases: Siblings, batches: Iterable[Any]) -> Decided:
    """Tries, scores, chooses. See `Auto.fit`."""
    given = list(batches)
    if not given:
        raise ValueError(
            "The data is empty: auto compares behaviours on it. Pass some inputs of the kind the adapter is for."
        )
    if options.continue_tokens:
        given = continued(bases.source, adapter, given, options.continue_tokens)
    learning, judging = halves(given)
    report = measure(adapter, bases, learning)
    if report.decision.merged:  # once more it would look like the adapter's work
        raise Refused(f"{report.decision.why}.")
    tried = {name: attempt(name, adapter, bases, learning) for name in known(options.names, adapter)}
    made = {name: one for name, one in tried.items() if isinstance(one, Candidate)}
    if mixed := _by_layer(report, made, adapter, bases):
        made[BY_LAYER] = mixed
    without = bare_score(adapter, bases, judging)
    found = scores(adapter, bases, made, judging)
    choice = _choose(options, adapter, found, without)
    if options.allow_training and (choice.name is None or found[choice.name].score < options.train_below):
        training = {**options.training, "gradient_accumulation_steps": batches_in_one(given, learning)}
        trained = attempt(TRAINING, adapter, bases, learning, training)
        tried[TRAINING] = trained
        if isinstance(trained, Candidate):
            made[TRAINING] = trained
            found |= scores(adapter, bases, {TRAINING: trained}, judging)
            choice = _choose(options, adapter, found, without)
    reasons = {name: one for name, one in tried.items() if isinstance(one, str)}
    considered = _table(found, reasons, without)
    if any(one is other and anything_counts(one) for one in learning for other in judging):
        considered["bare"]["note"] = (
            "the data is one batch that cannot be halved, so what was fitted is judged on itself"
        )
    if choice.name is None:
        table = "\n".join(f"  {name}: {_line(told)}" for name, told in considered.items())
        hint = (
            "" if options.allow_training else " allow_training=True (--allow-training) trains a new one on the target."
        )
        if any(one.score > without for one in found.values()):
            hint += " A smaller gain (--gain) takes what there is."
        raise Refused(f"{choice.why}\n{table}\nThe adapter does not carry to {bases.target.name}.{hint}")
    best = _refitted(options, choice.name, report, made, adapter, bases, given)
    verdicts = {layer.target: told for layer, told in zip(report.layers, report.decision.layers, strict=True)}
    evidence = {
        path: {**own, "way": verdicts[path].way, "why": verdicts[path].why} if path in verdicts else own
        for path, own in best.evidence.items()
    }
    chosen = {
        name: {**told, "chosen": choice.why} if name == choice.name else told for name, told in considered.items()
    }
    return Decided(Carried(adapter=best.adapter, evidence=evidence, left_out=best.left_out, considered=chosen), adapter)


def _refitted(
    options: Auto,
    name: str,
    report: CheckReport,
    made: Mapping[str, Candidate],
    adapter: Adapter,
    bases: Siblings,
    batches: list[Any],
) -> Candidate:
    """The winner, fitted on all of the data."""
    if name == BY_LAYER:
        parts = {one: attempt(one, adapter, bases, batches) for one in (as_it_is(adapter), "aligned")}
        whole = {one: part for one, part in parts.items() if isinstance(part, Candidate)}
        return _by_layer(report, whole, adapter, bases) or made[name]
    again = attempt(name, adapter, bases, batches, options.training if name == TRAINING else None)
    return again if isinstance(again, Candidate) else made[name]


def _choose(options: Auto, adapter: Adapter, found: Mapping[str, Agreement], without: float) -> Choice:
    return choose(
        {name: one.score for name, one in found.items()},
        lead={as_it_is(adapter): options.margin, BY_LAYER: -options.margin, TRAINING: options.train_margin},
        bare=without,
        gain=options.gain,
    )


def _by_layer(
    report: CheckReport, made: Mapping[str, Candidate], adapter: Adapter, bases: Siblings
) -> Candidate | None:
    """The adapter as it is where check sees the same bases, aligned elsewhere; None where that is one of the two throughout."""
    own, other = made.get(as_it_is(adapter)), made.get("aligned")
    if own is None or other is None:
        return None
    choice: dict[str, Candidate] = {}
    for layer, verdict in zip(report.layers, report.decision.layers, strict=True):
        wanted, instead = (own, other) if verdict.way == "as it is" else (other, own)
        if layer.target is not None and (layer.target in wanted.parts or layer.target in instead.parts):
            choice[layer.target] = wanted if layer.target in wanted.parts else instead
    if len({one.name for one in choice.values()}) < 2:
        return None
    return mixture(BY_LAYER, choice, adapter, bases)


def _table(
    found: Mapping[str, Agreement], reasons: Mapping[str, str], without: float
) -> dict[str, dict[str, float | str]]:
    rows: dict[str, dict[str, float | str]] = {"bare": {"score": without}}
    for name, one in found.items():
        rows[name] = {"score": one.score, "direction": one.direction, "strength": one.strength}
    return rows | {name: {"cannot": why} for name, why in reasons.items()}


def _line(told: Mapping[str, float | str]) -> str:
    return ", ".join(
        f"{name} {value:.3f}" if isinstance(value, float) else f"{name}: {value}" for name, value in told.items()
    )
