"""A4A adapters and IP-Adapters as detached adapters, on disk."""

from __future__ import annotations

import re
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from diffusers.utils.constants import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from xadapt.contract import Adapter
from xadapt.errors import some
from xadapt.files import save_tensors
from xadapt.finite import is_finite
from xadapt.strict_json import read_object

from .files import read_ip_adapter
from .methods import A4A_KIND, IP_ADAPTER
from .model import A4AModel
from .versions import check_version

_CLASS = A4AModel.__name__
_IP_ADAPTER_KEY = re.compile(r"ip_adapter\.\d+\.to_k_ip\.weight")


def is_ip_adapter(path: Path) -> bool:
    """Whether a file is an IP-Adapter, by the names of its tensors. A .bin cannot be looked into without unpickling it, so
    its name has to say it."""
    if not path.is_file():
        return False
    if path.suffix != ".safetensors":
        return path.suffix in (".bin", ".pt") and re.match(r"ip[-_]adapter", path.name.lower()) is not None
    try:
        with safe_open(path, "pt") as file:
            return any(_IP_ADAPTER_KEY.fullmatch(name) for name in file.keys())  # noqa: SIM118 (not iterable by itself)
    except SafetensorError:
        return False


def read_ip_adapter_file(path: str | PathLike[str], allow_pickle: bool = False) -> Adapter:
    """A published IP-Adapter file; see `read_ip_adapter` for what is refused."""
    tensors = read_ip_adapter(path, allow_pickle=allow_pickle).flat()
    return Adapter(kind=IP_ADAPTER, config={"file": Path(path).name}, tensors=tensors)


def write_ip_adapter(adapter: Adapter, folder: Path) -> None:
    """ip-adapter.safetensors, in the published layout."""
    tensors = read_ip_adapter(adapter.tensors).flat()
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "ip-adapter.safetensors")


def is_a4a(path: Path) -> bool:
    """Whether a folder holds an A4A adapter."""
    config = path / CONFIG_NAME
    if not config.is_file():
        return False
    try:
        return bool(read_object(config).get("_class_name") == _CLASS)
    except ValueError:
        return False


def read_a4a(folder: str | PathLike[str], allow_pickle: bool = False) -> Adapter:
    """The A4A adapter in a folder that `write_a4a` or `A4AModel.save_pretrained` wrote.

    Raises:
        ValueError: it holds none, is damaged, or was written by a newer xadapt.
    """
    folder = Path(folder)
    if not (folder / CONFIG_NAME).is_file():
        raise ValueError(f"{folder} is no A4A adapter: it has no {CONFIG_NAME}. Name the folder that holds one.")
    held = read_object(folder / CONFIG_NAME)
    if held.get("_class_name") != _CLASS:
        raise ValueError(
            f"{folder} holds {held.get('_class_name', 'something')!r}, no A4A adapter: its {CONFIG_NAME} should say {_CLASS!r}."
        )
    check_version(str(held.get("xadapt_version", "")), str(folder))
    path = folder / SAFETENSORS_WEIGHTS_NAME
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or not there ({error}); copy or save it again.") from error
    config = {name: value for name, value in held.items() if not name.startswith("_")}
    adapter = Adapter(kind=A4A_KIND, config=config, tensors=tensors)
    build(adapter, str(folder))
    return adapter


def write_a4a(adapter: Adapter, folder: str | PathLike[str]) -> None:
    """config.json and the weights, as `A4AModel.from_pretrained` opens them. The caller moves the folder into its place.

    Raises:
        ValueError: it is no A4A adapter, or its tensors are not those of its config.
    """
    if adapter.kind != A4A_KIND:
        raise ValueError(f"An A4A folder holds adapters of kind {A4A_KIND.name!r}, not {adapter.kind.name!r}.")
    build(adapter, "The adapter").save_pretrained(folder)


def build(adapter: Adapter, name: str) -> A4AModel:
    """The adapter as a model. Its tensors are not copied.

    Raises:
        ValueError: the config is not one of an A4A adapter, or the tensors do not fit it.
    """
    try:
        with torch.device("meta"):
            model: A4AModel = A4AModel(**adapter.config)
    except TypeError as error:
        raise ValueError(f"{name} has a config that is not one of an A4A adapter: {error}.") from error
    check_tensors({key: one.shape for key, one in model.state_dict().items()}, adapter.tensors, name)
    model.load_state_dict(dict(adapter.tensors), assign=True)
    return model.eval()


def check_tensors(wanted: Mapping[str, Any], given: Mapping[str, Tensor], name: str) -> None:
    """ValueError unless the tensors are those wanted, by name and shape, and all numbers."""
    missing, foreign = sorted(wanted.keys() - given.keys()), sorted(given.keys() - wanted.keys())
    if missing or foreign:
        parts = [f"lacks {some(missing)}"] * bool(missing) + [f"has {some(foreign)} too much"] * bool(foreign)
        raise ValueError(f"{name} {' and '.join(parts)}; its config is of another adapter. Copy or save it again.")
    for key, shape in wanted.items():
        if given[key].shape != shape:
            raise ValueError(f"{name}: {key} has the shape {tuple(given[key].shape)}, its config says {tuple(shape)}.")
    broken = sorted(key for key, tensor in given.items() if not tensor.is_meta and not is_finite(tensor))
    if broken:
        raise ValueError(
            f"{name}: {len(broken)} tensors hold NaN or infinity: {some(broken)}. Take an earlier checkpoint."
        )
