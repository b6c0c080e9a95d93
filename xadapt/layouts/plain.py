"""One stock LoRA of one component, detached from any file and from any base."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from peft import LoraConfig
from torch import Tensor

from xadapt.errors import some
from xadapt.factors import alpha_of, rank_of, scaling_of

PARAMETERS = (
    "lora_A.weight",
    "lora_B.weight",
    "lora_B.bias",
    "lora_embedding_A",
    "lora_embedding_B",
    "lora_magnitude_vector",
)
_PAIRS = (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B"))


@dataclass(frozen=True)
class PlainLora:
    """One stock LoRA of one component.

    Args:
        config: r, lora_alpha, their patterns and target_modules say together with the tensors all there is to say.
        tensors: named by module path in the base + one of `PARAMETERS`, without `base_model.model.` and adapter name.
    """

    config: LoraConfig
    tensors: Mapping[str, Tensor]

    def layers(self) -> dict[str, dict[str, Tensor]]:
        """The tensors by module path, then by parameter.

        Raises:
            ValueError: a name is no LoRA parameter's, a layer lacks one of its two sides, or the sides do not fit.
        """
        layers: dict[str, dict[str, Tensor]] = {}
        strangers = []
        for name, tensor in self.tensors.items():
            path, parameter = split(name)
            if not parameter:
                strangers.append(name)
            layers.setdefault(path, {})[parameter] = tensor
        if strangers:
            raise ValueError(f"No LoRA tensors: {some(strangers)}. Names end in one of {', '.join(PARAMETERS)}.")
        for path, layer in layers.items():
            rank_between(path, layer)
        return layers

    def scaling(self, path: str) -> float:
        """What the product B A of this layer is multiplied by: alpha / r, or alpha / √r with rslora."""
        return scaling_of(self.config, path, rank_of(self.config, path))

    def ranks_and_alphas(self) -> dict[str, tuple[int, float]]:
        """(rank, alpha) per module path with alpha / rank = `scaling`, whatever the config calls it.

        Raises:
            ValueError: as `layers`; or a rank is not the one the config gives.
        """
        table = {}
        for path, layer in self.layers().items():
            rank = rank_between(path, layer)
            if rank != rank_of(self.config, path):
                raise ValueError(
                    f"{path} has tensors of rank {rank}, but its config says {rank_of(self.config, path)} "
                    "(r, rank_pattern); build the config with xadapt.layouts.minimal_config."
                )
            alpha = alpha_of(self.config, path)
            table[path] = (rank, alpha * math.sqrt(rank) if self.config.use_rslora else alpha)
        return table


@dataclass(frozen=True)
class LoraFile:
    """What a LoRA file holds.

    Args:
        components: a LoRA per component ("unet", "text_encoder", …); "" where the file names none.
        not_understood: the file's tensors that are in no component.
        layout: "peft", "diffusers" or "kohya".
    """

    components: dict[str, PlainLora]
    not_understood: tuple[str, ...]
    layout: str


def split(name: str) -> tuple[str, str]:
    """(module path, parameter) of a tensor's name; the parameter is "" if it is no LoRA's."""
    for parameter in PARAMETERS:
        if name.endswith(f".{parameter}"):
            return name[: -len(parameter) - 1], parameter
    return name, ""


def rank_between(path: str, layer: Mapping[str, Tensor]) -> int:
    """The rank both sides of a layer agree on.

    Raises:
        ValueError: one side is missing, or the two do not fit.
    """
    for down, up in _PAIRS:
        if down in layer and up in layer:
            a, b = layer[down], layer[up]
            if not (a.is_floating_point() and b.is_floating_point()):
                raise ValueError(f"{path} has tensors of {a.dtype} and {b.dtype}; a LoRA's are floating point.")
            if a.dim() < 2 or b.dim() != a.dim() or a.shape[0] != b.shape[1] or a.shape[0] == 0:
                raise ValueError(
                    f"{path}: A of shape {tuple(a.shape)} and B of shape {tuple(b.shape)} make no LoRA; "
                    "A is (rank, in, …), B is (out, rank, …), with one and the same rank."
                )
            return int(a.shape[0])
        if down in layer or up in layer:
            there, gone = (down, up) if down in layer else (up, down)
            raise ValueError(f"{path} has {there} but no {gone}; the file is cut short: save or download it again.")
    raise ValueError(f"{path} has {', '.join(sorted(layer))}, but neither A nor B: that is no LoRA layer.")
