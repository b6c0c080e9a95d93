"""What is looked at before a layer is touched: where an adapter cannot sit, and what to do instead."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any, cast

from peft import PeftWarning
from torch import nn

from xadapt.peft_internals import BaseTunerLayer, QuantizationBackend, check_mamba, get_pattern_key

from .base_layer import UnsupportedLayer, describe
from .layer import FeatureLayer
from .spaces import Space, get_space
from .tie import tie_key

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
    _check_rank(config, path, base.in_features, base.out_features, space)
    if getattr(config, "lora_bias", False) and base.bias is None:
        warnings.warn(
            f"`lora_bias=True` was passed but the targeted layer of type {type(module).__name__} has no bias. This "
            f"means that merging the adapter into {path} won't be possible.",
            PeftWarning,
            stacklevel=2,
        )


def _check_rank(config: Any, path: str, in_features: int, out_features: int, space: Space) -> None:
    patterns = getattr(config, "rank_pattern", None) or {}
    rank = patterns.get(get_pattern_key(list(patterns), path), getattr(config, "r", None))
    if not config.low_rank or not isinstance(rank, int):
        return
    widest, width = max(in_features, out_features), space.width(in_features, out_features)
    if rank > widest:
        raise ValueError(
            f"{path}: r={rank} is above the layer's width ({in_features} in, {out_features} out). Use r <= {width}, "
            "a rank_pattern for this layer, or FullAdaConfig for an update of full rank."
        )
    if rank > width:
        warnings.warn(
            f"{path}: r={rank} is above the {width} {space.feature} features it adapts; r={width} says as much.",
            stacklevel=2,
        )


def check_tie(config: Any, targets: dict[str, nn.Module], others: list[str]) -> None:
    """Raise ValueError where `tie` cannot mean what it says; `others` are the adapters that are there already."""
    widths: dict[tuple[str | None, ...], tuple[str, int]] = {}
    for path, module in targets.items():
        key = tie_key(config.tie, path)
        if key is None:
            continue
        base = describe(module.get_base_layer() if isinstance(module, BaseTunerLayer) else module)
        first, width = widths.setdefault(key, (path, base.in_features))
        if width != base.in_features:
            raise ValueError(
                f"tie={config.tie!r} ties {first} ({width} input features) to {path} ({base.in_features}): tied "
                "layers have to read the same features. Capture what tells them apart, as in r'(layers\\.\\d+)\\.'."
            )
    if not widths:
        raise ValueError(
            f"tie={config.tie!r} matches none of the {len(targets)} target layers, e.g. {next(iter(targets), None)!r}."
        )
    if others and any(not isinstance(module, FeatureLayer) for module in targets.values()):
        raise ValueError(f"With tie, every adapter of a model adapts the same layers; {others[0]!r} adapts others.")


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
