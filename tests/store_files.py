"""Adapter folders for the tests of loading: written by stock PEFT, then damaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from torch import nn

import xadapt
from tests.conftest import make_llama

Logits = Callable[[nn.Module], torch.Tensor]
TARGETS = ["q_proj", "v_proj"]


def trained(base: nn.Module, config: object) -> PeftModel:
    """An adapter that does something: every tensor of it random."""
    model = get_peft_model(base, config)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


def stock_lora(folder: Path) -> Path:
    """A stock LoRA of the tiny Llama, saved by PEFT."""
    trained(make_llama(), LoraConfig(r=4, target_modules=TARGETS)).save_pretrained(folder)
    return folder


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


def refusal(folder: Path, model: nn.Module, logits: Logits, **options: object) -> str:
    """The message of the ValueError; the base has to be as it was."""
    before, modules = logits(model), [name for name, _ in model.named_modules()]
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the text is what the tests are about)
        xadapt.load(model, folder, **options)
    assert torch.equal(logits(model), before)
    assert [name for name, _ in model.named_modules()] == modules
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trainable
    return str(caught.value)
