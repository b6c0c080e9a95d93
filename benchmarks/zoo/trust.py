"""verify's label-free comparison of two changes of behaviour, on models that have their adapters merged."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from xadapt.verifying.behaviour import Agreement, LogProbs, Predictions

Rows = Sequence[Tensor]  # per batch, what a model does: (rows, width)


def compare(part: str, source: Rows, adapted: Rows, target: Rows, carried: Rows) -> Agreement:
    """How far `carried` is to `target` as `adapted` is to `source`: each batch by batch on the same inputs.

    Raises:
        ValueError: the shapes differ, there is NaN, or the adapter changes nothing on the source.
    """
    sums = LogProbs() if part == "lm" else Predictions()
    for rows in zip(source, adapted, target, carried, strict=True):
        sums.add(*rows)
    return sums.result()


def same_answers(adapted: Rows, carried: Rows) -> float:
    """The share of rows whose largest entry is in the same place: of language models, how often both would say the same next."""
    same = sum(int((one.argmax(-1) == other.argmax(-1)).sum()) for one, other in zip(adapted, carried, strict=True))
    return same / sum(map(len, adapted))
