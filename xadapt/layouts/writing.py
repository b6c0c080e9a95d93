"""Write a plain LoRA where stock loaders look for it: a PEFT folder, a diffusers file, a kohya file."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import Tensor

from xadapt.choices import NAMES
from xadapt.errors import some
from xadapt.files import beside, check_place, save_tensors
from xadapt.layouts.flux import Side, fuse, place, rescale
from xadapt.layouts.minimal import minimal_config
from xadapt.layouts.names import CLIP, UNET
from xadapt.layouts.plain import PlainLora
from xadapt.peft_internals import check_target_module_exists

_TEXT_NAMES = {"lora_A": "lora_linear_layer.down", "lora_B": "lora_linear_layer.up"}
_SDXL_NAMES = {"add_embedding.linear_1": "label_emb_0_0", "add_embedding.linear_2": "label_emb_0_2"}


def write_peft(lora: PlainLora, folder: str | PathLike[str], *, overwrite: bool = False) -> Path:
    """A PEFT folder, as `PeftModel.save_pretrained` writes one. Holds all a PlainLora can be.

    Raises:
        ValueError: `folder` exists and `overwrite` is not set, or the LoRA's config does not fit its tensors.
    """
    folder = free_folder(folder, overwrite)
    missed = [path for path in lora.ranks_and_alphas() if not check_target_module_exists(lora.config, path)]
    if missed:
        raise ValueError(
            f"The config's target_modules do not match {len(missed)} layers of the LoRA: {some(missed)}. "
            "Build the config with xadapt.layouts.minimal_config."
        )
    config = copy.copy(lora.config)
    config.inference_mode = True
    if isinstance(config.target_modules, set):
        config.target_modules = sorted(config.target_modules)
    with _beside(folder) as part:
        part.mkdir()
        config.save_pretrained(str(part))
        _save({f"base_model.model.{name}": t for name, t in lora.tensors.items()}, part / SAFETENSORS_WEIGHTS_NAME)
        if not folder.exists():
            os.replace(part, folder)
        else:  # the config comes last, as in xadapt.save
            for name in (SAFETENSORS_WEIGHTS_NAME, CONFIG_NAME):
                os.replace(part / name, folder / name)
    return folder


def write_diffusers(components: Mapping[str, PlainLora], path: str | PathLike[str], *, overwrite: bool = False) -> Path:
    """A file for `pipe.load_lora_weights`, as diffusers' `save_lora_weights` writes it; ranks and alphas in its metadata.

    Raises:
        ValueError: `path` exists and `overwrite` is not set, or no stock loader would read all of it back.
    """
    target = free_file(path, overwrite)
    _known(components, NAMES["diffusers"], "diffusers")
    tensors, metadata, refused = dict[str, Tensor](), dict[str, Any](), dict[str, str]()
    for component, lora in components.items():
        is_text = component.startswith("text_encoder")
        for layer, parameters in lora.layers().items():
            if "lora_embedding_A" in parameters:
                refused[f"{component}.{layer}"] = "an embedding"
            elif is_text and not CLIP.fullmatch(layer):
                refused[f"{component}.{layer}"] = "diffusers loads only CLIP text encoders' layers"
            elif is_text and "lora_magnitude_vector" in parameters:
                refused[f"{component}.{layer}"] = "DoRA, which diffusers loads into no text encoder"
            for parameter, tensor in parameters.items():
                start, dot, end = parameter.partition(".")
                spelled = _TEXT_NAMES.get(start, start) if is_text else start
                tensors[f"{component}.{_clip(layer) if is_text else layer}.{spelled}{dot}{end}"] = tensor
        metadata |= {f"{component}.{key}": value for key, value in _metadata_of(lora, is_text).items()}
    _refuse("diffusers", refused, "the peft layout")
    text = json.dumps(metadata, indent=2, sort_keys=True)
    with _beside(target) as part:
        _save(tensors, part, lora_adapter_metadata=text)
        os.replace(part, target)
    return target


def write_kohya(components: Mapping[str, PlainLora], path: str | PathLike[str], *, overwrite: bool = False) -> Path:
    """A file as sd-scripts writes it, for ComfyUI, A1111 and diffusers: SD1.5, SDXL and FLUX.

    The U-Net's blocks carry diffusers' names, for SDXL too: those loaders take them, and sd-scripts converts them. A
    U-Net or text encoder gets one alpha for all its layers, because diffusers loses those that differ; what the layers
    differ by goes into lora_up (and makes half precision float32 where it would round there). "text_encoder" alone is
    SD1.5's; "text_encoder_1" is the first of SDXL and FLUX. Whether a "transformer" is FLUX's is told by its layers only.

    Raises:
        ValueError: `path` exists and `overwrite` is not set, or the layout has no place for some of the layers.
    """
    target = free_file(path, overwrite)
    _known(components, NAMES["kohya"], "kohya")
    refused, layers = dict[str, str](), dict[str, Side]()
    for component, lora in components.items():
        sides = {}
        for layer, parameters in lora.layers().items():
            problem = _kohya_problem(component, layer, parameters)
            if problem:
                refused[f"{component}.{layer}"] = problem
            else:
                side = Side(parameters["lora_A.weight"], parameters["lora_B.weight"], lora.scaling(layer))
                sides[layer] = side
        if component == "transformer":
            named, problems = _flux_layers(sides)
            refused |= {f"{component}.{layer}": why for layer, why in problems.items()}
        else:
            prefix = _kohya_prefix(component, components)
            named = {f"{prefix}_{_kohya_name(component, layer)}": side for layer, side in _one_alpha(sides).items()}
        layers |= named
    _refuse("kohya", refused, "the peft layout (or diffusers', but for embeddings and a text encoder's DoRA)")
    tensors = dict[str, Tensor]()
    for name, side in layers.items():
        tensors[f"{name}.lora_down.weight"] = side.a
        tensors[f"{name}.lora_up.weight"] = side.b
        tensors[f"{name}.alpha"] = torch.tensor(side.scaling * side.a.shape[0], dtype=torch.float32)
    with _beside(target) as part:
        _save(tensors, part)
        os.replace(part, target)
    return target


def _metadata_of(lora: PlainLora, is_text: bool) -> dict[str, Any]:
    """What diffusers hands to LoraConfig. Only what the LoRA needs: an older PEFT would stumble over newer options."""
    config = lora.config
    table = {_flat(layer) if is_text else layer: entry for layer, entry in lora.ranks_and_alphas().items()}
    short = minimal_config(table)
    targets: Iterable[str] | str = sorted(table)
    if isinstance(config.target_modules, (set, list)) and not (config.exclude_modules or config.layers_to_transform):
        targets = sorted({_flat(name) if is_text else name for name in config.target_modules})
    elif isinstance(config.target_modules, str) and not is_text and config.target_modules != "all-linear":
        targets = config.target_modules
    return {
        "r": short.r,
        "lora_alpha": short.lora_alpha,
        "rank_pattern": short.rank_pattern,
        "alpha_pattern": short.alpha_pattern,
        "target_modules": targets,
        "use_dora": config.use_dora,
        "lora_bias": config.lora_bias,
    }


def _flat(path: str) -> str:
    """CLIP's layers without `text_model.`: this end of the path matches in every version of transformers."""
    return path.removeprefix("text_model.")


