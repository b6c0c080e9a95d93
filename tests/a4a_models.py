"""Tiny models for the tests of A4A, and IP-Adapter files built by hand in every published key layout."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from xadapt.contract import Adapter
from xadapt_a4a import IP_ADAPTER

SD15_WIDTHS = [32, 64, 64, 64, 32, 32, 64]  # of `sd15_like`: down, up, mid
CONTEXT = 24

StateDict = dict[str, dict[str, Tensor]]


def sd15_like(seed: int = 0, **options: Any) -> nn.Module:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    given = {
        "sample_size": 8,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": CONTEXT,
        "attention_head_dim": 2,
        "norm_num_groups": 8,
    }
    return UNet2DConditionModel(**{**given, **options}).eval()


def sdxl_like(seed: int = 0) -> nn.Module:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=40,
        attention_head_dim=(2, 4),
        norm_num_groups=8,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=16 + 6 * 8,
    ).eval()


def pixart_like(seed: int = 0, layers: int = 3) -> nn.Module:
    from diffusers import PixArtTransformer2DModel

    torch.manual_seed(seed)
    return PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=4,
        out_channels=8,
        num_layers=layers,
        cross_attention_dim=48,
        caption_channels=20,
        sample_size=8,
        use_additional_conditions=False,
    ).eval()


def sd3_like(seed: int = 0) -> nn.Module:
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(seed)
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=20,
        caption_projection_dim=32,
        pooled_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    ).eval()


def flux_like(seed: int = 0) -> nn.Module:
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(seed)
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=2,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=20,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
    ).eval()


def sana_like(seed: int = 0) -> nn.Module:
    from diffusers import SanaTransformer2DModel

    torch.manual_seed(seed)
    return SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=20,
        sample_size=8,
        patch_size=1,
        qk_norm="rms_norm_across_heads",
    ).eval()


def hunyuan_like(seed: int = 0) -> nn.Module:
    from diffusers import HunyuanDiT2DModel

    torch.manual_seed(seed)
    return HunyuanDiT2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        patch_size=2,
        sample_size=8,
        hidden_size=32,
        num_layers=4,
        mlp_ratio=2.0,
        cross_attention_dim=20,
        cross_attention_dim_t5=24,
        pooled_projection_dim=16,
        text_len=5,
        text_len_t5=5,
    ).eval()


def attention_layers(widths: list[int], context: int = CONTEXT, seed: int = 1) -> dict[str, Tensor]:
    """The group `ip_adapter`: ids 1, 3, 5, … as self- and cross-attention alternate."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{2 * index + 1}.to_{letter}_ip.weight": torch.randn(width, context, generator=generator) / context**0.5
        for index, width in enumerate(widths)
        for letter in "kv"
    }


def base_file(widths: list[int], *, context: int = CONTEXT, embed: int = 16, seed: int = 0) -> StateDict:
    """ip-adapter_sd15, _light, ip-adapter_sdxl."""
    proj = {"proj": (4 * context, embed), "norm": context}
    return {"image_proj": _tensors(proj, seed), "ip_adapter": attention_layers(widths, context, seed + 1)}


def full_file(widths: list[int], *, context: int = CONTEXT, embed: int = 16) -> StateDict:
    """ip-adapter-full-face_sd15."""
    proj = {"proj.0": (embed, embed), "proj.2": (context, embed), "proj.3": context}
    return {"image_proj": _tensors(proj), "ip_adapter": attention_layers(widths, context)}


def plus_file(widths: list[int], *, context: int = CONTEXT, embed: int = 16, tokens: int = 6) -> StateDict:
    """ip-adapter-plus_sd15, -plus-face_sd15, ip-adapter-plus_sdxl_vit-h."""
    return {"image_proj": _resampler("", 32, embed, context, tokens), "ip_adapter": attention_layers(widths, context)}


def faceid_file(widths: list[int], *, context: int = CONTEXT, embed: int = 16, lora: bool = True) -> StateDict:
    """ip-adapter-faceid_sd15, with the LoRA for its own base."""
    proj = {"proj.0": (2 * embed, embed), "proj.2": (4 * context, 2 * embed), "norm": context}
    attention = attention_layers(widths, context)
    if lora:
        for index, width in enumerate(widths):
            for letter in ("q", "k", "v", "out"):
                attention[f"{2 * index + 1}.to_{letter}_lora.down.weight"] = torch.randn(4, width)
                attention[f"{2 * index + 1}.to_{letter}_lora.up.weight"] = torch.randn(width, 4)
    return {"image_proj": _tensors(proj), "ip_adapter": attention}


def faceid_plus_file(widths: list[int], *, context: int = CONTEXT, embed: int = 16) -> StateDict:
    """ip-adapter-faceid-plus_sd15 and -plusv2."""
    proj = {"proj.0": (2 * embed, embed), "proj.2": (4 * context, 2 * embed), "norm": context}
    resampler = _resampler("perceiver_resampler.", context, 20, context, None)
    return {"image_proj": {**_tensors(proj), **resampler}, "ip_adapter": attention_layers(widths, context)}


