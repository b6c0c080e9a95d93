"""The five models on the same inputs, a batch at a time: bare and adapted source, bare target, and the target with an adapter."""

from __future__ import annotations

from peft import PeftModel

from xadapt.contract import Adapter, Siblings
from xadapt.data.batches import Batches
from xadapt.data.denoisers import is_denoiser
from xadapt.progress import track

from .behaviour import Agreement, LogProbs, Predictions, Retention
from .models import adapted
from .outputs import answer, in_strips


def compare(bases: Siblings, adapter: Adapter, candidate: Adapter | None, data: Batches, title: str) -> Agreement:
    """How far `candidate` changes the target as `adapter` changes the source. No candidate: the bare target.

    Raises:
        ValueError: one of them cannot be loaded, or the outputs cannot be compared.
    """
    sums = Predictions() if is_denoiser(bases.target) else LogProbs()
    with adapted(bases.source, adapter) as source:
        if candidate is None:
            _run(bases, source, None, data, sums, title)
        else:
            with adapted(bases.target, candidate) as target:
                _run(bases, source, target, data, sums, title)
    return sums.result()


def retained(bases: Siblings, candidate: Adapter, neutral: Batches, title: str) -> float:
    """How much of the bare target's behaviour is left on inputs that are not the adapter's business."""
    kept = Retention(probabilities=not is_denoiser(bases.target))
    with adapted(bases.target, candidate) as target:
        for batch in track(neutral.batches, title):
            with target.disable_adapter():
                own = answer(target, batch)
            for rows in in_strips((own, answer(target, batch)), batch, kept.probabilities):
                kept.add(*rows)
    return kept.result()


def _run(
    bases: Siblings,
    source: PeftModel,
    target: PeftModel | None,
    data: Batches,
    sums: LogProbs | Predictions,
    title: str,
) -> None:
    for batch in track(data.batches, title):
        with source.disable_adapter():
            outputs = [answer(source, batch)]
        outputs.append(answer(source, batch))
        if target is None:
            outputs += [answer(bases.target.module(), batch)] * 2
        else:
            with target.disable_adapter():
                outputs.append(answer(target, batch))
            outputs.append(answer(target, batch))
        for rows in in_strips(tuple(outputs), batch, isinstance(sums, LogProbs)):
            sums.add(*rows)