def _clip(path: str) -> str:
    """CLIP's layers as files name them; loaders drop `text_model.` where the model does."""
    return path if path.startswith(("text_model.", "text_projection")) else f"text_model.{path}"


def _kohya_problem(component: str, layer: str, parameters: Mapping[str, Tensor]) -> str:
    if "lora_embedding_A" in parameters:
        return "an embedding"
    if "lora_B.bias" in parameters:
        return "a bias"
    if "lora_magnitude_vector" in parameters:
        return "DoRA, which diffusers drops from kohya files"
    if component == "unet" and not UNET.fullmatch(layer):
        return "no layer of a Stable Diffusion U-Net"
    if component.startswith("text_encoder") and not CLIP.fullmatch(layer):
        return "no layer of a CLIP text encoder"
    return ""


def _kohya_prefix(component: str, components: Mapping[str, PlainLora]) -> str:
    """SD1.5 has one text encoder, `te`; SDXL and FLUX count theirs. What "text_encoder" is, the others beside it tell."""
    if component != "text_encoder":
        return {"unet": "lora_unet", "text_encoder_1": "lora_te1", "text_encoder_2": "lora_te2"}[component]
    is_sdxl = "unet" in components and any(".transformer_blocks.1." in name for name in components["unet"].tensors)
    return "lora_te1" if is_sdxl or {"text_encoder_2", "transformer"} & components.keys() else "lora_te"


