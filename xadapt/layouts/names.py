"""What kohya and old diffusers names mean, asked of diffusers' own converters one layer at a time.

They are made for whole files and drop, guess or mix up what they do not know: DoRA scales, the blocks of a file in two
spellings, `input_blocks_1` beside `input_blocks_10`, alphas of attention layers. Given one layer without its alpha, they
have nothing left but its names; what comes out is then held against the names such a component can have.
"""

from __future__ import annotations

import copy
import importlib
import re
from collections.abc import Collection, Iterable, Mapping
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

UNET = re.compile(
    r"conv_in|conv_out|(time|add)_embedding\.linear_[12]"
    r"|(down_blocks\.\d+|mid_block|up_blocks\.\d+)\."
    r"(resnets\.\d+\.(conv1|conv2|conv_shortcut|time_emb_proj)|(down|up)samplers\.\d+\.conv"
    r"|attentions\.\d+\.(proj_in|proj_out|transformer_blocks\.\d+\.(attn[12]\.(to_[qkv]|to_out\.0)|ff\.net\.(0\.proj|2))))"
)
CLIP = re.compile(r"(text_model\.)?encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])|text_projection")
_FLUX = re.compile(
    r"lora_unet_((double|single)_blocks_\d+_|img_in|txt_in|time_in_|vector_in_|guidance_in_|final_layer_)"
)
_STABLE_DIFFUSION = re.compile(r"lora_(unet|te|te1|te2)_")
_OLD_CLIP = "text_model."  # which transformers 5 has dropped
COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")

Sides = tuple[Tensor, Tensor]  # A and B


def from_kohya(name: str, down: Tensor, up: Tensor, layers_per_block: int) -> dict[tuple[str, str], Sides]:
    """A and B by (component, module path): one layer, or the several a fused FLUX layer is made of; empty if the name is
    not understood."""
    loaders = diffusers("loaders.lora_pipeline")
    try:
        if _FLUX.match(name):
            state = _flux(loaders.FluxLoraLoaderMixin, name, down, up)
        elif _STABLE_DIFFUSION.match(name):
            state = _stable_diffusion(loaders.StableDiffusionLoraLoaderMixin, name, down, up, layers_per_block)
        else:
            return {}
    except (ValueError, KeyError, IndexError, AssertionError, AttributeError):  # what the converters end in
        return {}
    paths: dict[tuple[str, str], Sides] = {}
    for key, a in state.items():
        if key.endswith(".lora_A.weight"):
            component, path = split_component(key.removesuffix(".lora_A.weight"))
            paths[component or "transformer", path] = (a, state[f"{key.removesuffix('.lora_A.weight')}.lora_B.weight"])
    known = {"unet": UNET, "text_encoder": CLIP, "text_encoder_2": CLIP}
    if any(component in known and not known[component].fullmatch(path) for component, path in paths):
        return {}  # the converters make some name of any name
    return paths


def split_component(key: str) -> tuple[str, str]:
    """("unet", "down_blocks.0…"), or ("", the key) where no component is named."""
    first, _, rest = key.partition(".")
    return (first, rest) if first in COMPONENTS and rest else ("", key)


def in_base(path: str, modules: Collection[str]) -> str | None:
    """What a base with these modules calls a layer: transformers 5 has dropped CLIP's `text_model.`."""
    names = (path, path.removeprefix("text_model."), f"text_model.{path}")
    return next((name for name in names if name in modules), None)


def places_in(paths: Iterable[str], modules: Collection[str]) -> dict[str, str]:
    """What a base with these modules calls each layer; the name it has where the base has none for it.

    Raises:
        ValueError: two of them are one layer.
    """
    places, owners = dict[str, str](), dict[str, str]()
    for path in paths:
        place = in_base(path, modules) or path
        if owners.setdefault(place, path) != path:
            raise ValueError(
                f"{owners[place]} and {path} are both {place} in the base: the adapter holds that layer twice. "
                "Keep one of the two, or the sum of their updates would be lost."
            )
        places[path] = place
    return places


