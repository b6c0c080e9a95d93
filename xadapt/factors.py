"""The factors of a LoRA, read from its config and tensors without a model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor

from xadapt.errors import some
from xadapt.matrix import LowRank
from xadapt.patterns import first_key
from xadapt.peft_internals import check_target_module_exists

# Options under which lora_A and lora_B mean something else than s·B(Ax), or more than these two matter.
VARIANTS = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "megatron_config",
)


@dataclass(frozen=True)
class Factors:
    """s·BAx + c on some features; A may be a convolution's (r, in, *kernel)."""

    a: Tensor  # (r, in, *kernel)
    b: Tensor  # (out, r)
    scaling: float
    bias: Tensor | None  # (out,), before scaling

    def matrix(self, like: Tensor) -> LowRank:
        """s·BA as (out, in·kernel), in the dtype and on the device of `like`."""
        return LowRank(self.b.to(like) * self.scaling, self.a.to(like).flatten(1))

    def offset(self, like: Tensor) -> Tensor | None:
        """s·c, or None where the adapter has no bias of its own."""
        return None if self.bias is None else self.bias.to(like) * self.scaling


def is_plain(config: PeftConfig) -> bool:
    """Whether this LoRA's factors say all there is to say about it."""
    return not any(getattr(config, name, None) for name in VARIANTS)


def scaling_of(config: Any, path: str, rank: int) -> float:
    """PEFT's rule: alpha/r, or alpha/√r with use_rslora."""
    return alpha_of(config, path) / (math.sqrt(rank) if config.use_rslora else rank)


def rank_of(config: Any, path: str) -> int:
    """The rank that a config gives a layer: rank_pattern comes before r."""
    rank: int = _by_pattern(config.rank_pattern, path, config.r)
    return rank


def alpha_of(config: Any, path: str) -> float:
    """The alpha that a config gives a layer: alpha_pattern comes before lora_alpha."""
    alpha: float = _by_pattern(config.alpha_pattern, path, config.lora_alpha)
    return alpha


def _by_pattern(given: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    patterns = given or {}
    key = first_key(patterns, path)
    return default if key is None else patterns[key]


def factors_of(config: Any, tensors: Mapping[str, Tensor], inside: str = "") -> dict[str, Factors] | None:
    """The factors by module path, or None if a tensor is of another sort.

    Args:
        config: a LoraConfig, or one that has its rank and alpha options.
        tensors: by module path + `inside` + `.lora_A.weight`, …
        inside: what lies between a layer's path and the LoRA's names.

    Raises:
        ValueError: the tensors are not those of this config: their ranks are others, or they are for layers that it does not target.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        path, found, part = name.partition(f"{inside}.lora_")
        if not found or part not in ("A.weight", "B.weight", "B.bias", "embedding_A", "embedding_B"):
            return None
        parts.setdefault(path, {})[part.replace("embedding_A", "A.weight").replace("embedding_B", "B.weight")] = tensor
    if not all({"A.weight", "B.weight"} <= found.keys() for found in parts.values()):
        return None
    factors = {path: _one(config, path, found) for path, found in parts.items()}
    _check_targets(config, factors)
    _check_ranks(config, factors, inside)
    return factors


def _check_targets(config: Any, paths: Iterable[str]) -> None:
    """Refuses layers that PEFT would leave out on every base. The names are those of the model on which both were saved."""
    targets = getattr(config, "target_modules", None)
    if not targets or targets == "all-linear" or getattr(config, "ensure_weight_tying", False):
        return  # which layers these are, beside those with names, a base alone tells
    strange = [path for path in paths if not check_target_module_exists(config, path)]
    if strange:
        raise ValueError(
            f"The adapter has tensors for layers that its config does not target, and PEFT leaves them out: {some(strange)}. "
            "Config and tensors are not of one adapter: save it again, or name these layers in target_modules of "
            "adapter_config.json if they belong to it."
        )


def _check_ranks(config: Any, factors: Mapping[str, Factors], inside: str) -> None:
    """Refuses tensors of another rank than the config says, which PEFT does not load: their scaling would be another one too."""
    said = {path: _rank_said(config, path, inside) for path in factors}
    others = [
        f"{path} has rank {found.a.shape[0]}, and its config says {said[path]}"
        for path, found in factors.items()
        if found.a.shape[0] != said[path]
    ]
    if others:
        raise ValueError(
            f"The adapter's tensors have other ranks than its config says (r, rank_pattern): {some(others, separator='; ')}. "
            "Config and tensors are not of one adapter: save it again, or correct adapter_config.json."
        )


def _rank_said(config: Any, path: str, inside: str) -> int:
    """The rank of these tensors by the config. Of a hybrid's r, one part acts in the feature space and the rest beside it."""
    feature_r: int | None = getattr(config, "feature_r", None)
    if feature_r is None:
        return rank_of(config, path)
    return int(config.r) - feature_r if inside.startswith(".parameter_space") else feature_r


def _one(config: Any, path: str, parts: Mapping[str, Tensor]) -> Factors:
    a, b = parts["A.weight"], parts["B.weight"]
    if a.shape[0] != b.shape[1]:
        raise ValueError(
            f"{path}: lora_A has rank {a.shape[0]} and lora_B has rank {b.shape[1]}. Either the adapter is damaged (save it "
            "again), or it is for a convolution with groups, which PEFT cannot merge either."
        )
    b = torch.flatten(b, 1) if b.ndim > 2 else b  # a convolution's is (out, r, 1, 1)
    return Factors(a, b, scaling_of(config, path, a.shape[0]), parts.get("B.bias"))
