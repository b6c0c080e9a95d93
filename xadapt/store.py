"""Adapter folders: open one, say plainly what is wrong with it, and load it onto a base.

Everything that can be wrong is looked for before the base is touched, so a failed load leaves it as it was.
"""

from __future__ import annotations

import dataclasses
import json
import re
from os import PathLike
from pathlib import Path
from typing import Any

import peft
import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftModel, PeftType
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import nn

from xadapt import registry
from xadapt.errors import did_you_mean, some
from xadapt.finite import is_finite
from xadapt.provenance import tell_of_the_base
from xadapt.rehearsal import rehearse
from xadapt.version import __version__


def load(
    model: nn.Module,
    folder: str | PathLike[str],
    adapter_name: str = "default",
    *,
    torch_device: str | torch.device | None = None,
    **options: Any,
) -> PeftModel:
    """Loads an adapter folder onto a base: stock PEFT's `PeftModel.from_pretrained`, with the plug-ins in place first.

        model = xadapt.load(AutoModelForCausalLM.from_pretrained("…"), "my-adapter/")

    Args:
        model: the base. If it is a PeftModel already, the adapter is added to it (`set_adapter` makes it the active one).
        folder: what `save_pretrained` wrote: adapter_config.json and adapter_model.safetensors.
        torch_device: where to load the tensors; the accelerator if there is one, as PEFT chooses, by default.
        options: further arguments of `PeftModel.from_pretrained`: is_trainable, low_cpu_mem_usage, …

    Raises:
        TypeError: `model` is no module.
        ValueError: the folder, its config or its tensors cannot be used, or do not fit this base. The base is unchanged.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"load() takes the base itself, an nn.Module, got {model!r}. Load it first: "
            "xadapt.load(AutoModelForCausalLM.from_pretrained(...), folder)."
        )
    folder = Path(folder)
    if {"config", "subfolder"} & options.keys():
        raise ValueError(
            "load() reads the config of the very folder it is given: pass folder/subfolder and no config=."
        )
    check_folder(folder)
    _check_device(torch_device)
    options["torch_device"] = str(torch_device) if torch_device is not None else None
    if isinstance(model, PeftModel) and adapter_name in model.peft_config:
        raise ValueError(
            f"The model has an adapter {adapter_name!r} already: choose another adapter_name, or delete_adapter."
        )
    _check_base_weights(model, folder)
    rehearse(model, folder, adapter_name)
    tell_of_the_base(model, folder)
    if isinstance(model, PeftModel):
        model.load_adapter(folder, adapter_name, **options)
        return model
    return PeftModel.from_pretrained(model, folder, adapter_name, **options)


def check_folder(folder: Path) -> str:
    """The PEFT type of an adapter folder that is whole, readable and of a known type; PEFT knows the type from here on.

    Raises:
        ValueError: it is not; the message says what is wrong with it.
    """
    peft_type = _read_peft_type(folder)
    _open_format(peft_type)
    _check_fields(folder, peft_type)
    _check_tensors(folder)
    return peft_type


def _read_peft_type(folder: Path) -> str:
    """The adapter's PEFT type, from a config that is there, readable, and no newer than this library."""
    if not folder.is_dir():
        raise ValueError(
            f"{folder} is {'a file' if folder.exists() else 'not there'}; load() wants the folder of an adapter "
            "(one from the hub is downloaded first: huggingface_hub.snapshot_download)."
        )
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise ValueError(f"{folder} has no {CONFIG_NAME}, so it is no adapter folder; it holds {_listing(folder)}.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # bad JSON, or bytes that are no text
        raise ValueError(f"{path} is not JSON ({error}); save the adapter again.") from error
    peft_type = config.get("peft_type") if isinstance(config, dict) else None
    if not isinstance(peft_type, str):
        raise ValueError(f"{path} names no peft_type, so it is no adapter's config; save_pretrained writes one.")
    written_by = config.get("xadapt_version")
    if written_by is not None and _release(written_by, path) > _release(__version__, path):
        raise ValueError(
            f"{folder} was written by xadapt {written_by}, this is {__version__}, which may misread it: "
            "pip install -U xadapt."
        )
    return peft_type


def _release(version: object, path: Path) -> tuple[int, int]:
    """(major, minor): formats do not change within one of these."""
    match = re.match(r"(\d+)\.(\d+)", version) if isinstance(version, str) else None
    if match is None:
        raise ValueError(f"{path} gives {version!r} as xadapt_version, which is no version; it should read like 0.1.0.")
    return int(match[1]), int(match[2])


def _open_format(peft_type: str) -> None:
    """Makes PEFT know the type: it does already, or the kind that serves it registers it."""
    if peft_type in PEFT_TYPE_TO_CONFIG_MAPPING:
        return
    kind = registry.kind_of(peft_type)
    if kind is not None:
        kind.config()
        if peft_type in PEFT_TYPE_TO_CONFIG_MAPPING:
            return
    kinds = (kind.name.upper() for kind in registry.kinds())
    known = sorted({*kinds, *(PeftType(stock).value for stock in PEFT_TYPE_TO_CONFIG_MAPPING)})
    broken = "".join(f"\nNot usable here: {error}" for error in registry.load_all()[1].values())
    raise ValueError(
        f"No installed plug-in reads adapters of type {peft_type!r}. {did_you_mean(peft_type, known)} "
        f"If the type is another package's, install that package; if it is a newer xadapt's, pip install -U xadapt.{broken}"
    )


def _check_fields(folder: Path, peft_type: str) -> None:
    """Formats of ours have no field that is not known here; PEFT would leave it out with a warning."""
    config_cls = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(peft_type)]
    known = [field.name for field in dataclasses.fields(config_cls)]
    config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    if "xadapt_version" not in known or _is_newer(config.get("peft_version"), peft.__version__):
        return  # another's format, or options that a newer PEFT has added: PEFT's to judge
    for name in config:
        if name not in known:
            raise ValueError(
                f"{folder / CONFIG_NAME} has a field {name!r}, which {config_cls.__name__} does not have. "
                f"{did_you_mean(name, known)}"
            )


