"""Read LoRA files: PEFT folders, diffusers files of any age, kohya/sd-scripts files."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor

from xadapt.errors import some
from xadapt.factors import VARIANTS, alpha_of, rank_of, scaling_of
from xadapt.layouts.minimal import minimal_config
from xadapt.layouts.names import from_kohya, in_base, split_component, to_peft_name
from xadapt.layouts.opening import Opened, open_lora
from xadapt.layouts.plain import LoraFile, PlainLora, rank_between, split

_KOHYA = re.compile(r"(?P<layer>lora_[a-z0-9]+_[^.]+)\.(?P<parameter>.+)")
_METADATA = "lora_adapter_metadata"  # diffusers' LORA_ADAPTER_METADATA_KEY
_PEFT_PREFIX = "base_model.model."
_OTHER_METHODS = {
    "hada_w": "LoHa",
    "lokr_w": "LoKr",
    "oft_": "OFT",
    "glora": "GLoRA",
    ".ia3": "IA3",
    ".diff": "a full difference",
    "lora_mid": "a LoRA with a third (Tucker) factor",
}
# What makes a LoRA config mean another function than B A; none of it changes the tensors' names.
_CAN_BE_SAID = ("use_dora", "trainable_token_indices")  # of the variants, what a layout can hold or names by its keys
_NOT_PLAIN = tuple(name for name in VARIANTS if name not in _CAN_BE_SAID)
_CARRIED = ("task_type", "base_model_name_or_path", "revision", "fan_in_fan_out", "auto_mapping", "inference_mode")


@dataclass
class _Draft:
    """One component while its file is read."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    scalings: dict[str, float] = field(default_factory=dict)  # by module path, where the file gives one
    options: dict[str, Any] = field(default_factory=dict)
    alphas: dict[str, str] = field(default_factory=dict)  # the key each layer's alpha was read from
    sources: dict[str, str] = field(default_factory=dict)  # the key each tensor was read from

    def add(self, name: str, tensor: Tensor, source: str) -> None:
        if name in self.tensors:
            raise ValueError(
                f"{self.sources[name]} and {source} are both {name}: the file holds that layer twice. "
                "Keep one of the two, or the sum of their products would be lost."
            )
        self.tensors[name], self.sources[name] = tensor, source


def read_lora(
    path: str | PathLike[str],
    *,
    allow_pickle: bool = False,
    partial: bool = False,
    modules: Mapping[str, Collection[str]] | None = None,
    layers_per_block: int = 2,
) -> LoraFile:
    """A LoRA per component of what PEFT, diffusers or sd-scripts wrote.

        read_lora("style.safetensors").components["unet"].tensors

    Args:
        path: the file, or a folder that holds one.
        allow_pickle: whether a .bin, .pt or .ckpt may be opened, with `torch.load(weights_only=True)`.
        partial: keep what is understood, and list the rest in `.not_understood`, instead of raising.
        modules: the module names of the base's components, as `named_modules()` gives them. Layers are then named as that
            base names them (transformers 5 drops CLIP's `text_model.`), `target_modules` is short, and a layer that the
            base does not have counts as not understood.
        layers_per_block: of the U-Net, where a kohya file names its blocks as SDXL's own code does; 2 in SDXL.

    Raises:
        ValueError: the file cannot be read, is no LoRA, is damaged, or holds tensors that are not understood.
    """
    opened = open_lora(path, allow_pickle)
    if opened.config is not None:
        layout, drafts, unread = "peft", *_read_peft(opened, opened.config)
    elif any((match := _KOHYA.fullmatch(key)) and "lora_A" not in match["parameter"] for key in opened.tensors):
        layout, drafts, unread = "kohya", *_read_kohya(opened.tensors, layers_per_block)
    else:
        layout, drafts, unread = "diffusers", *_read_diffusers(opened)
    components = {}
    for component in sorted(drafts):
        names = _modules_of(component, modules)
        lora, strangers = _finish(drafts[component], names)
        unread.extend(strangers)
        if lora is not None:
            components[component] = lora
    not_understood = tuple(sorted(set(unread)))
    if not_understood and (not partial or not components):
        raise ValueError(_complaint(opened, not_understood, bool(components)))
    return LoraFile(components, not_understood, layout)


def _modules_of(component: str, modules: Mapping[str, Collection[str]] | None) -> Collection[str] | None:
    return None if modules is None else modules.get(component)