def named_as_in(config: Any, tensors: Mapping[str, Tensor], modules: Collection[str]) -> tuple[Any, dict[str, Tensor]]:
    """An adapter's config and tensors with the layer names of a base with these modules.

    Raises:
        ValueError: two of its layers are one in the base.
    """
    owners = {name: _owner(name, modules) for name in tensors}
    places = places_in(dict.fromkeys(owner for owner in owners.values() if owner), modules)
    renamed = {f"{places.get(owners[name], '')}{name.removeprefix(owners[name])}": t for name, t in tensors.items()}
    moved = [path for path, place in places.items() if path != place]
    if not moved:
        return config, renamed
    drops, config = moved[0].startswith(_OLD_CLIP), copy.deepcopy(config)
    for option in ("rank_pattern", "alpha_pattern"):
        if pattern := getattr(config, option, None):
            setattr(config, option, {_pattern_in(key, drops): value for key, value in pattern.items()})
    targets = getattr(config, "target_modules", None)
    if isinstance(targets, (list, set)):
        config.target_modules = {name.removeprefix(_OLD_CLIP) if drops else name for name in targets}
    elif targets and targets != "all-linear":
        config.target_modules = re.sub(r"text_model\\?\.", "", targets) if drops else rf"(text_model\.)?({targets})"
    return config, renamed


def _owner(name: str, modules: Collection[str]) -> str:
    """The longest part of a tensor's name that is a module of the base, or would be by its other name."""
    while name := name.rpartition(".")[0]:
        if in_base(name, modules):
            return name
    return ""


def _pattern_in(key: str, drops: bool) -> str:
    """A key of rank_pattern by the base's names; one that does not start at the start of a path matches as it is."""
    return re.sub(r"^(\^?)text_model\\?\.", r"\1", key) if drops else re.sub(r"^\^", r"^text_model\\.", key)


def to_peft_name(component: str, key: str) -> str:
    """A diffusers LoRA key of whatever age, in PEFT's spelling."""
    if ".lora_A" in key or ".lora_B" in key or ".lora_embedding_" in key:
        return key
    convert = diffusers("utils.state_dict_utils")
    marked = {f".{key}": None}  # the patterns begin with a dot
    if component.startswith("text_encoder"):
        for kind in (convert.StateDictType.DIFFUSERS_OLD, convert.StateDictType.DIFFUSERS):
            marked = convert.convert_state_dict_to_peft(marked, original_type=kind)
    else:
        marked = convert.convert_unet_state_dict_to_peft(marked)
    return str(next(iter(marked)))[1:]


def diffusers(module: str) -> ModuleType:
    """A module of diffusers, which is an extra."""
    try:
        return importlib.import_module(f"diffusers.{module}")
    except ImportError as error:
        raise ValueError(
            f"diffusers is needed to tell this file's layers ({error}): pip install 'xadapt[diffusers]'."
        ) from error


def _stable_diffusion(mixin: Any, name: str, down: Tensor, up: Tensor, layers_per_block: int) -> dict[str, Tensor]:
    layer = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
    # A unet_config makes it read the block names of SDXL's own U-Net, which sd-scripts trains; others are left alone.
    state, _ = mixin.lora_state_dict(layer, unet_config=SimpleNamespace(layers_per_block=layers_per_block))
    renamed = {}
    for key, tensor in state.items():
        component, rest = split_component(key)
        renamed[f"{component}.{to_peft_name(component, rest)}"] = tensor
    return renamed


def _flux(mixin: Any, name: str, down: Tensor, up: Tensor) -> dict[str, Tensor]:
    alpha = torch.tensor(float(down.shape[0]))  # so the tensors come back as they are, not multiplied in their dtype
    layer = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": alpha}
    state: dict[str, Tensor] = mixin.lora_state_dict(layer)
    return state
