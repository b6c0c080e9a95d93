"""One setting for all methods: rank 4 on one layer of 64 features; what a method needs beside that stands here."""

from __future__ import annotations

import dataclasses
from typing import Any

from peft import PeftConfig

from xadapt.peft_internals import PEFT_TYPE_TO_CONFIG_MAPPING, PeftType

FEATURES = 64
RANK = 4

# Arguments without which a method does not run on a layer of this width.
NEEDED: dict[str, dict[str, Any]] = {
    "ADALORA": {"init_r": RANK, "target_r": RANK, "total_step": 10},
    "ADAMSS": {"num_subspaces": 2},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 8},
    "FOURIERFT": {"n_frequency": 32},
    "GRALORA": {"gralora_k": 2},
    "IA3": {"feedforward_modules": []},
    "OFT": {"oft_block_size": 4, "r": 0},
    "ROAD": {"group_size": 8},
    "UNILORA": {"theta_d_length": 64},
    "VBLORA": {"vector_length": 4, "num_vectors": 8, "topk": 2},
    "WAVEFT": {"n_frequency": 32},
}


def config(method: str, target_modules: list[str], **options: Any) -> PeftConfig:
    """The method's config at the common setting."""
    config_cls: Any = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(method)]
    fields = {field.name for field in dataclasses.fields(config_cls)}
    common = {"r": RANK} if "r" in fields else {}
    made: PeftConfig = config_cls(target_modules=target_modules, **{**common, **NEEDED.get(method, {}), **options})
    return made
