"""A carried adapter on disk, whole or not at all, and read back before it is said to be there."""

from __future__ import annotations

import copy
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from xadapt.attached import PREFIX, WIDE
from xadapt.contract import Adapter, Base
from xadapt.errors import some
from xadapt.files import beside, check_place, save_tensors, usual_access
from xadapt.finite import is_finite
from xadapt.kinds import FileKind, PeftKind
from xadapt.origin import PROVENANCE
from xadapt.patterns import settled, targeted
from xadapt.rehearsal import rehearse
from xadapt.store import check_folder
from xadapt.strict_json import as_json, finite

from .result import TransferResult

SUMMARY = "xadapt_transfer.json"


def check_free(out: Path, overwrite: bool) -> None:
    """Refuses a place that is taken, before anything is calculated.

    Raises:
        ValueError: it is.
    """
    check_place(out)
    replaceable = overwrite and ((out / CONFIG_NAME).is_file() or (out / SUMMARY).is_file())
    if replaceable and (beside := _beside(out)):
        raise ValueError(
            f"{out} holds more than an adapter: {some(beside)}, which would be lost. Choose another folder, or move them away."
        )
    if os.path.lexists(out) and not replaceable:
        hint = "overwrite=True replaces only an adapter folder" if overwrite else "overwrite=True replaces an adapter"
        raise ValueError(f"{out} exists already; {hint}. Or choose another folder.")


def _beside(folder: Path) -> list[str]:
    """What lies in a PEFT folder that is no part of the adapter: checkpoints, for one."""
    if not (folder / CONFIG_NAME).is_file():
        return []  # a plug-in's format, and its names
    names = sorted(one.name for one in folder.iterdir())
    return [name for name in names if not name.startswith("adapter_") and name not in ("README.md", SUMMARY)]


def write_transferred(adapter: Adapter, target: Base, result: TransferResult, overwrite: bool = False) -> None:
    """Writes the adapter for the target to `result.out`, with the record of how it came about.

    Raises:
        ValueError: it holds NaN, cannot be written, or would not load onto the target. Nothing is left.
    """
    _check_finite(adapter)
    out = result.out
    check_free(out, overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    part = beside(out)
    part.mkdir()
    try:
        if isinstance(adapter.kind, PeftKind):
            write_folder(adapter, part, target, result.record())
        elif isinstance(adapter.kind, FileKind):
            adapter.kind.write(adapter, part)
        else:
            raise ValueError(f"Adapters of kind {adapter.kind.name!r} cannot be written: the kind has no format.")
        (part / SUMMARY).write_text(as_json(result.as_dict(), indent=2) + "\n", encoding="utf-8")
        try:
            _read_back(adapter, part, target)
        except ValueError as error:  # in the words of what was asked for, not of a folder that is gone in a moment
            raise ValueError(str(error).replace(str(part), str(out))) from error
        _put(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_folder(adapter: Adapter, folder: Path, target: Base, record: dict[str, Any] | None = None) -> None:
    """A PEFT folder of an adapter, for this base. `folder` exists and is empty."""
    config = copy.deepcopy(adapter.config)
    config.inference_mode = True
    config.base_model_name_or_path = _where(target)
    config.revision = getattr(target, "revision", None)
    if isinstance(config.target_modules, set):
        config.target_modules = sorted(config.target_modules)
    if record is not None:
        if hasattr(config, "base_fingerprint"):
            config.base_fingerprint = record["target_fingerprint"]
        network = type(target.modules()[""])
        # PEFT's own two keys, and ours: an unknown field of a config would be warned about by stock PEFT.
        config.auto_mapping = {
            "base_model_class": network.__name__,
            "parent_library": network.__module__,
            PROVENANCE: finite(record),
        }
    for name, pattern in settled(config, targeted(config, target.modules())).items():
        setattr(config, name, pattern)  # PEFT writes the keys sorted
    config.save_pretrained(str(folder))
    tensors = {
        name if name.startswith(WIDE) else f"{PREFIX}{name}": _own(tensor) for name, tensor in adapter.tensors.items()
    }
    save_tensors(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})


def _own(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _where(base: Base) -> str | None:
    """What a PEFT config calls its base: where it was loaded from, if from anywhere."""
    if hasattr(base, "folder"):
        return base.name
    told: Any = getattr(base, "config", {})
    return told.get("_name_or_path") or None


def _check_finite(adapter: Adapter) -> None:
    if not adapter.tensors:
        raise ValueError("The method returned an adapter without a single tensor.")
    broken = [name for name, tensor in adapter.tensors.items() if not is_finite(tensor)]
    if broken:
        raise ValueError(
            f"The carried adapter holds NaN or infinity in {len(broken)} of {len(adapter.tensors)} tensors: {some(broken)}. "
            "Nothing was written."
        )


def _read_back(adapter: Adapter, folder: Path, target: Base) -> None:
    """What a user's load would do, on the target without its weights."""
    if isinstance(adapter.kind, PeftKind):
        check_folder(folder)
        rehearse(target.skeleton(), folder, "default")
        return
    assert isinstance(adapter.kind, FileKind)
    read = adapter.kind.read(folder, False)
    shapes = {name: tuple(tensor.shape) for name, tensor in adapter.tensors.items()}
    if {name: tuple(tensor.shape) for name, tensor in read.tensors.items()} != shapes:
        raise ValueError(f"Read back, the adapter of kind {adapter.kind.name!r} has other tensors than were written.")


def _put(part: Path, out: Path) -> None:
    """The finished folder to its place."""
    for file in part.rglob("*.safetensors"):  # of formats that others write
        usual_access(file)
    if not out.exists():
        os.replace(part, out)
        return
    old = beside(out)
    old.mkdir()
    try:
        os.replace(out, old / "old")
        os.replace(part, out)
    finally:
        shutil.rmtree(old, ignore_errors=True)
