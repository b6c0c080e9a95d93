"""Load an adapter onto a copy of the base without data, to learn whether it fits before the base is touched.

PEFT replaces layers one after another and looks at tensor shapes last: an adapter that does not fit would leave the base
half changed. The copy has its parameters on the meta device, so it costs next to no memory and time.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from torch import nn

from xadapt.errors import some


def rehearse(model: nn.Module, folder: Path, adapter_name: str) -> None:
    """Checks that the adapter in `folder`, known to be readable, fits `model`, which stays as it is.

    Raises:
        ValueError: PEFT cannot attach it here, a tensor has another shape than its layer wants, the base lacks a layer that
            the adapter has tensors for, or the adapter lacks tensors for a layer that its config targets.
    """
    config = PeftConfig.from_pretrained(str(folder))
    copied = without_data(model)
    if (
        config.is_prompt_learning or copied is None
    ):  # the former touch no layer; without a copy PEFT's own checks must do
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the real load says them again
            stage = _attach(copied, config, adapter_name)
            wanted = {
                name: tuple(tensor.shape)
                for name, tensor in get_peft_model_state_dict(
                    stage, adapter_name=adapter_name, save_embedding_layers=False
                ).items()
            }
            found = _shapes(folder / SAFETENSORS_WEIGHTS_NAME)
            _compare_shapes(folder, wanted, found)
            key_mapping = getattr(model, "_checkpoint_conversion_mapping", None)
            result = stage.load_adapter(
                str(folder), adapter_name, torch_device="cpu", low_cpu_mem_usage=True, key_mapping=key_mapping
            )
    except NotImplementedError:  # this PEFT method calculates something while it attaches, which meta tensors cannot
        return
    except RuntimeError as error:
        raise ValueError(f"The adapter in {folder} does not fit this base: {error}") from error
    if result.unexpected_keys:
        raise ValueError(
            f"The adapter in {folder} has tensors for layers that this base lacks: {_named(result.unexpected_keys)}. "
            "Is it the base (and the component: unet, text encoder) that the adapter was trained on?"
        )
    absent = wanted.keys() - found.keys()
    if absent and result.missing_keys:  # PEFT renames some tensors on loading, so its word is needed too
        raise ValueError(
            f"The adapter in {folder} lacks tensors for layers that its config targets in this base: {_named(absent)}. "
            "Is it the base that the adapter was trained on, and was all of it saved?"
        )


def without_data(model: nn.Module) -> nn.Module | None:
    """The same tree of modules with its parameters and buffers on the meta device, or None if it cannot be copied."""
    twins = {id(tensor): _on_meta(tensor) for tensor in (*model.parameters(), *model.buffers())}
    try:
        twin = copy.deepcopy(model, twins)
    except Exception:  # a module may hold what no deepcopy can take: locks, handles, tensors with a history
        return None
    twin.__dict__.pop("hf_device_map", None)  # nothing to dispatch over devices
    return twin


def _on_meta(tensor: torch.Tensor) -> torch.Tensor:
    if type(tensor) not in (
        nn.Parameter,
        torch.Tensor,
    ):  # quantised: shared, as PEFT looks into these while it attaches
        return tensor
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def _attach(model: nn.Module, config: PeftConfig, adapter_name: str) -> PeftModel:
    if not isinstance(model, PeftModel):
        return PeftModel(model, config, adapter_name, low_cpu_mem_usage=True)
    model.add_adapter(adapter_name, config, low_cpu_mem_usage=True)
    return model


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes in a safetensors file. Reads its header only."""
    with safe_open(path, framework="pt") as tensors:
        return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118 (no mapping)


def _compare_shapes(folder: Path, wanted: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> None:
    misfits = [
        f"{_layer(name)}: the base wants {wanted[name]}, the adapter has {found[name]}"
        for name in wanted
        if name in found and wanted[name] != found[name]
    ]
    if misfits:
        raise ValueError(
            f"The adapter in {folder} was trained on a base of other widths ({len(misfits)} of {len(found)} tensors):\n  "
            + some(misfits, separator="\n  ")
        )


def _named(keys: Iterable[str]) -> str:
    return some(sorted({_layer(key) for key in keys}))


def _layer(key: str) -> str:
    return key.removeprefix("base_model.model.")
