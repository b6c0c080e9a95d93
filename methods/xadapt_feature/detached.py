"""What an adapter in feature space adds to each layer of a base, from its tensors alone: no model is built for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from peft import PeftConfig
from torch import Tensor

from xadapt.factors import Factors, factors_of, is_plain, scaling_of
from xadapt.update import Fold, Update, calculating_in, total

from .config import InputAdaConfig, OutputAdaConfig
from .hybrid import HybridAdaConfig
from .phi import Phi
from .spaces import Space, get_space


def updates(config: PeftConfig, tensors: Mapping[str, Tensor]) -> Mapping[str, Fold] | None:
    """The fold of each layer, or None where the tensors do not tell: hosted methods, LoRA's variants, ties, constants.

    A tie's followers are known only from the base's module names, and whether a constant is a bias depends on its padding.
    """
    if not isinstance(config, (InputAdaConfig, OutputAdaConfig, HybridAdaConfig)):
        return None
    if not is_plain(config) or getattr(config, "tie", None) or config.lora_bias:
        return None
    space = get_space(config.space)
    if isinstance(config, HybridAdaConfig):
        return _hybrid(config, space, tensors)
    factors = factors_of(config, tensors, f".{config.type_name.lower()}_phi")
    return None if factors is None else {path: partial(_fold, space, found) for path, found in factors.items()}


def _hybrid(config: HybridAdaConfig, space: Space, tensors: Mapping[str, Tensor]) -> Mapping[str, Fold] | None:
    phi_name, beside = f".{config.type_name.lower()}_phi", ".parameter_space"
    feature = factors_of(config, {n: t for n, t in tensors.items() if beside not in n}, phi_name)
    parameter = factors_of(config, {n: t for n, t in tensors.items() if beside in n}, beside + phi_name)
    if feature is None or parameter is None or feature.keys() != parameter.keys():
        return None

    def whole(path: str, factors: Factors) -> Factors:  # both parts have the scaling of the rank in total
        return replace(factors, scaling=scaling_of(config, path, config.r))

    return {
        path: partial(_fold_hybrid, space, whole(path, feature[path]), whole(path, parameter[path])) for path in feature
    }


def _fold(space: Space, factors: Factors, weight: Tensor, bias: Tensor | None) -> Update:
    like = calculating_in(weight)
    return space.update(weight, bias, Phi(factors.matrix(like), factors.offset(like)))


def _fold_hybrid(space: Space, feature: Factors, parameter: Factors, weight: Tensor, bias: Tensor | None) -> Update:
    beside = Update(parameter.matrix(calculating_in(weight)))
    return total([_fold(space, feature, weight, bias), beside])
