"""What each kind of target is told beside the noisy image and the time: its prompt, and whatever comes with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

Flat = dict[str, Tensor]
"""Tensors by their names in a batch, those in dicts by path: "added_cond_kwargs.text_embeds"."""

_FLUX_GUIDANCE = 3.5  # what distilled models are told in training, as in diffusers' own scripts


@dataclass(frozen=True)
class View:
    """The square that is cut from an image."""

    image: Image.Image
    original: tuple[int, int]  # height, width, before
    corner: tuple[int, int]  # top, left, in the resized image


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """ "a.b" as {"a": {"b": …}}."""
    result: dict[str, Any] = {}
    for name, value in flat.items():
        *path, last = name.split(".")
        place = result
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
    return result


class Family:
    """What one kind of target is told beside noise and time. This one: Stable Diffusion 1 and 2, nothing but the prompt."""

    def multiple(self, target: Any) -> int:
        """What the sides of latents have to be multiples of."""
        return int(2 ** (len(target.config.block_out_channels) - 1))

    def conditions(self, pipe: Any, captions: list[str], views: Sequence[View], device: torch.device) -> Flat:
        return {"encoder_hidden_states": pipe.encode_prompt(captions, device, 1, False)[0]}

    def empty(self, pipe: Any, device: torch.device) -> Flat:
        return {"encoder_hidden_states": pipe.encode_prompt("", device, 1, True)[1]}

    def complete(self, target: Any, batch: dict[str, Any]) -> dict[str, Any]:
        return batch


class SDXL(Family):
    """Also the pooled prompt, and where and from how large an image the square was cut."""

    def conditions(self, pipe: Any, captions: list[str], views: Sequence[View], device: torch.device) -> Flat:
        prompt, _, pooled, _ = pipe.encode_prompt(captions, device=device, do_classifier_free_guidance=False)
        times = [(*view.original, *view.corner, view.image.height, view.image.width) for view in views]
        return {
            "encoder_hidden_states": prompt,
            "added_cond_kwargs.text_embeds": pooled,
            "added_cond_kwargs.time_ids": torch.tensor(times, dtype=torch.float32),
        }

    def empty(self, pipe: Any, device: torch.device) -> Flat:
        _, prompt, _, pooled = pipe.encode_prompt("", device=device, do_classifier_free_guidance=True)
        return {"encoder_hidden_states": prompt, "added_cond_kwargs.text_embeds": pooled}


class PixArt(Family):
    """Also which of the prompt's tokens count; of models for 1024 pixels, the image's size."""

    def multiple(self, target: Any) -> int:
        return int(target.config.patch_size)

    def conditions(self, pipe: Any, captions: list[str], views: Sequence[View], device: torch.device) -> Flat:
        prompt, mask, _, _ = pipe.encode_prompt(captions, do_classifier_free_guidance=False, device=device)
        return {"encoder_hidden_states": prompt, "encoder_attention_mask": mask}

    def empty(self, pipe: Any, device: torch.device) -> Flat:
        _, _, prompt, mask = pipe.encode_prompt("", do_classifier_free_guidance=True, device=device)
        return {"encoder_hidden_states": prompt, "encoder_attention_mask": mask}

    def complete(self, target: Any, batch: dict[str, Any]) -> dict[str, Any]:
        sizes: dict[str, Any] = {"resolution": None, "aspect_ratio": None}
        if target.use_additional_conditions:
            latents = batch["latents"]
            side = float(latents.shape[-1] * 8)
            sizes = {
                "resolution": latents.new_full((len(latents), 2), side),
                "aspect_ratio": latents.new_ones(len(latents), 1),
            }
        return {**batch, "added_cond_kwargs": sizes}


class SD3(Family):
    """Also the pooled prompt."""

    def multiple(self, target: Any) -> int:
        return int(target.config.patch_size)

    def conditions(self, pipe: Any, captions: list[str], views: Sequence[View], device: torch.device) -> Flat:
        prompt, _, pooled, _ = pipe.encode_prompt(captions, None, None, device, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": prompt, "pooled_projections": pooled}

    def empty(self, pipe: Any, device: torch.device) -> Flat:
        _, prompt, _, pooled = pipe.encode_prompt("", None, None, device, do_classifier_free_guidance=True)
        return {"encoder_hidden_states": prompt, "pooled_projections": pooled}


class Flux(Family):
    """Also the pooled prompt and places; latents as a sequence of 2×2 patches."""

    def multiple(self, target: Any) -> int:
        return 2

    def conditions(self, pipe: Any, captions: list[str], views: Sequence[View], device: torch.device) -> Flat:
        prompt, pooled, _ = pipe.encode_prompt(captions, None, device)
        return {"encoder_hidden_states": prompt, "pooled_projections": pooled}

    def empty(self, pipe: Any, device: torch.device) -> Flat:
        return self.conditions(pipe, [""], [], device)

    def complete(self, target: Any, batch: dict[str, Any]) -> dict[str, Any]:
        from diffusers.pipelines.flux.pipeline_flux import FluxPipeline

        pack: Callable[..., Tensor] = FluxPipeline._pack_latents
        places: Callable[..., Tensor] = FluxPipeline._prepare_latent_image_ids
        latents = batch["latents"]
        size, channels, height, width = latents.shape
        batch = {
            **batch,
            "latents": pack(latents, size, channels, height, width),
            "img_ids": places(size, height // 2, width // 2, latents.device, latents.dtype),
            "txt_ids": latents.new_zeros(batch["encoder_hidden_states"].shape[1], 3),
        }
        return (
            {**batch, "guidance": latents.new_full((size,), _FLUX_GUIDANCE)} if target.config.guidance_embeds else batch
        )


_FAMILIES: dict[str, Family] = {
    "UNet2DConditionModel": Family(),
    "PixArtTransformer2DModel": PixArt(),
    "SD3Transformer2DModel": SD3(),
    "FluxTransformer2DModel": Flux(),
}


def family_of(target: Any) -> Family:
    """ValueError for targets whose conditions are not known here."""
    name = type(target).__name__
    extra = getattr(target.config, "addition_embed_type", None)
    if name not in _FAMILIES or extra not in (None, "text_time"):
        raise ValueError(
            f"Images and captions can be encoded for {', '.join(_FAMILIES)}; what {name} is told beside the prompt is not known "
            "here. Pass batches that are ready: a list of dicts with image_embeds, latents and all that its forward takes."
        )
    return SDXL() if extra == "text_time" else _FAMILIES[name]
