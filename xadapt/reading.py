"""Adapters from disk, detached from any base: PEFT folders, and LoRA files of diffusers and kohya."""

from __future__ import annotations

import re
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftConfig, PeftModel, PeftType, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from torch import Tensor

from xadapt import registry
from xadapt.attached import PREFIX, WIDE
from xadapt.contract import Adapter
from xadapt.errors import some
from xadapt.factors import scaling_of
from xadapt.kinds import PeftKind, stock_kind
from xadapt.peft_internals import BaseTunerLayer
from xadapt.store import check_folder

if TYPE_CHECKING:
    from xadapt.layouts import PlainLora


def read_adapter(path: str | PathLike[str], *, component: str | None = None, allow_pickle: bool = False) -> Adapter:
    """Reads an adapter without any base.

    Args:
        path: a PEFT folder (ours or stock), or a LoRA file of diffusers or kohya.
        component: which part of a file for several of them: "unet", "transformer", "text_encoder" …
        allow_pickle: also read .bin and .pt files. Only tensors are unpickled.

    Raises:
        ValueError: it is no adapter, is damaged or holds NaN, or a file has several components and none was named.
    """
    path = Path(path)
    if path.is_dir() and not _is_lora_folder(path):
        peft_type = check_folder(path)
        config = PeftConfig.from_pretrained(str(path))
        if config.is_prompt_learning:
            raise ValueError(
                f"{path} is a prompt method ({peft_type}): it adapts no layer, so it can be neither exported nor merged."
            )
        return Adapter(kind=_kind(peft_type), config=config, tensors=_tensors(path / SAFETENSORS_WEIGHTS_NAME))
    from xadapt.layouts import read_lora

    file = read_lora(path, allow_pickle=allow_pickle)
    lora = _choose(path, file.components, component)
    # As a list, the paths would also match longer ones that end alike: proj_out, and single_transformer_blocks.0.proj_out.
    lora.config.target_modules = "|".join(re.escape(path) for path in sorted(lora.layers()))
    return Adapter(kind=_kind("LORA"), config=lora.config, tensors=lora.tensors)


def detach(model: PeftModel, adapter_name: str | None = None) -> Adapter:
    """An adapter of a live model, detached from it; the active one by default.

    Raises:
        ValueError: there is no such adapter, several are active, or it was rescaled (set_scale), which no file can say.
    """
    names = list(model.active_adapters) if adapter_name is None else [adapter_name]
    if len(names) != 1 or names[0] not in model.peft_config:
        raise ValueError(
            f"Choose one adapter: detach(model, adapter_name=…) with one of {', '.join(map(repr, model.peft_config))}; "
            "detach several one by one and pass the list."
        )
    (name,) = names
    config = model.peft_config[name]
    _check_scales(model, config, name)
    tensors = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    own = {key.removeprefix(PREFIX): tensor.detach() for key, tensor in tensors.items()}
    return Adapter(kind=_kind(PeftType(config.peft_type).value), config=config, tensors=own)


def _check_scales(model: PeftModel, config: Any, adapter_name: str) -> None:
    if not hasattr(config, "lora_alpha"):
        return
    outer = ""
    for path, layer in model.get_base_model().named_modules():
        if isinstance(layer, BaseTunerLayer) and not (outer and path.startswith(f"{outer}.")):
            outer = path  # those within, which feature-space layers host, are scaled by the path of the layer itself
        scaling = getattr(layer, "scaling", None)
        ranks = getattr(layer, "r", None)
        if not (isinstance(scaling, dict) and isinstance(ranks, dict) and adapter_name in scaling):
            continue
        rank = ranks[adapter_name]
        if hasattr(config, "feature_r"):
            rank = config.r  # both parts of a hybrid have the scaling of the rank in total
        elif hasattr(config, "init_r"):
            rank = 1  # AdaLoRA's rank changes in training, and its alpha is not divided by it
        if abs(float(scaling[adapter_name]) - scaling_of(config, outer or path, rank)) > 1e-6:
            raise ValueError(
                f"{outer or path} of adapter {adapter_name!r} was rescaled to {float(scaling[adapter_name])}; undo it "
                "(unscale_layer), and pass the factor as weights=[…] instead."
            )


def _is_lora_folder(path: Path) -> bool:
    """Whether this is what diffusers' save_lora_weights makes: one LoRA file in a folder, without a PEFT config."""
    return not (path / "adapter_config.json").exists() and (path / "pytorch_lora_weights.safetensors").is_file()


def _choose(path: Path, components: dict[str, PlainLora], component: str | None) -> PlainLora:
    if component is None and len(components) == 1:
        return next(iter(components.values()))
    if component in components:
        return components[component]
    given = "has LoRAs for several components" if component is None else f"has no LoRA for component={component!r}"
    raise ValueError(f"{path} {given}; choose one: component=" + " or ".join(map(repr, sorted(components))) + ".")


def _kind(peft_type: str) -> PeftKind:
    return registry.kind_of(peft_type) or stock_kind(peft_type)


def _tensors(file: Path) -> dict[str, Tensor]:
    with safe_open(file, framework="pt") as opened:
        names = list(opened.keys())
        foreign = [name for name in names if not name.startswith(WIDE)]
        if foreign:
            raise ValueError(f"{file}: names in a PEFT folder start with {PREFIX!r}; these do not: {some(foreign)}.")
        return {name.removeprefix(PREFIX): opened.get_tensor(name) for name in names}
