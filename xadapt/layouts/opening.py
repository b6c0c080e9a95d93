"""Open a file of tensors, or say plainly why not."""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor

from xadapt.checkpoint_files import PICKLES
from xadapt.errors import some
from xadapt.finite import is_finite

DIFFUSERS_NAME = "pytorch_lora_weights.safetensors"


@dataclass(frozen=True)
class Opened:
    """A file's tensors, and what is said about them."""

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] | None = None  # the adapter_config.json beside it


def open_lora(path: str | PathLike[str], allow_pickle: bool) -> Opened:
    """The tensors of a file, or of the one LoRA file in a folder.

    Raises:
        ValueError: there is none, it is a pickle and `allow_pickle` is not set, or it is damaged.
    """
    file = _find(Path(path), allow_pickle)
    if file.suffix == ".safetensors":
        tensors, metadata = _read_safetensors(file)
    elif file.suffix in PICKLES:
        tensors, metadata = _read_pickle(file, allow_pickle), {}
    else:
        raise ValueError(f"{file} is no file xadapt knows; LoRA files end in .safetensors.")
    if not tensors:
        raise ValueError(f"{file} holds no tensors.")
    broken = [name for name, tensor in tensors.items() if not is_finite(tensor)]
    if broken:
        raise ValueError(
            f"{len(broken)} of {len(tensors)} tensors in {file} hold NaN or infinity: {some(broken)}. "
            "The training diverged; go back to an earlier checkpoint."
        )
    beside = file.parent / CONFIG_NAME
    is_peft = file.name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME) and beside.is_file()
    return Opened(file, tensors, metadata, _read_config(beside) if is_peft else None)


def _find(path: Path, allow_pickle: bool) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise ValueError(
            f"{path} is not there; an adapter is a PEFT folder, a LoRA file, or a folder that holds one. One of "
            f"the Hub is downloaded first: hf download {path} --local-dir FOLDER."
        )
    usual: list[str] = [SAFETENSORS_WEIGHTS_NAME, DIFFUSERS_NAME, *([WEIGHTS_NAME] if allow_pickle else [])]
    for name in usual:
        if (path / name).is_file():
            return path / name
    files: list[Path] = sorted(entry for entry in path.iterdir() if entry.suffix in (".safetensors", *PICKLES))
    if len(files) == 1:
        return files[0]
    names = some([file.name for file in files]) or "none"
    raise ValueError(f"{path} should hold one LoRA file; it holds {names}. Name the file: {path}/<name>.safetensors.")


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
            metadata = dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or cut short ({error}); save or download it again.") from error
    with path.open("rb") as raw:
        header = raw.read(int.from_bytes(raw.read(8), "little"))
    json.loads(header, object_pairs_hook=lambda pairs: _refuse_duplicates(pairs, path))
    return tensors, metadata


def _refuse_duplicates(pairs: list[tuple[str, Any]], path: Path) -> None:
    """safetensors takes the last of two tensors of one name, and says nothing."""
    seen: set[str] = set()
    for name, _ in pairs:
        if name in seen:
            raise ValueError(f"{path} lists {name!r} twice in its header; one of the two would be lost. Save it again.")
        seen.add(name)


def _read_pickle(path: Path, allow_pickle: bool) -> dict[str, Tensor]:
    if not allow_pickle:
        raise ValueError(
            f"{path} is a pickle, which can run code when read. If you trust it, say allow_pickle=True: "
            "tensors are read with torch.load(weights_only=True); or convert it to safetensors."
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise ValueError(f"{path} cannot be read as a file of tensors alone ({error}).") from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds something else than a mapping of names to tensors, so it is no LoRA file.")
    return {str(name): tensor for name, tensor in state.items()}


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # bad JSON, or bytes that are no text
        raise ValueError(f"{path} is not JSON ({error}); save the adapter again.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} is no adapter's config; save_pretrained writes one.")
    return config