def _read_kohya(tensors: Mapping[str, Tensor], layers_per_block: int) -> tuple[dict[str, _Draft], list[str]]:
    drafts: dict[str, _Draft] = {}
    unread, layers = [], dict[str, dict[str, Tensor]]()
    for key, tensor in tensors.items():
        match = _KOHYA.fullmatch(key)
        if match is None:
            unread.append(key)
        else:
            layers.setdefault(match["layer"], {})[match["parameter"]] = tensor
    for name, layer in layers.items():
        keys = [f"{name}.{parameter}" for parameter in layer]
        if not layer.keys() <= {"lora_down.weight", "lora_up.weight", "alpha", "dora_scale"} or len(layer) == 1:
            if layer.keys() in ({"lora_down.weight"}, {"lora_up.weight"}):
                _rank_of_kohya(name, layer)
            unread.extend(keys)
            continue
        rank = _rank_of_kohya(name, layer)
        down, up = layer["lora_down.weight"], layer["lora_up.weight"]
        scaling = _number(layer["alpha"], f"{name}.alpha") / rank if "alpha" in layer else 1.0
        found = from_kohya(name, down, up, layers_per_block)
        # FLUX's converter splits rows and swaps halves; it knows no DoRA, so its magnitudes would not follow.
        magnitudes = {
            at: None if at[0] == "transformer" else _magnitude(layer.get("dora_scale"), b)
            for at, (_, b) in found.items()
        }
        if not found or ("dora_scale" in layer and None in magnitudes.values()):
            unread.extend(keys)
            continue
        for (component, path), (a, b) in found.items():
            draft = drafts.setdefault(component, _Draft())
            draft.add(f"{path}.lora_A.weight", a, f"{name}.lora_down.weight")
            draft.add(f"{path}.lora_B.weight", b, f"{name}.lora_up.weight")
            draft.scalings[path] = scaling
            if "alpha" in layer:
                draft.alphas[path] = f"{name}.alpha"
            magnitude = magnitudes[component, path]
            if magnitude is not None:
                draft.add(f"{path}.lora_magnitude_vector", magnitude, f"{name}.dora_scale")
    return drafts, unread


def _rank_of_kohya(name: str, layer: Mapping[str, Tensor]) -> int:
    spelled = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}
    return rank_between(name, {spelled.get(parameter, parameter): tensor for parameter, tensor in layer.items()})


def _magnitude(scale: Tensor | None, up: Tensor) -> Tensor | None:
    """A DoRA scale as PEFT's magnitude: one number per output. Some trainers write one per input, which is another norm."""
    if scale is None or scale.dim() == 0 or scale.shape[0] != up.shape[0] or scale.numel() != up.shape[0]:
        return None
    return scale.reshape(-1) if up.dim() == 2 else scale.reshape(1, -1, *[1] * (up.dim() - 2))


def _number(tensor: Tensor, key: str) -> float:
    if tensor.numel() != 1:
        raise ValueError(f"{key} should be one number; it has the shape {tuple(tensor.shape)}.")
    return float(tensor.item())


def _read_diffusers(opened: Opened) -> tuple[dict[str, _Draft], list[str]]:
    drafts: dict[str, _Draft] = {}
    unread, alphas = [], dict[tuple[str, str], tuple[str, float]]()
    if any(key.startswith(_PEFT_PREFIX) for key in opened.tensors):
        raise ValueError(
            f"{opened.path} holds PEFT's tensors, but no adapter_config.json lies beside it, so its alpha is unknown: "
            "keep adapter_model.safetensors and adapter_config.json together in one folder, and give that."
        )
    for key, tensor in opened.tensors.items():
        component, rest = split_component(key)
        if rest.endswith(".alpha"):
            path = split(to_peft_name(component, rest.removesuffix(".alpha") + ".lora_A.weight"))[0]
            alphas[component, path] = (key, _number(tensor, key))
            continue
        name = to_peft_name(component, rest).replace(".lora_magnitude_vector.weight", ".lora_magnitude_vector")
        if split(name)[1]:
            drafts.setdefault(component, _Draft()).add(name, tensor, key)
        else:
            unread.append(key)
    for (component, path), (key, alpha) in alphas.items():
        a = drafts[component].tensors.get(f"{path}.lora_A.weight") if component in drafts else None
        if a is None:
            unread.append(key)
        else:
            drafts[component].scalings[path] = alpha / a.shape[0]
            drafts[component].alphas[path] = key
    metadata = _metadata(opened)
    for component, draft in drafts.items():
        start = f"{component}." if component else ""
        config = {key.removeprefix(start): value for key, value in metadata.items() if key.startswith(start)}
        if "r" in config:
            _apply_config(draft, config, opened)
    return drafts, unread


def _metadata(opened: Opened) -> dict[str, Any]:
    raw = opened.metadata.get(_METADATA)
    if raw is None:
        return {}
    try:
        metadata = json.loads(raw)
    except ValueError as error:
        raise ValueError(f"{opened.path}: its {_METADATA} is not JSON ({error}); save the LoRA again.") from error
    if not isinstance(metadata, dict):
        raise ValueError(f"{opened.path}: its {_METADATA} is no mapping; save the LoRA again.")
    return metadata


def _read_peft(opened: Opened, config: Mapping[str, Any]) -> tuple[dict[str, _Draft], list[str]]:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{opened.path.parent} is an adapter of type {kind!r}, no plain LoRA; export it to one first.")
    draft, unread = _Draft(), []
    for key, tensor in opened.tensors.items():
        name = key.removeprefix(_PEFT_PREFIX)
        if split(name)[1]:
            draft.add(name, tensor, key)
        else:
            unread.append(key)
    draft.options = {name: config[name] for name in _CARRIED if config.get(name) is not None}
    _apply_config(draft, config, opened)
    return {"": draft}, unread