def _is_newer(version: object, than: str) -> bool:
    numbers = [re.match(r"(\d+)\.(\d+)\.(\d+)", str(given)) for given in (version, than)]
    given, limit = (tuple(map(int, match.groups())) if match else () for match in numbers)
    return given > limit


def _check_base_weights(model: nn.Module, folder: Path) -> None:
    """A folder in feature space changes no weight of the base: PEFT would put the source's in their place."""
    config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    if "xadapt_version" not in config:
        return
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    layers = dict(base.named_modules())
    changed = []
    with safe_open(folder / SAFETENSORS_WEIGHTS_NAME, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 (no mapping)
            path, found, _ = name.removeprefix("base_model.model.").partition(".base_layer.weight")
            layer = layers.get(f"{path}.base_layer", layers.get(path))
            if found and layer is not None and not _is_same(tensors.get_tensor(name), layer):
                changed.append(path)
    if changed:
        raise ValueError(
            f"{folder} holds the weights of its source's {some(changed)} beside the adapter, which differ from those of "
            "this base and would replace them. Save the adapter again without them: "
            "xadapt.save(model, folder, save_embedding_layers=False). To replace them on purpose, load with "
            "PeftModel.from_pretrained."
        )


def _is_same(stored: torch.Tensor, layer: nn.Module) -> bool:
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.shape != stored.shape:
        return False
    coarser = min(stored.dtype, weight.dtype, key=lambda dtype: dtype.itemsize)  # either may have been rounded
    return torch.equal(stored.to(coarser), weight.detach().to("cpu", coarser))


def _check_tensors(folder: Path) -> None:
    """The safetensors file is there, whole, and all its values are finite. Reads one tensor at a time."""
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        if (folder / WEIGHTS_NAME).is_file():
            raise ValueError(
                f"{folder} holds its tensors as a pickle only ({WEIGHTS_NAME}), which can run code when read. If you trust it, "
                f"load it with PeftModel.from_pretrained, then save_pretrained: that writes {SAFETENSORS_WEIGHTS_NAME}."
            )
        raise ValueError(f"{folder} has a config but no {SAFETENSORS_WEIGHTS_NAME}; it holds {_listing(folder)}.")
    try:
        with safe_open(path, framework="pt") as tensors:
            names = list(tensors.keys())
            broken = [name for name in names if not is_finite(tensors.get_tensor(name))]
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or cut short ({error}); copy or save the adapter again.") from error
    if broken:
        raise ValueError(
            f"{len(broken)} of {len(names)} tensors in {path} hold NaN or infinity: {some(broken)}. "
            "The training diverged; go back to an earlier checkpoint."
        )


def _check_device(torch_device: str | torch.device | None) -> None:
    if torch_device is None:
        return
    try:
        kind = torch.device(torch_device).type
    except RuntimeError as error:
        raise ValueError(f"torch_device={torch_device!r} is no device; write 'cpu', 'cuda' or 'cuda:1'.") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"torch_device={str(torch_device)!r}, but torch sees no CUDA device here; leave it out, or say 'cpu'."
        )


def _listing(folder: Path) -> str:
    return some(sorted(entry.name for entry in folder.iterdir())) or "nothing"
