"""What the tests of the LoRA layouts share: tiny models of every family, random LoRAs, and what a LoRA adds to a weight."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from tests.conftest import make_unet
from tests.test_integration_diffusers import make_sd3
from xadapt.layouts import PlainLora, minimal_config

RANKS, ALPHAS = (4, 4, 2), (4.0, 2.0, 4.0, 3.0)


def make_clip(with_projection: bool = False) -> Any:
    torch.manual_seed(1)
    config = CLIPTextConfig(
        vocab_size=50,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=12,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return (CLIPTextModelWithProjection if with_projection else CLIPTextModel)(config).eval()


def make_sdxl_unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=60,
        cross_attention_dim=24,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    return unet.eval()


def make_flux(width: int = 16, device: str = "cpu") -> FluxTransformer2DModel:
    torch.manual_seed(0)
    with torch.device(device):
        return FluxTransformer2DModel(
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=width // 2,
            num_attention_heads=2,
            joint_attention_dim=24,
            pooled_projection_dim=12,
            axes_dims_rope=(2, 2, width // 2 - 4),
        ).eval()


def make_pipeline(family: str) -> Any:
    """A pipeline with the networks that can carry a LoRA, and nothing else."""
    ddim, flow = DDIMScheduler(steps_offset=1, clip_sample=False), FlowMatchEulerDiscreteScheduler()
    bare: dict[str, Any] = {"vae": None, "tokenizer": None, "text_encoder": make_clip()}
    if family == "sd15":
        extra = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        return StableDiffusionPipeline(unet=make_unet(), scheduler=ddim, **bare, **extra)
    if family == "sdxl":
        second = {"text_encoder_2": make_clip(with_projection=True), "tokenizer_2": None}
        return StableDiffusionXLPipeline(unet=make_sdxl_unet(), scheduler=ddim, **bare, **second)
    second = {"text_encoder_2": None, "tokenizer_2": None}
    if family == "flux":
        return FluxPipeline(transformer=make_flux(), scheduler=flow, **bare, **second)
    bare["text_encoder"], second["text_encoder_2"] = make_clip(with_projection=True), make_clip(with_projection=True)
    third = {"text_encoder_3": None, "tokenizer_3": None}
    return StableDiffusion3Pipeline(transformer=make_sd3(), scheduler=flow, **bare, **second, **third)


def adaptable(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The weight's shape of every linear and convolution, by module path."""
    kinds = (nn.Linear, nn.Conv2d)
    return {name: tuple(module.weight.shape) for name, module in model.named_modules() if isinstance(module, kinds)}


def random_lora(model: nn.Module, targets: str = ".*", *, alpha: float | None = None, **options: Any) -> PlainLora:
    """A LoRA on the layers whose path matches, with ranks and alphas that differ (unless `alpha` is given)."""
    generator = torch.Generator().manual_seed(3)
    tensors: dict[str, Tensor] = {}
    table: dict[str, tuple[int, float]] = {}
    layers = {path: shape for path, shape in adaptable(model).items() if re.fullmatch(targets, path)}
    for number, (path, (outputs, inputs, *kernel)) in enumerate(layers.items()):
        rank = RANKS[number % len(RANKS)]
        tensors[f"{path}.lora_A.weight"] = torch.randn(rank, inputs, *kernel, generator=generator)
        tensors[f"{path}.lora_B.weight"] = torch.randn(outputs, rank, *[1] * len(kernel), generator=generator)
        table[path] = (rank, alpha or ALPHAS[number % len(ALPHAS)])
    modules = [name for name, _ in model.named_modules()]
    return PlainLora(minimal_config(table, modules, **options), tensors)


def deltas(lora: PlainLora) -> dict[str, Tensor]:
    """What the LoRA adds to each weight, in float64."""
    added = {}
    for path, layer in lora.layers().items():
        a, b = layer["lora_A.weight"].double(), layer["lora_B.weight"].double()
        added[path] = lora.scaling(path) * (b.flatten(1) @ a.flatten(1)).reshape(b.shape[0], *a.shape[1:])
    return added


def live_deltas(model: nn.Module) -> dict[str, Tensor]:
    """The same of the LoRA a stock loader put on a model."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    return {name: module.get_delta_weight(module.active_adapters[0]) for name, module in layers.items()}


def assert_same(one: Mapping[str, Tensor], other: Mapping[str, Tensor], tolerance: float = 1e-5) -> None:
    assert one.keys() == other.keys()
    for path, delta in one.items():
        error = (delta.double() - other[path].double()).norm() / other[path].double().norm()
        assert error <= tolerance, f"{path}: {error}"


COMPONENTS = {
    "sd15": ("unet", "text_encoder"),
    "sdxl": ("unet", "text_encoder", "text_encoder_2"),
    "sd3": ("transformer", "text_encoder", "text_encoder_2"),
    "flux": ("transformer", "text_encoder"),
}
CLIP_LAYERS = r".*(_proj|fc1)"  # text_projection among them


def loras_for(pipeline: Any, family: str) -> dict[str, PlainLora]:
    return {
        component: random_lora(getattr(pipeline, component), CLIP_LAYERS if "text" in component else ".*")
        for component in COMPONENTS[family]
    }
