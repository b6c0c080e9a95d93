"""What the tests of merging share: checkpoints of tiny models on disk, and a look at what a merge has made of one."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from safetensors.torch import load_file
from torch import Tensor, nn

import xadapt
from tests.conftest import make_llama
from tests.feature_models import adapted
from xadapt import InputAdaConfig

TARGETS = ["q_proj", "v_proj", "down_proj"]
EXTRAS = {"tokenizer.json": "{}", "tokenizer_config.json": '{"a": 1}', "README.md": "# a base", "extra/notes.txt": "x"}


def make_checkpoint(folder: Path, model: Any = None, shards: bool = True) -> Path:
    """A Llama in several shards, with what lies beside a model's weights."""
    model = make_llama(seed=4) if model is None else model
    model.save_pretrained(folder, max_shard_size="20KB" if shards else "1GB")
    for name, text in EXTRAS.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


def make_adapter(
    folder: Path, config: PeftConfig | None = None, make: Callable[[], nn.Module] = make_llama, std: float = 0.1
) -> Path:
    config = InputAdaConfig(r=4, target_modules=TARGETS) if config is None else config
    model = adapted(make(), config, std=std)
    return xadapt.save(model, folder, save_embedding_layers=False)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def header_of(file: Path) -> bytes:
    data = file.read_bytes()
    return data[: 8 + struct.unpack("<Q", data[:8])[0]]


def index_of(folder: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    return found


def files_in(folder: Path) -> set[str]:
    """All of them, hidden ones too, without folders."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


def merged_by_peft(base: nn.Module, adapter: Path) -> dict[str, Tensor]:
    model = xadapt.load(base, adapter)
    with torch.no_grad():
        return dict(model.merge_and_unload().state_dict())
