"""The verb: bare source, adapted source, bare target, copy and transferred, on the same unlabelled inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor

from xadapt.adapter_files import name_of, open_adapter
from xadapt.base import LiveBase
from xadapt.carried_along import without_base_tensors
from xadapt.checking.report import belongs
from xadapt.contract import Adapter, Base
from xadapt.data.amount import Amount
from xadapt.data.batches import Batches
from xadapt.data.denoisers import is_denoiser
from xadapt.data.opening import open_data
from xadapt.data.tokenizing import tokenizer_of
from xadapt.evaluating import in_eval_mode
from xadapt.finite import is_finite
from xadapt.kinds import PeftKind
from xadapt.opening import check_choices, open_for
from xadapt.origin import match_base
from xadapt.progress import showing
from xadapt.siblings import Pair
from xadapt.transferring.layers import adapted_layers

from .comparing import compare, retained
from .continuing import continued_data
from .metrics import Metric, lm_eval_metric, metric_from, numbers
from .models import adapted
from .pictures import Painter
from .report import Verified, VerifyReport

STRONG = 2.0  # times the strength on the source, from which on it is said


def verify(
    source: Any,
    target: Any,
    adapter: Any,
    transferred: Any,
    data: Any,
    *,
    neutral: Any = None,
    metric: str | Metric | None = None,
    tasks: Sequence[str] = (),
    task_limit: int | None = None,
    prompts: Sequence[str] = (),
    continue_tokens: int = 0,
    component: str | None = None,
    amount: Amount | None = None,
    tokenizer: Any = None,
    variant: str | None = None,
    allow_pickle: bool = False,
    progress: bool = False,
) -> VerifyReport:
    """Whether the carried adapter changes the target as the adapter changed its source. No labels are needed.

        report = xadapt.verify("llama", "llama-instruct", "my-adapter", "there", "lines.txt")
        report.score, report.verdict

    Both models are loaded. For causal language models the change is that of the log-probabilities, for denoisers that of the
    predicted noise. The copy is the adapter put on the target as it is; where it cannot be, its row says why.

    Args:
        source, target: folders, hub ids or live models; live ones are as before afterwards.
        adapter: on the source.
        transferred: what transfer wrote for the target.
        data: inputs of the kind that the adapter is for; see `xadapt.data.open_data`.
        neutral: inputs that are not its business, to see what it breaks.
        metric: a function from a model to a number or to a dict of them, or "module:function": measured on all five models.
        tasks: lm-eval's, by name or by the path of their file.
        task_limit: documents of each task; all by default.
        prompts: for a component of a pipeline: what all five draw for these.
        continue_tokens: where the data are prompts without answers: let the adapted source continue each by that many tokens, and
            compare the models on these.
        tokenizer: for live models.

    Raises:
        ValueError: something given cannot be used, an adapted layer of either base holds NaN or infinity, the adapter does nothing
            on its own source, or the models' outputs cannot be compared.
    """
    check_choices(component, variant, [adapter, transferred], [source, target])
    if task_limit is not None and not tasks:
        raise ValueError(
            f"task_limit={task_limit} is of lm-eval's tasks, and none was given: pass tasks=[…], or leave it out."
        )
    here, there = (open_for(base, component, allow_pickle, variant) for base in (source, target))
    bases = Pair(here, there)
    if bases.source is bases.target or _one_model(bases):
        raise ValueError(
            "source and target are one live model, which cannot have both adapters at once: pass a copy as target."
        )
    candidates: dict[str, Adapter] = {
        "copy": _its_own(open_adapter(adapter, component, allow_pickle), bases.source),
        "transferred": _its_own(open_adapter(transferred, component, allow_pickle), bases.target),
    }
    inputs = open_data(data, bases.source, bases.target, amount, tokenizer=tokenizer)
    _check_finite(bases.source, [candidates["copy"]])
    _check_finite(bases.target, list(candidates.values()))
    if continue_tokens:
        inputs = continued_data(bases.source, candidates["copy"], inputs, continue_tokens)
    others = None if neutral is None else open_data(neutral, bases.source, bases.target, amount, tokenizer=tokenizer)
    metrics = [] if metric is None else [metric_from(metric)]
    if tasks:
        batch = (amount or Amount()).batch
        metrics.append(lm_eval_metric(tasks, tokenizer or tokenizer_of(bases.target), batch, task_limit))
    painters = [
        Painter.of(base, prompts, amount or Amount()) if prompts else None for base in (bases.source, bases.target)
    ]
    with showing(progress), in_eval_mode(bases.source.module(), bases.target.module()):
        rows = _rows(bases, candidates, inputs, others, metrics, painters)
    notes = _notes(bases, candidates) + _strong(rows, is_denoiser(bases.target))
    if inputs.random:
        notes.append("The inputs are random latents, not pictures.")
    return VerifyReport(
        adapter=name_of(adapter),
        transferred=name_of(transferred),
        source=bases.source.name,
        target=bases.target.name,
        data=inputs.said,
        neutral=None if others is None else others.said,
        rows=tuple(rows),
        prompts=tuple(prompts),
        notes=tuple(notes),
    )


def _check_finite(base: Base, adapters: Sequence[Adapter]) -> None:
    """Refuses a base whose layers under these adapters hold NaN or infinity. The outputs need not show it: attention on the CPU makes
    numbers of NaN."""
    for name, tensor in _adapted_weights(base, adapters):
        if not is_finite(tensor):
            raise ValueError(f"{name} of {base.name} holds NaN or infinity, so nothing can be calculated from it.")


def _adapted_weights(base: Base, adapters: Sequence[Adapter]) -> Iterator[tuple[str, Tensor]]:
    """Weights and biases of the loaded network, one at a time, by name."""
    weights = LiveBase(base.module()).weights()
    for path in dict.fromkeys(path for adapter in adapters for path in adapted_layers(adapter, base)):
        for name in (f"{path}.weight", f"{path}.bias"):
            try:
                if name in weights:
                    yield name, weights[name]
            except ValueError:  # quantised by a scheme that there is no way back from: it runs nevertheless
                continue


def _rows(
    bases: Pair,
    candidates: Mapping[str, Adapter],
    inputs: Batches,
    neutral: Batches | None,
    metrics: Sequence[Metric],
    painters: Sequence[Painter | None],
) -> list[Verified]:
    """Bare source, adapted source, bare target, then each candidate."""
    own, plain, bare = candidates["copy"], bases.source.module(), bases.target.module()
    rows = [Verified(name="bare source", metrics=_measured(metrics, plain), images=_drawn(painters[0], plain))]
    with adapted(bases.source, own) as model:
        measured, images = _measured(metrics, model), _drawn(painters[0], model)
    rows.append(Verified(name="adapted source", metrics=measured, images=images))
    rows.append(
        Verified(
            name="bare",
            agreement=compare(bases, own, None, inputs, "the bare target"),
            retention=None if neutral is None else 1.0,
            metrics=_measured(metrics, bare),
            images=_drawn(painters[1], bare),
        )
    )
    rows += [
        _look(name, candidate, bases, own, inputs, neutral, metrics, painters[1])
        for name, candidate in candidates.items()
    ]
    return rows


def _notes(bases: Pair, candidates: Mapping[str, Adapter]) -> list[str]:
    """What the recorded fingerprints say against this comparison."""
    wanted = {"copy": ("The adapter", bases.source), "transferred": ("The transferred adapter", bases.target)}
    return [
        f"{called} was made for another base than {base.name}, by the fingerprint in it."
        for name, (called, base) in wanted.items()
        if not belongs(match_base(candidates[name], base))
    ]


def _strong(rows: Sequence[Verified], denoisers: bool) -> list[str]:
    """What a denoiser's score says nothing of: siblings with guidance built in change by a multiple."""
    return [
        f"The {row.name}'s change is {row.agreement.strength:.1f} times as strong as the adapter's on its source: too much of it, "
        "unless guidance is built into the target."
        for row in rows
        if denoisers and row.agreement is not None and row.agreement.strength > STRONG
    ]


