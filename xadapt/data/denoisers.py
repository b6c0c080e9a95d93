"""Inputs for a denoiser, drawn at random from what its config says it takes: latents, times and conditioning of no picture.

They compare two denoisers without labels and without data. What they cannot tell is how the two behave on real pictures.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from xadapt.contract import Base

TOKENS = 16  # of conditioning; any number does


def is_denoiser(base: Base) -> bool:
    """Whether a base is a U-Net or transformer of diffusers that predicts noise."""
    network = base.modules()[""]
    return type(network).__module__.startswith("diffusers.") and "timestep" in _arguments(network)


def random_times(count: int, generator: torch.Generator) -> Tensor:
    """Steps of the noise schedule, 1 to 999: (count,)."""
    return torch.randint(1, 1000, (count,), generator=generator)


def random_inputs(
    base: Base, times: Tensor, generator: torch.Generator, latents: Tensor | None = None
) -> dict[str, Any]:
    """Arguments of a denoiser's forward.

    Args:
        times: (count,), a sample each.
        latents: (count, channels, height, width) of real pictures, already noised; normal noise by default.

    Raises:
        ValueError: its config does not say what it takes.
    """
    network = base.modules()[""]
    config: Mapping[str, Any] = dict(getattr(base, "config", {}))
    wanted = _arguments(network)

    def normal(*shape: int) -> Tensor:
        return torch.randn(len(times), *shape, generator=generator)

    size, channels = size_of(config), int(config.get("in_channels") or 4)
    inputs: dict[str, Any] = {"timestep": times}
    if "img_ids" in wanted:  # FLUX: latents as a row of 2 × 2 patches, times from 0 to 1
        rows, columns = size[0] // 2, size[1] // 2
        inputs["hidden_states"] = normal(rows * columns, channels) if latents is None else _packed(latents, channels)
        inputs["timestep"] = times / 1000
        inputs["img_ids"] = torch.tensor([(0.0, row, column) for row in range(rows) for column in range(columns)])
        inputs["txt_ids"] = torch.zeros(TOKENS, 3)
        if config.get("guidance_embeds"):
            inputs["guidance"] = torch.full((len(times),), 3.5)
    else:
        inputs["sample" if "sample" in wanted else "hidden_states"] = (
            normal(channels, *size) if latents is None else latents
        )
    width = next((config[name] for name in _WIDTHS if isinstance(config.get(name), int)), None)
    if "encoder_hidden_states" in wanted:
        if width is None:
            raise ValueError(
                f"{base.name}: its config does not say how wide its conditioning is ({', '.join(_WIDTHS)}). Pass batches: dicts "
                "of the arguments of its forward."
            )
        inputs["encoder_hidden_states"] = normal(TOKENS, width)
    if "pooled_projections" in wanted:
        inputs["pooled_projections"] = normal(int(config["pooled_projection_dim"]))
    if "added_cond_kwargs" in wanted:
        inputs["added_cond_kwargs"] = _added(config, normal, size)
    return inputs


def _packed(latents: Tensor, width: int) -> Tensor:
    """FLUX's (count, height/2 · width/2, 4 · channels) of latents (count, channels, height, width), a patch of 2 × 2 a row."""
    count, channels, height, across = latents.shape
    if 4 * channels != width:
        raise ValueError(
            f"The VAE's latents have {channels} channels, and this denoiser takes {width} for a patch, not {4 * channels}."
        )
    patches = latents.view(count, channels, height // 2, 2, across // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(count, (height // 2) * (across // 2), width)


_WIDTHS = ("caption_channels", "joint_attention_dim", "cross_attention_dim")


def _added(config: Mapping[str, Any], normal: Any, size: tuple[int, int]) -> dict[str, Any]:
    if config.get("addition_embed_type") == "text_time":  # SDXL
        times = 6 * int(config["addition_time_embed_dim"])
        pooled = int(config["projection_class_embeddings_input_dim"]) - times
        embeds = normal(pooled)
        pixels = torch.tensor([8.0 * size[0], 8.0 * size[1], 0.0, 0.0, 8.0 * size[0], 8.0 * size[1]])
        return {"text_embeds": embeds, "time_ids": pixels.expand(embeds.shape[0], 6)}
    return {"resolution": None, "aspect_ratio": None}  # PixArt asks for them by name


def size_of(config: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width of the latents that a denoiser's config speaks of; 16 × 16 where it leaves them open."""
    size = config.get("sample_size") or 16
    return (int(size[0]), int(size[1])) if isinstance(size, list | tuple) else (int(size), int(size))


def _arguments(network: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(type(network).forward).parameters
