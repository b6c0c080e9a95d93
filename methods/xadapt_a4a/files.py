"""Reading a published IP-Adapter: its two groups of tensors, and nothing else, in order.

The layout, as all published files have it: `image_proj.*` turns the image encoder's output into N tokens of width c;
`ip_adapter.{id}.to_k_ip.weight` and `.to_v_ip.weight`, (d_i, c), turn tokens into the k_i, v_i of one layer. The id is the
layer's index among the U-Net's attention processors, self-attention counted: 1, 3, 5, …
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from xadapt.errors import some
from xadapt.finite import is_finite

_GROUPS = ("image_proj", "ip_adapter")
_LAYER = re.compile(r"(\d+)\.to_([kv])_ip\.weight")
_LORA = re.compile(r"\d+\.to_(q|k|v|out)_lora\.(down|up)\.weight")


@dataclass(frozen=True)
class IPAdapterTensors:
    """What an IP-Adapter file holds."""

    image_proj: dict[str, Tensor]
    """The condition encoder's trained part, by the file's own names."""

    layers: dict[int, tuple[Tensor, Tensor]]
    """Of each attention layer, in the order of their ids, the weights of k and v, (d_i, c) each (A4A, Eq. 5 and 6)."""

    def flat(self) -> dict[str, Tensor]:
        """The tensors by the names that they have in a .safetensors file."""
        tensors = {f"image_proj.{name}": tensor for name, tensor in self.image_proj.items()}
        for number, (key, value) in self.layers.items():
            tensors[f"ip_adapter.{number}.to_k_ip.weight"] = key
            tensors[f"ip_adapter.{number}.to_v_ip.weight"] = value
        return tensors


def read_ip_adapter(given: str | PathLike[str] | Mapping[str, Any], *, allow_pickle: bool = False) -> IPAdapterTensors:
    """The tensors of an IP-Adapter file, or of a state dict in either of the two published forms.

    Args:
        given: a .safetensors file, a .bin file (with allow_pickle), or what such a file holds.
        allow_pickle: also read .bin. Only tensors are unpickled.

    Raises:
        ValueError: it is no IP-Adapter, damaged, or holds what no IP-Adapter holds; or its tokens depend on the time step
            (SD3.5's), so that it has no features to carry. The message says which.
    """
    if isinstance(given, Mapping):
        held, name = given, "The state dict"
    elif isinstance(given, str | PathLike):
        held, name = _read_file(Path(given), allow_pickle), str(given)
    else:
        raise TypeError(f"An IP-Adapter is a file or a state dict, not {type(given).__name__}.")
    image_proj, attention = _groups(held, name)
    _refuse_time_steps(image_proj, attention, name)
    layers = _layers(attention, name)
    tensors = IPAdapterTensors(image_proj, layers)
    _check_values(tensors.flat(), name)
    return tensors


def _read_file(path: Path, allow_pickle: bool) -> Mapping[str, Any]:
    if not path.is_file():
        what = "a folder; name the file in it" if path.is_dir() else "not there"
        raise ValueError(
            f"{path} is {what}. An IP-Adapter is one file, such as ip-adapter_sd15.safetensors "
            "(hf download h94/IP-Adapter models/ip-adapter_sd15.safetensors)."
        )
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or cut short ({error}); download it again.") from error
    if not allow_pickle:
        raise ValueError(
            f"{path} is not a .safetensors file. A pickle can run code when read: if you trust it, pass allow_pickle=True "
            "(only tensors are unpickled then)."
        )
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except (
        Exception
    ) as error:  # a cut file, no pickle at all, or one that wants to run code: each has a class of its own
        raise ValueError(f"{path} cannot be read as a file of tensors ({type(error).__name__}: {error}).") from error
    if not isinstance(held, Mapping):
        raise ValueError(f"{path} holds a {type(held).__name__}, not the tensors of an IP-Adapter.")
    return held


def _groups(held: Mapping[str, Any], name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The two groups, from the nested form (.bin) or the flat one (.safetensors)."""
    flat: dict[str, Any] = {}
    for key, value in held.items():
        if isinstance(value, Mapping):
            flat.update({f"{key}.{inner}": tensor for inner, tensor in value.items()})
        else:
            flat[str(key)] = value
    if any(key.startswith("image_proj_model.") for key in flat):
        raise ValueError(
            f"{name} is a training checkpoint of tencent-ailab/IP-Adapter. Rename image_proj_model.* to image_proj.* and "
            "adapter_modules.* to ip_adapter.*, as that repository's README shows."
        )
    missing = [group for group in _GROUPS if not any(key.startswith(f"{group}.") for key in flat)]
    if missing:
        raise ValueError(
            f"{name} is no IP-Adapter: it has no tensors under {' and '.join(f'{group!r}' for group in missing)}; "
            f"it holds {some(sorted(flat)) or 'nothing'}."
        )
    foreign = sorted(key for key in flat if key.partition(".")[0] not in _GROUPS)
    if foreign:
        raise ValueError(
            f"{name} holds {some(foreign)}, which no IP-Adapter holds; the known groups are image_proj and ip_adapter."
        )
    no_tensors = sorted(key for key, value in flat.items() if not isinstance(value, Tensor))
    if no_tensors:
        raise ValueError(f"In {name}, {some(no_tensors)} are no tensors.")
    image_proj, attention = (
        {key.removeprefix(f"{group}."): value for key, value in flat.items() if key.startswith(f"{group}.")}
        for group in _GROUPS
    )
    return image_proj, attention


def _refuse_time_steps(image_proj: Mapping[str, Tensor], attention: Mapping[str, Tensor], name: str) -> None:
    timed = [key for key in image_proj if "time_" in key or "adaln" in key]
    timed += [key for key in attention if "norm_ip" in key]
    if timed:
        raise ValueError(
            f"{name} makes other tokens at each time step ({some(timed)}), as the IP-Adapters of SD3.5 do. A4A carries features "
            "that are computed once; take an IP-Adapter of SD1.5 or SDXL."
        )


def _layers(attention: Mapping[str, Tensor], name: str) -> dict[int, tuple[Tensor, Tensor]]:
    found: dict[int, dict[str, Tensor]] = {}
    unexpected = []
    loras = 0
    for key, tensor in attention.items():
        if match := _LAYER.fullmatch(key):
            found.setdefault(int(match[1]), {})[match[2]] = tensor
        elif _LORA.fullmatch(key):
            loras += 1
        else:
            unexpected.append(f"ip_adapter.{key}")
    if unexpected:
        raise ValueError(
            f"{name} holds {some(sorted(unexpected))}, which no IP-Adapter holds. Expected: ip_adapter.<id>.to_k_ip.weight and "
            ".to_v_ip.weight."
        )
    if not found:
        raise ValueError(f"{name} has no ip_adapter.<id>.to_k_ip.weight: there is no attention layer to carry over.")
    for number, pair in sorted(found.items()):
        _check_pair(number, pair, name)
    missing = [str(number) for number in range(1, 2 * len(found), 2) if number not in found]
    if missing:
        raise ValueError(
            f"{name} lacks layers: cross-attention has the ids 1, 3, 5, …; {some(missing)} not there, {some([*map(str, found)])} "
            "are. Download it again."
        )
    widths = {pair["k"].shape[1] for pair in found.values()}
    if len(widths) > 1:
        raise ValueError(f"In {name} the layers take tokens of different widths, {sorted(widths)}.")
    if loras:
        warnings.warn(
            f"{name} holds {loras} LoRA tensors for the attention of the model it was trained on. They fit that model only "
            "and are left out.",
            UserWarning,
            stacklevel=4,
        )
    return {number: (found[number]["k"], found[number]["v"]) for number in sorted(found)}


def _check_pair(number: int, pair: Mapping[str, Tensor], name: str) -> None:
    for letter in "kv":
        if letter not in pair:
            other = "v" if letter == "k" else "k"
            raise ValueError(f"{name} has ip_adapter.{number}.to_{other}_ip.weight but no to_{letter}_ip.weight.")
        if pair[letter].ndim != 2:
            raise ValueError(
                f"ip_adapter.{number}.to_{letter}_ip.weight in {name} has the shape {tuple(pair[letter].shape)}; "
                "it should be (features, context), two sizes."
            )
    if pair["k"].shape != pair["v"].shape:
        raise ValueError(
            f"In {name}, layer {number} has a k of shape {tuple(pair['k'].shape)} and a v of {tuple(pair['v'].shape)}."
        )


def _check_values(tensors: Mapping[str, Tensor], name: str) -> None:
    broken = sorted(key for key, tensor in tensors.items() if not tensor.is_meta and not is_finite(tensor))
    if broken:
        raise ValueError(f"{len(broken)} tensors of {name} hold NaN or infinity: {some(broken)}. Download it again.")
