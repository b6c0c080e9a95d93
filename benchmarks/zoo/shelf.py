"""What takes minutes to train, kept between runs: models as safetensors, adapters as PEFT folders, named by what made them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors.torch import load_file, save_file

import xadapt
from xadapt.contract import Adapter
from xadapt.reading import read_adapter


class Shelf:
    """A folder for one part and seed. Processes may share it: files are moved into place when they are whole."""

    def __init__(self, folder: Path, made_with: object) -> None:
        text = json.dumps(made_with, sort_keys=True)
        self.folder = folder / hashlib.sha256(text.encode()).hexdigest()[:12]

    def model(self, name: str, like: Callable[[], Any], make: Callable[[], Any]) -> Any:
        """The trained model of that name: its weights in `like()` if they are here, else what `make()` returns."""
        path = self.folder / f"{name}.safetensors"
        if path.is_file():
            model = like()
            model.load_state_dict(load_file(path))
            return model.eval()
        model = make().eval()
        tensors = {key: tensor.detach().clone().contiguous() for key, tensor in model.state_dict().items()}
        _put(path, lambda part: save_file(tensors, part))
        return model

    def adapter(self, name: str, make: Callable[[], PeftModel]) -> Adapter:
        """The trained adapter of that name, as its folder says."""
        path = self.folder / name
        if not path.is_dir():
            xadapt.save(make(), path)
        return read_adapter(path)

    def facts(self, name: str, make: Callable[[], Any]) -> Any:
        """A JSON-able result that is needed by later steps."""
        path = self.folder / f"{name}.json"
        if not path.is_file():
            text = json.dumps(make())
            _put(path, lambda part: part.write_text(text, encoding="utf-8"))
        return json.loads(path.read_text(encoding="utf-8"))

    def has(self, name: str) -> bool:
        """Whether these facts are known."""
        return (self.folder / f"{name}.json").is_file()


def _put(path: Path, write: Callable[[Path], object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        write(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