def _apply_config(draft: _Draft, given: Mapping[str, Any], opened: Opened) -> None:
    """The scalings that a LoraConfig in a file gives the layers."""
    odd = [name for name in _NOT_PLAIN if given.get(name)]
    if odd or given.get("init_lora_weights") not in (None, True, False, "gaussian", "orthogonal", "eva"):
        what = (
            ", ".join(odd) or f"init_lora_weights={given.get('init_lora_weights')!r}, which changes the base's weights"
        )
        raise ValueError(f"{opened.path} is no plain LoRA: its config has {what}. Merge it with PEFT instead.")
    ranks = {}
    try:
        config = LoraConfig(
            r=int(given["r"]),
            lora_alpha=given.get("lora_alpha", 8),
            rank_pattern=dict(given.get("rank_pattern") or {}),
            alpha_pattern=dict(given.get("alpha_pattern") or {}),
            use_rslora=bool(given.get("use_rslora")),
        )
        for path in _paths(draft.tensors):
            ranks[path] = rank_of(config, path)
            draft.scalings[path] = scaling_of(config, path, ranks[path])
            if not math.isfinite(draft.scalings[path]):
                raise ValueError(f"lora_alpha is {alpha_of(config, path)}")
    except (TypeError, ValueError, KeyError, ArithmeticError, re.error) as error:
        raise ValueError(f"{opened.path}: its config cannot be used ({error!r}); save the LoRA again.") from error
    for path, rank in ranks.items():
        _check_rank(draft, path, rank, opened)


def _check_rank(draft: _Draft, path: str, rank: int, opened: Opened) -> None:
    for side in ("lora_A.weight", "lora_embedding_A"):
        tensor = draft.tensors.get(f"{path}.{side}")
        if tensor is not None and tensor.shape[0] != rank:
            raise ValueError(
                f"{opened.path}: {path} has tensors of rank {tensor.shape[0]}, but its config says {rank} "
                "(r, rank_pattern). Config and tensors are not of one LoRA; save it again."
            )


def _paths(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(split(name)[0] for name in names))


def _finish(draft: _Draft, modules: Collection[str] | None) -> tuple[PlainLora | None, list[str]]:
    """The component's LoRA, and the keys of those layers that have no place in it."""
    layers = dict[str, dict[str, Tensor]]()
    for name, tensor in draft.tensors.items():
        path, parameter = split(name)
        layers.setdefault(path, {})[parameter] = tensor
    named = {path: path if modules is None else in_base(path, modules) for path in layers}
    # PEFT knows DoRA for all layers or for none: a layer without magnitude would get the base's norm for one.
    has_dora = sum("lora_magnitude_vector" in layer for layer in layers.values())
    mixed = 0 < has_dora < len(layers)
    dora = has_dora > 0 and not mixed
    tensors, table, strangers = {}, dict[str, tuple[int, float]](), []
    for path, layer in layers.items():
        rank = rank_between(path, layer)
        place = named[path]
        if place is None or (mixed and "lora_magnitude_vector" in layer):
            strangers += [draft.sources[f"{path}.{parameter}"] for parameter in layer]
            strangers += [draft.alphas[path]] if path in draft.alphas else []
            continue
        if place in table:
            raise ValueError(f"Two layers of the file are {place} in the base, {path} for one; keep one of them.")
        alpha = draft.scalings.get(path, 1.0) * rank
        table[place] = (rank, float(f"{alpha:.12g}"))  # alpha / rank * rank may miss alpha by its last bit
        tensors.update({f"{place}.{parameter}": _own(tensor) for parameter, tensor in layer.items()})
    if not table:
        return None, strangers
    bias = any(name.endswith(".lora_B.bias") for name in tensors)
    options = draft.options | {"use_dora": dora, "lora_bias": bias}
    return PlainLora(minimal_config(table, modules, **options), tensors), strangers


def _own(tensor: Tensor) -> Tensor:
    """Fused layers come apart as views of one tensor, which safetensors does not write."""
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _complaint(opened: Opened, keys: tuple[str, ...], has_rest: bool) -> str:
    kinds = [kind for mark, kind in _OTHER_METHODS.items() if any(mark in key for key in keys)]
    if not has_rest and kinds:
        return (
            f"{opened.path} is no LoRA, but {' and '.join(kinds)}: {some(keys)}. Merge it with the tool that made it."
        )
    count = f"{len(keys)} of {len(opened.tensors)} tensors in {opened.path} were not understood"
    hint = " partial=True reads the others and lists these." if has_rest else " It is no LoRA of a layout xadapt knows."
    also = f" ({' and '.join(kinds)})" if kinds else ""
    return f"{count}{also}: {some(keys)}.{hint}"
