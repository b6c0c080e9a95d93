"""Methods that come in three: one writes a LoRA, one an input adapter, one an output adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, cast

from xadapt.contract import Kind, Learner, Method, Transfer
from xadapt.kinds import PeftKind
from xadapt_feature import HYBRID_ADA, INPUT_ADA, OUTPUT_ADA

from .methods import LORA

Space = Literal["parameter", "input", "output"]

WRITES: Mapping[Space, PeftKind] = {
    "parameter": LORA,
    "input": cast(PeftKind, INPUT_ADA.writes),
    "output": cast(PeftKind, OUTPUT_ADA.writes),
}
"""The plain adapter in each space."""

LOW_RANK: tuple[Kind, ...] = (*WRITES.values(), HYBRID_ADA.writes)
"""Kinds whose update of a layer is of low rank."""


def in_each_space(
    name: str,
    summaries: Mapping[Space, str],
    builds: Mapping[Space, Callable[..., Transfer | Learner]],
    paper: str,
    reads: tuple[Kind, ...] = LOW_RANK,
) -> tuple[Method, ...]:
    """`name`, `name_input` and `name_output`, in the order of `builds`."""
    return tuple(
        Method(
            name=name if space == "parameter" else f"{name}_{space}",
            summary=summaries[space],
            paper=paper,
            reads=reads,
            writes=WRITES[space],
            build=build,
        )
        for space, build in builds.items()
    )
