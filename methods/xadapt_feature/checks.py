"""What is looked at before a layer is touched: where an adapter cannot sit, and what to do instead."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any, cast

from peft import PeftWarning
from torch import nn

from xadapt.errors import some
from xadapt.peft_internals import BaseTunerLayer, QuantizationBackend, check_mamba, get_pattern_key

from .base_layer import BaseLayer, UnsupportedLayer, describe
from .layer import FeatureLayer
from .spaces import Space, get_space
from .tie import groups_of, tie_key, tied_groups

# PEFT's checks that go by the PEFT type: what cannot carry a LoRA cannot carry Φ.
AS_LORA = cast(Any, SimpleNamespace(peft_type="LORA"))


def check_target(
    config: Any,
    path: str,
    module: nn.Module,
    model: nn.Module,
    layer_cls: type[FeatureLayer],
    backend: QuantizationBackend | None,
) -> None:
    """Raise ValueError where this adapter cannot sit on this layer."""
    space = get_space(config.space)
    if isinstance(module, FeatureLayer):
        if module.space.name != space.name:
            raise ValueError(
                f"{path} carries an adapter in {module.space.name} space, and this one is for {space.name} space: "
                "the two do not add up on one layer. Merge or unload the first, or train both in one space."
            )
        if not isinstance(module, layer_cls):
            raise ValueError(
                f"{path} carries an adapter of another kind ({type(module).__name__}, not "
                f"{layer_cls.__name__}). Merge or unload it first, or train both with one kind of config."
            )
        return
    if isinstance(module, BaseTunerLayer):
        raise ValueError(
            f"{path} already carries a {type(module).__module__.split('.')[-2]} adapter. Merge or unload it first; "
            "HybridAdaConfig combines LoRA with adaptation in feature space."
        )
    parent = model.get_submodule(path.rpartition(".")[0])
    if isinstance(parent, nn.MultiheadAttention):
        raise ValueError(
            f"{path} belongs to nn.MultiheadAttention, which reads its weight without calling the layer, so an "
            "adapter there would be ignored. Leave it out with exclude_modules."
        )
    check_mamba(AS_LORA, model, path.rpartition(".")[-1])
    try:
        base = describe(module, backend=backend)
        base.check(space)
    except ValueError as error:
        refusal = type(error) if isinstance(error, UnsupportedLayer) else ValueError
        raise refusal(f"{path}: {error}") from None
    _check_rank(config, path, base, space)
    if getattr(config, "lora_bias", False) and base.bias is None:
        warnings.warn(
            f"`lora_bias=True` was passed but the targeted layer of type {type(module).__name__} has no bias. This "
            f"means that merging the adapter into {path} won't be possible.",
            PeftWarning,
            stacklevel=2,
        )


def _check_rank(config: Any, path: str, base: BaseLayer, space: Space) -> None:
    width = space.width(base.in_features, base.out_features)
    patterns = getattr(config, "rank_pattern", None) or {}
    for name in config.ranks:
        rank = patterns.get(get_pattern_key(list(patterns), path), getattr(config, name))
        if rank > base.widest:
            raise ValueError(
                f"{path}: {name}={rank} is above the layer's width ({base.in_features} in, {base.out_features} out). Use "
                f"{name} <= {width}, a rank_pattern for this layer, or FullAdaConfig for an update of full rank."
            )
        if rank > width and config.low_rank:
            warnings.warn(
                f"{path}: {name}={rank} is above the {width} {space.feature} features it adapts; {name}={width} says as "
                "much.",
                stacklevel=2,
            )


def check_tie(config: Any, targets: dict[str, nn.Module], model: nn.Module) -> None:
    """Raise ValueError where `tie` cannot mean what it says, or says something else than the adapters that are there."""
    tie = getattr(config, "tie", None)
    groups = groups_of(tie, targets)
    if tie:
        if targets and not any(tie_key(tie, path) for path in targets):
            raise ValueError(
                f"tie={tie!r} matches none of the {len(targets)} target layers, e.g. {next(iter(targets))!r}."
            )
        for group in groups:
            _check_group(config, group, targets)
        if targets and len(groups) == len(targets):
            warnings.warn(
                f"tie={tie!r} ties no two of the {len(targets)} target layers: each has an adapter of its own. Layers are "
                "tied where the captured groups are equal, so what tells them apart must not be captured: "
                f"r'(layers\\.\\d+)\\.' makes one group of each block.",
                stacklevel=2,
            )
    there = tied_groups(model)
    for group in groups:
        taken = next((there[path] for path in group if path in there), group)
        if set(taken) != set(group):
            raise ValueError(
                f"{_and(taken)} {'share one adapter' if len(taken) > 1 else 'has an adapter of its own'}, and with this "
                f"one {_and(group)} would {'share one' if len(group) > 1 else 'have one of its own'}. All adapters of a "
                "layer are tied alike: name the same layers in target_modules and tie them the same way, or delete the "
                "adapters there first."
            )


def _check_group(config: Any, group: list[str], targets: dict[str, nn.Module]) -> None:
    """Raise ValueError where these layers cannot share one adapter."""
    first = group[0]
    widths = {path: describe(_base(targets[path])).in_features for path in group}
    for path, width in widths.items():
        if width != widths[first]:
            raise ValueError(
                f"tie={config.tie!r} ties {first} ({widths[first]} input features) to {path} ({width}): tied "
                "layers have to read the same features. Capture what tells them apart, as in r'(layers\\.\\d+)\\.'."
            )
    alpha = getattr(config, "lora_alpha", getattr(config, "alpha", None))
    for name, default in (("rank_pattern", getattr(config, "r", None)), ("alpha_pattern", alpha)):
        patterns = getattr(config, name, None) or {}
        values = {path: patterns.get(get_pattern_key(list(patterns), path), default) for path in group}
        for path, value in values.items():
            if value != values[first]:
                raise ValueError(
                    f"{name} gives {value} to {path} and {values[first]} to {first}, but tie={config.tie!r} makes them "
                    f"share one adapter ({_and(group)}). Give them the same value, or tie them to other layers."
                )


def _base(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _and(paths: list[str]) -> str:
    return some(paths, limit=4)


def adaptable(config: Any, model: nn.Module) -> str:
    """The names that target_modules could have said."""
    names: dict[str, None] = {}
    for path, module in model.named_modules():
        try:
            describe(module).check(get_space(config.space))
        except ValueError:
            continue
        names[path.rpartition(".")[-1]] = None
    return f"Layers here that {config.space} adaptation can act on: {', '.join(names) or 'none'}."
