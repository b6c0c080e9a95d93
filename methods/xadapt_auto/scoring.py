"""The candidates' scores: both models run every batch, bare and adapted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from xadapt.contract import Adapter, Siblings
from xadapt.evaluating import in_eval_mode
from xadapt.verifying.behaviour import Agreement, LogProbs, Predictions, Sums
from xadapt.verifying.outputs import answer, in_strips, is_language_model
from xadapt.wearing import wearing

from .candidates import Candidate


@torch.no_grad()
def scores(
    adapter: Adapter, bases: Siblings, candidates: Mapping[str, Candidate], batches: Sequence[Any]
) -> dict[str, Agreement]:
    """How far each candidate changes the target as the adapter changed the source.

    The source's rows of a batch are calculated again for each candidate rather than kept: a vocabulary's worth of numbers for each
    token of the data is more than a model.
    """
    source, target = bases.source.module(), bases.target.module()
    found: dict[str, Agreement] = {}
    with wearing(source, adapter) as teacher:
        for name, candidate in candidates.items():
            sums: Sums = LogProbs() if is_language_model(target) else Predictions()
            with wearing(target, candidate.adapter) as student:
                for batch in batches:
                    with teacher.disable_adapter(), student.disable_adapter():
                        plain, bare = answer(source, batch), answer(target, batch)
                    _add(sums, (plain, answer(teacher, batch), bare, answer(student, batch)), batch)
            found[name] = sums.result()
    return found


@torch.no_grad()
def bare_score(adapter: Adapter, bases: Siblings, batches: Sequence[Any]) -> float:
    """The score of the target without an adapter."""
    source, target = bases.source.module(), bases.target.module()
    sums: Sums = LogProbs() if is_language_model(target) else Predictions()
    with in_eval_mode(target), wearing(source, adapter) as teacher:
        for batch in batches:
            with teacher.disable_adapter():
                plain = answer(source, batch)
            bare = answer(target, batch)
            _add(sums, (plain, answer(teacher, batch), bare, bare), batch)
    return sums.result().score


def _add(sums: Sums, outputs: tuple[Tensor, Tensor, Tensor, Tensor], batch: Mapping[str, Any]) -> None:
    for rows in in_strips(outputs, batch, isinstance(sums, LogProbs)):
        sums.add(*rows)