def flat(state_dict: StateDict) -> dict[str, Tensor]:
    """The form of .safetensors files."""
    return {f"{group}.{name}": tensor for group, tensors in state_dict.items() for name, tensor in tensors.items()}


def _resampler(prefix: str, dim: int, embed: int, out: int, tokens: int | None) -> dict[str, Tensor]:
    inner = 64
    sizes: dict[str, Any] = {"proj_in": (dim, embed), "proj_out": (out, dim), "norm_out": out}
    matrices: dict[str, Any] = {}
    for layer in range(4):
        sizes |= {f"layers.{layer}.0.norm1": dim, f"layers.{layer}.0.norm2": dim, f"layers.{layer}.1.0": dim}
        matrices |= {
            f"layers.{layer}.0.to_q.weight": (inner, dim),
            f"layers.{layer}.0.to_kv.weight": (2 * inner, dim),
            f"layers.{layer}.0.to_out.weight": (dim, inner),
            f"layers.{layer}.1.1.weight": (4 * dim, dim),
            f"layers.{layer}.1.3.weight": (dim, 4 * dim),
        }
    generator = torch.Generator().manual_seed(5)
    tensors = _tensors(sizes, 4)
    tensors |= {name: torch.randn(*shape, generator=generator) / shape[1] ** 0.5 for name, shape in matrices.items()}
    if tokens is not None:
        tensors["latents"] = torch.randn(1, tokens, dim, generator=generator)
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def _tensors(sizes: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Weight and bias of a linear layer for each (out, in), of a LayerNorm for each width."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, size in sizes.items():
        if isinstance(size, int):
            tensors[f"{name}.weight"] = 1 + 0.1 * torch.randn(size, generator=generator)
            tensors[f"{name}.bias"] = 0.1 * torch.randn(size, generator=generator)
        else:
            tensors[f"{name}.weight"] = torch.randn(*size, generator=generator) / size[1] ** 0.5
            tensors[f"{name}.bias"] = 0.1 * torch.randn(size[0], generator=generator)
    return tensors


def run(target: nn.Module, batch: int = 2, seed: int = 7) -> Tensor:
    """One call of any of the targets above, on inputs that depend on the seed only."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    kind = type(target).__name__
    times = torch.full((batch,), 500)
    if kind == "FluxTransformer2DModel":
        image, text = random(batch, 16, 4), random(batch, 5, 20)
        inputs: dict[str, Any] = {
            "encoder_hidden_states": text,
            "pooled_projections": random(batch, 16),
            "timestep": times / 1000,
            "img_ids": torch.stack(torch.meshgrid(torch.zeros(1), torch.arange(4.0), torch.arange(4.0), indexing="ij"))
            .reshape(3, -1)
            .T,
            "txt_ids": torch.zeros(5, 3),
        }
        return target(image, **inputs, return_dict=False)[0]
    context = None if kind == "UNet2DConditionModel" else 20
    sample = random(batch, 4, 8, 8)
    text = random(batch, 5, context or target.config.cross_attention_dim)
    inputs = {"encoder_hidden_states": text, "timestep": times}
    if kind == "PixArtTransformer2DModel":
        inputs["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    elif kind == "SD3Transformer2DModel":
        inputs["pooled_projections"] = random(batch, 16)
    elif kind == "HunyuanDiT2DModel":
        angles = random(16, 16)
        inputs["timestep"] = times.float()
        inputs |= {
            "text_embedding_mask": torch.ones(batch, 5),
            "encoder_hidden_states_t5": random(batch, 5, 24),
            "text_embedding_mask_t5": torch.ones(batch, 5),
            "image_meta_size": torch.ones(batch, 6),
            "style": torch.zeros(batch, dtype=torch.long),
            "image_rotary_emb": (angles.cos(), angles.sin()),
        }
    elif kind == "UNet2DConditionModel" and target.config.addition_embed_type == "text_time":
        inputs["added_cond_kwargs"] = {"text_embeds": random(batch, 16), "time_ids": torch.ones(batch, 6)}
    return target(sample, **inputs, return_dict=False)[0]


def ip_adapter(seed: int = 0) -> Adapter:
    return Adapter(kind=IP_ADAPTER, config={}, tensors=flat(base_file(SD15_WIDTHS, seed=seed)))


def batch_for(target: nn.Module, size: int = 4, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    kind = type(target).__name__
    width = target.config.cross_attention_dim if kind == "UNet2DConditionModel" else 20
    batch: dict[str, Any] = {
        "image_embeds": random(size, 16),
        "latents": random(size, 4, 8, 8),
        "encoder_hidden_states": random(size, 5, width),
    }
    if kind == "PixArtTransformer2DModel":
        batch["encoder_attention_mask"] = torch.ones(size, 5)
        batch["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    elif kind == "SD3Transformer2DModel":
        batch["pooled_projections"] = random(size, 16)
    elif target.config.addition_embed_type == "text_time":
        batch["added_cond_kwargs"] = {"text_embeds": random(size, 16), "time_ids": torch.ones(size, 6)}
    return batch
