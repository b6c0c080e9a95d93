"""Small checkpoints on disk, and what must hold of every base that is opened from one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from xadapt.base import CheckpointBase, LiveBase, open_base
from xadapt.contract import Base

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def tied_llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def saved(model: Any, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    return folder


def edit_config(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return folder


def rename_tensors(folder: Path, rename: Callable[[str], str], file: str = "model.safetensors") -> Path:
    save_file({rename(name): tensor for name, tensor in load_file(folder / file).items()}, folder / file)
    return folder


def check(base: CheckpointBase | LiveBase, model: nn.Module) -> None:
    """Names, tensors, skeleton and module are the model's own."""
    as_contract: Base = base
    state, weights = model.state_dict(), as_contract.weights()
    assert list(weights) == list(state)
    assert len(weights) == len(state)
    for name in weights:
        torch.testing.assert_close(weights[name], state[name], rtol=0, atol=0)
    skeleton = base.skeleton()
    assert type(skeleton) is type(model)
    assert not skeleton.training
    assert skeleton is not base.skeleton()
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    assert {n: t.shape for n, t in skeleton.state_dict().items()} == {n: t.shape for n, t in state.items()}
    assert [n for n, _ in skeleton.named_parameters()] == [n for n, _ in model.named_parameters()]
    loaded = base.module()
    assert loaded is base.module()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())


def error_of(base: Any, **options: Any) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (its text is the test)
        open_base(base, **options)
    return str(caught.value)


def why_absent(base: CheckpointBase | LiveBase, name: str) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (its text is the test)
        base.weights()[name]
    return str(caught.value)