def _one_model(bases: Pair) -> bool:
    live = [base for base in (bases.source, bases.target) if isinstance(base, LiveBase)]
    return len(live) == 2 and live[0].module() is live[1].module()


def _look(
    name: str,
    candidate: Adapter,
    bases: Pair,
    own: Adapter,
    inputs: Batches,
    neutral: Batches | None,
    metrics: Sequence[Metric],
    painter: Painter | None,
) -> Verified:
    with ExitStack() as wearing:
        try:
            model = wearing.enter_context(adapted(bases.target, candidate))
        except ValueError as error:  # a copy that does not fit is a result, not a mistake
            return Verified(name=name, error=str(error))
        measured, images = _measured(metrics, model), _drawn(painter, model)
    agreement = compare(bases, own, candidate, inputs, f"the {name}")
    kept = None if neutral is None else retained(bases, candidate, neutral, f"neutral inputs, the {name}")
    return Verified(name=name, agreement=agreement, retention=kept, metrics=measured, images=images)


def _measured(metrics: Sequence[Metric], model: Any) -> dict[str, float]:
    return {name: value for metric in metrics for name, value in numbers(metric, _plain(model)).items()}


def _drawn(painter: Painter | None, model: Any) -> tuple[str, ...]:
    return () if painter is None else painter.draw(_plain(model))


def _plain(model: Any) -> Any:
    """The network itself, which PEFT has changed in place."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _its_own(adapter: Adapter, base: Base) -> Adapter:
    """Without the base's embeddings, which would overwrite those of another base for good."""
    return without_base_tensors(adapter, base) if isinstance(adapter.kind, PeftKind) else adapter