def _kohya_name(component: str, layer: str) -> str:
    path = layer if component == "unet" else _clip(layer)
    return _SDXL_NAMES.get(path, path.replace(".", "_"))


def _one_alpha(sides: Mapping[str, Side]) -> dict[str, Side]:
    alphas = Counter(float(f"{side.scaling * side.a.shape[0]:.12g}") for side in sides.values() if side.scaling)
    alpha = min(alphas, key=lambda value: (-alphas[value], value)) if alphas else 0.0
    return {layer: rescale(side, alpha / side.a.shape[0]) for layer, side in sides.items()}


def _flux_layers(sides: Mapping[str, Side]) -> tuple[dict[str, Side], dict[str, str]]:
    parts, problems = dict[str, dict[int, Side]](), {}
    for layer, side in sides.items():
        spot = place(layer, side)
        if isinstance(spot, str):
            problems[layer] = spot
        else:
            parts.setdefault(spot[0], {})[spot[1]] = side
    return {name: fuse(name, found) for name, found in parts.items()}, problems


def _refuse(layout: str, refused: Mapping[str, str], others: str) -> None:
    if refused:
        layers = some([f"{layer} ({why})" for layer, why in refused.items()])
        raise ValueError(
            f"The {layout} layout cannot hold {len(refused)} layers of this LoRA: {layers}. "
            f"Write them in {others}, or put them into the weights: xadapt merge."
        )


def _known(components: Mapping[str, PlainLora], known: tuple[str, ...], layout: str) -> None:
    strange = [repr(component) for component in components if component not in known]
    if strange or not components:
        raise ValueError(
            f"The {layout} layout got {', '.join(strange) or 'no components'}; it has a place for {', '.join(known)}. "
            "write_peft() writes a folder for any one component."
        )


def free_folder(path: str | PathLike[str], overwrite: bool) -> Path:
    """The path, if a PEFT folder may be written there."""
    folder = Path(path)
    check_place(folder)
    if folder.exists() and not (overwrite and (folder / CONFIG_NAME).is_file()):
        hint = "overwrite=True replaces only an adapter folder" if overwrite else "overwrite=True replaces an adapter"
        raise ValueError(f"{folder} exists already; {hint}. Or choose another folder.")
    return folder


def free_file(path: str | PathLike[str], overwrite: bool) -> Path:
    """The path, if a LoRA file may be written there."""
    target = Path(path)
    check_place(target)
    if target.suffix != ".safetensors":
        raise ValueError(f"{target} should end in .safetensors: loaders go by it.")
    if target.is_dir() or (target.exists() and not overwrite):
        what = "a folder" if target.is_dir() else "there already; overwrite=True replaces it"
        raise ValueError(f"{target} is {what}. Or choose another name.")
    return target


@contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """A name for unfinished work in the target's own folder, where os.replace is one step; whatever is left goes."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = beside(target)
    try:
        yield part
    finally:
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)


def _save(tensors: Mapping[str, Tensor], path: Path, **metadata: str) -> None:
    own = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
    save_tensors(own, path, metadata={"format": "pt"} | metadata)
