"""One file of a checkpoint, from which single tensors are taken: a safetensors file, or a pickle."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from xadapt.safetensors_header import Entry, read_header


class Shard(Protocol):
    path: Path
    entries: tuple[Entry, ...]
    metadata: Mapping[str, str]

    def tensor(self, name: str) -> Tensor: ...


class SafetensorsShard:
    """Maps the file into memory at the first look-up; the kernel reads, and may drop, the pages that are touched."""

    def __init__(self, path: Path) -> None:
        header = read_header(path)
        self.path, self.entries, self.metadata = path, header.entries, header.metadata
        self._file: Any = None
        self._lock = Lock()

    def tensor(self, name: str) -> Tensor:
        try:
            with self._lock:
                if self._file is None:
                    self._file = safe_open(self.path, framework="pt")
            tensor: Tensor = self._file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.path} cannot be read any more ({error}); has it changed or gone?") from error
        return tensor


class PickleShard:
    """A file of torch.save. Only tensors are unpickled (`weights_only`), and their data stay mapped on disk."""

    metadata: Mapping[str, str] = {}

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tensors = _unpickle(path)
        self.entries = tuple(
            Entry(name, path, tensor.dtype, tuple(tensor.shape), tensor.nbytes)
            for name, tensor in self._tensors.items()
        )

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name]


def _unpickle(path: Path) -> dict[str, Tensor]:
    if not zipfile.is_zipfile(path):
        raise ValueError(
            f"{path} is damaged, or a pickle from before torch 1.6, which can only be read as a whole. If you trust it: "
            "torch.save(torch.load(PATH, weights_only=True), PATH)."
        )
    try:
        loaded = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # a damaged pickle can fail in any way
        raise ValueError(
            f"{path} is damaged, or holds more than tensors, which is not unpickled ({type(error).__name__}: {error})."
        ) from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{path} holds a {type(loaded).__name__}, not a dictionary of tensors by name.")
    strays = [key for key, value in loaded.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if strays:
        raise ValueError(
            f"{path} is no plain dictionary of tensors: look at its key {strays[0]!r}. "
            "Save the state dict alone: torch.save(model.state_dict(), PATH)."
        )
    return dict(loaded)
