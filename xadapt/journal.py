"""Layers that are finished, on disk: an interrupted transfer of a large model goes on where it stopped.

A method that works layer by layer calls `finished` around each of them. Whoever runs it decides whether there is a journal.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from xadapt.files import save_tensors

_PATH, _KEY = "path", "key"


class Journal:
    """A folder with a file per finished layer.

    Args:
        folder: is made. Layers of another key are not read, and are replaced.
        key: says what is being done, options and bases included; a layer finished under another key is another layer.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder = folder
        self._key = hashlib.sha256(key.encode()).hexdigest()

    def finished(self, path: str, make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """What `make` calculates for the layer, or what an interrupted run has left of it. A file is written whole or not at all."""
        file = self.folder / f"{hashlib.sha256(path.encode()).hexdigest()[:32]}.safetensors"
        kept = self._read(file, path)
        if kept is not None:
            return kept
        made = {name: tensor.detach().contiguous() for name, tensor in make().items()}
        self.folder.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}.part")
        try:
            save_tensors({name: tensor.cpu() for name, tensor in made.items()}, part, {_PATH: path, _KEY: self._key})
            os.replace(part, file)
        finally:
            part.unlink(missing_ok=True)
        return made

    def clear(self) -> None:
        """Removes the folder: all is done."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _read(self, file: Path, path: str) -> dict[str, Tensor] | None:
        if not file.is_file():
            return None
        try:
            with safe_open(file, framework="pt") as opened:
                if opened.metadata() != {_PATH: path, _KEY: self._key}:
                    return None
                return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
        except (SafetensorError, OSError):  # a disk that lost what it had: the layer is calculated again
            return None


_current: ContextVar[Journal | None] = ContextVar("journal", default=None)
_part: ContextVar[str] = ContextVar("part", default="")


@contextmanager
def keeping(journal: Journal) -> Iterator[Journal]:
    """Finished layers go into this journal until the end of the block; it stays on disk until it is cleared."""
    token = _current.set(journal)
    try:
        yield journal
    finally:
        _current.reset(token)


@contextmanager
def within(part: str) -> Iterator[None]:
    """Layers that finish in the block are those of this part of the work: of one of several methods that are tried on each layer."""
    token = _part.set(f"{_part.get()}{part}/")
    try:
        yield
    finally:
        _part.reset(token)


def finished(path: str, make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of one layer: calculated, unless a journal has them.

    Args:
        path: the layer's, in the target.
        make: calculates them; numbers go in as tensors without dimensions.
    """
    journal = _current.get()
    return dict(make()) if journal is None else journal.finished(f"{_part.get()}{path}", make)
