"""Write an adapter folder whole, or not at all."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from xadapt.errors import did_you_mean
from xadapt.files import beside, usual_access
from xadapt.patterns import PATTERNS, settled
from xadapt.peft_internals import BaseTunerLayer


def save(model: PeftModel, folder: str | PathLike[str], adapter_name: str = "default", **options: Any) -> Path:
    """`model.save_pretrained` for one adapter, whole or not at all: interrupted, it leaves nothing that loads half.

    It writes into a temporary folder first. Where an adapter is replaced, its config goes first and the new one comes
    last, so a folder in which the interruption fell between the two is refused by `load`, and can be saved to again.

    Args:
        model: the PeftModel.
        folder: where the adapter is to lie. If it holds an adapter already, that one is replaced, and other files stay.
        adapter_name: which of the model's adapters; it lies in `folder` itself whatever its name.
        options: further arguments of `PeftModel.save_pretrained`.

    Raises:
        TypeError: `model` is no PeftModel.
        ValueError: the model has no such adapter, or `folder` holds something that is no adapter.
    """
    if not isinstance(model, PeftModel):
        raise TypeError(
            f"save() takes the PeftModel that get_peft_model or xadapt.load returned, got {type(model).__name__}. "
            "Of a model with an adapter inside (transformers' add_adapter), save_pretrained writes it."
        )
    folder = Path(folder)
    if adapter_name not in model.peft_config:
        names = list(model.peft_config)
        hint = f"Pass adapter_name={names[0]!r}." if len(names) == 1 else did_you_mean(adapter_name, names)
        raise ValueError(f"The model has no adapter {adapter_name!r}. {hint}")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; save() wants a folder to write the adapter into.")
    is_adapter = any((folder / name).is_file() for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME))
    if folder.is_dir() and any(folder.iterdir()) and not is_adapter:
        raise ValueError(f"{folder} holds files but no adapter; choose a new folder, or empty this one.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = beside(folder)
    part.mkdir()
    try:
        model.save_pretrained(str(part), selected_adapters=[adapter_name], **options)
        written = part if adapter_name == "default" else part / adapter_name  # PEFT's layout
        if (written / CONFIG_NAME).is_file():  # with is_main_process=False there is none
            _settle(written / CONFIG_NAME, model, adapter_name)
            _put(written, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def _settle(file: Path, model: PeftModel, adapter_name: str) -> None:
    """The patterns in a written config, whose keys PEFT has sorted, so that they say of each layer what they say in the live model."""
    written, config = json.loads(file.read_text(encoding="utf-8")), copy.copy(model.peft_config[adapter_name])
    for name in PATTERNS:
        if given := getattr(config, name, None):  # the values as they were written: PiSSA's conversion doubles them
            setattr(config, name, {key: written[name][key] for key in given})
    if patterns := settled(config, _adapted(model, adapter_name)):
        file.write_text(json.dumps(written | patterns, indent=2, sort_keys=True), encoding="utf-8")


def _adapted(model: PeftModel, adapter_name: str) -> Iterator[str]:
    """What PEFT holds the patterns' keys against: the paths of the layers that this adapter is on, or of their parameters."""
    outer = ""
    for path, layer in model.get_base_model().named_modules():
        place = path.replace(".base_layer", "")  # adapters of two parameters of one module lie in each other
        if not isinstance(layer, BaseTunerLayer) or (outer and place.startswith(f"{outer}.")):
            continue  # what a feature-space layer hosts is inside of it
        outer = place
        if adapter_name in layer._get_available_adapters():
            parameter = getattr(layer, "parameter_name", None)
            yield f"{place}.{parameter}" if parameter else place


def _put(written: Path, folder: Path) -> None:
    """The finished files to their place: without a config, a folder is no adapter."""
    for file in written.rglob("*.safetensors"):
        usual_access(file)
    if not folder.exists():
        os.replace(written, folder)
        return
    (folder / CONFIG_NAME).unlink(missing_ok=True)  # or it would stand beside tensors that are not its own
    for path in sorted(written.iterdir(), key=lambda path: path.name == CONFIG_NAME):
        os.replace(path, folder / path.name)
