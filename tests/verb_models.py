"""A source, targets that drifted from it or changed a basis, and adapters, for the tests of check, transfer and verify."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import xadapt
from tests.conftest import make_llama, make_unet
from xadapt import InputAdaConfig

IDS = torch.arange(128).reshape(8, 16) % 64


def drifted(model: nn.Module, share: float = 0.1, seed: int = 3) -> Any:
    """A copy whose weights moved by about this share of their norm."""
    sibling = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in sibling.parameters():
            if weight.ndim >= 2:
                weight.add_(torch.randn(weight.shape, generator=generator) * share * weight.std())
    return sibling


def rotated_values(model: nn.Module, seed: int = 4) -> Any:
    """The same function with another basis between v_proj and o_proj: one head's values turned, and turned back."""
    sibling = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in sibling.model.layers:
            attention = layer.self_attn
            width = attention.head_dim
            turn = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
            groups = attention.v_proj.weight.shape[0] // width
            attention.v_proj.weight.copy_((turn @ attention.v_proj.weight.view(groups, width, -1)).flatten(0, 1))
            heads = attention.o_proj.weight.view(attention.o_proj.weight.shape[0], -1, width)
            attention.o_proj.weight.copy_((heads @ turn.T).flatten(1))
    return sibling


def randomised(model: PeftModel, std: float = 0.1) -> PeftModel:
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=std)
    return model


def lora_folder(folder: Path, base: nn.Module | None = None, targets: tuple[str, ...] = ("q_proj", "v_proj")) -> Path:
    """A stock LoRA with random tensors; the base is used up."""
    model = get_peft_model(base or make_llama(), LoraConfig(r=2, target_modules=list(targets)))
    return xadapt.save(randomised(model), folder)


def input_folder(folder: Path) -> Path:
    """An input adapter, which carries the fingerprint of its base."""
    model = get_peft_model(make_llama(), InputAdaConfig(r=2, target_modules=["q_proj", "v_proj"]))
    return xadapt.save(randomised(model), folder)


def unet_lora_folder(folder: Path) -> Path:
    return lora_folder(folder, make_unet(), ("to_k", "to_v"))


def write_pair(folder: Path) -> Path:
    """`source`, `target` drifted from it, a `deeper` stranger; a `lora` and an `input` adapter of the source."""
    source = make_llama()
    source.save_pretrained(folder / "source")
    drifted(source).save_pretrained(folder / "target")
    make_llama(seed=9, layers=3).save_pretrained(folder / "deeper")
    lora_folder(folder / "lora")
    input_folder(folder / "input")
    return folder


def nothing_in(folder: Path) -> bool:
    return not folder.exists() or not any(folder.iterdir())
