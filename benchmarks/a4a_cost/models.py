"""Denoisers in the shapes of SD1.5, SDXL and PixArt-α with random weights, and random IP-Adapter files that fit them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from xadapt_a4a.scratch import layer_ids
from xadapt_a4a.targets import find_attention_layers

EMBED = 512  # the width of the face embedding that FaceID files take; their number of tokens can be chosen


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How much of the full width is built, and on how large an image."""

    name: str
    kind: str  # "sd15", "sdxl" or "pixart"
    divide: int  # the full widths over this; depth and number of layers stay
    side: int  # of the latents

    def build(self, device: str, dtype: torch.dtype) -> nn.Module:
        """The denoiser, frozen."""
        torch.manual_seed(0)
        model: Any = {"sd15": _sd15, "sdxl": _sdxl, "pixart": _pixart}[self.kind](self)
        moved = nn.Module.to(model, device, dtype)  # diffusers' own `to` comments on each call
        return moved.eval().requires_grad_(False)


def _sd15(shape: Shape) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=shape.side,
        block_out_channels=tuple(width // shape.divide for width in (320, 640, 1280, 1280)),
        cross_attention_dim=768 // shape.divide,
        attention_head_dim=8,
        norm_num_groups=math.gcd(32, 320 // shape.divide),
    )


def _sdxl(shape: Shape) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=shape.side,
        block_out_channels=tuple(width // shape.divide for width in (320, 640, 1280)),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048 // shape.divide,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256 // shape.divide,
        projection_class_embeddings_input_dim=2816 // shape.divide,
        norm_num_groups=math.gcd(32, 320 // shape.divide),
    )


def _pixart(shape: Shape) -> Any:
    from diffusers import PixArtTransformer2DModel

    width = 1152 // shape.divide
    return PixArtTransformer2DModel(
        num_attention_heads=16,
        attention_head_dim=width // 16,
        num_layers=28,
        cross_attention_dim=width,
        caption_channels=4096 // shape.divide,
        sample_size=shape.side,
        use_additional_conditions=False,
    )


def inputs(shape: Shape, model: Any, batch: int, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """One call's arguments: 77 text tokens (PixArt 120)."""
    generator = torch.Generator().manual_seed(1)

    def random(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator).to(device, dtype)

    context = model.config.caption_channels if shape.kind == "pixart" else model.config.cross_attention_dim
    found: dict[str, Any] = {
        "sample" if shape.kind != "pixart" else "hidden_states": random(batch, 4, shape.side, shape.side),
        "timestep": torch.full((batch,), 500, device=device),
        "encoder_hidden_states": random(batch, 120 if shape.kind == "pixart" else 77, context),
        "return_dict": False,
    }
    if shape.kind == "sdxl":
        pooled = model.config.projection_class_embeddings_input_dim - 6 * model.config.addition_time_embed_dim
        ids = torch.ones(batch, 6, device=device)
        found["added_cond_kwargs"] = {"text_embeds": random(batch, pooled), "time_ids": ids}
    if shape.kind == "pixart":
        found["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    return found


def ip_adapter(model: Any, tokens: int, context: int) -> dict[str, dict[str, Tensor]]:
    """A random file in the layout of FaceID, for all attention layers of the model, with so many tokens of that width."""
    generator = torch.Generator().manual_seed(2)

    def random(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator) / sizes[-1] ** 0.5

    layers = find_attention_layers(model)
    projection = {
        "proj.0.weight": random(2 * EMBED, EMBED),
        "proj.0.bias": torch.zeros(2 * EMBED),
        "proj.2.weight": random(tokens * context, 2 * EMBED),
        "proj.2.bias": torch.zeros(tokens * context),
        "norm.weight": torch.ones(context),
        "norm.bias": torch.zeros(context),
    }
    attention = {
        f"{number}.to_{letter}_ip.weight": random(layer.width, context)
        for number, layer in zip(layer_ids(model, layers), layers, strict=True)
        for letter in "kv"
    }
    return {"image_proj": projection, "ip_adapter": attention}
