"""Where `forward_seconds` and `megabytes_per_rank` of the presets come from: the real denoisers, counted on the meta device.

`python -m benchmarks.dreambooth.flops` builds each denoiser from its published config without weights, counts the operations
of one call for one image of 512 x 512 pixels, and divides by what the card does. Nothing is downloaded.
"""

from __future__ import annotations

from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

PEAK = 364e12
"""bf16 operations per second of one RTX 6000 Ada without sparsity, by NVIDIA's data sheet."""
SHARE = 0.4
"""Of the peak that is assumed to be reached; not measured here."""


def sd15() -> tuple[Any, dict[str, Any]]:
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    return model, {"sample": _meta(1, 4, 64, 64), "timestep": 1, "encoder_hidden_states": _meta(1, 77, 768)}


def sdxl() -> tuple[Any, dict[str, Any]]:
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
    added = {"text_embeds": _meta(1, 1280), "time_ids": _meta(1, 6)}
    return model, {
        "sample": _meta(1, 4, 64, 64),
        "timestep": 1,
        "encoder_hidden_states": _meta(1, 77, 2048),
        "added_cond_kwargs": added,
    }


def sd35_large() -> tuple[Any, dict[str, Any]]:
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=128,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=38,
        attention_head_dim=64,
        num_attention_heads=38,
        joint_attention_dim=4096,
        caption_projection_dim=2432,
        pooled_projection_dim=2048,
        pos_embed_max_size=192,
        qk_norm="rms_norm",
    )
    return model, {
        "hidden_states": _meta(1, 16, 64, 64),
        "timestep": torch.ones(1, device="meta"),
        "encoder_hidden_states": _meta(1, 77 + 256, 4096),
        "pooled_projections": _meta(1, 2048),
    }


def flux_dev() -> tuple[Any, dict[str, Any]]:
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(guidance_embeds=True)
    return model, {
        "hidden_states": _meta(1, 1024, 64),
        "timestep": _meta(1),
        "guidance": _meta(1),
        "pooled_projections": _meta(1, 768),
        "encoder_hidden_states": _meta(1, 512, 4096),
        "img_ids": torch.zeros(1024, 3),  # rotary positions are looked at
        "txt_ids": torch.zeros(512, 3),
    }


DENOISERS = {"sd15": sd15, "sdxl": sdxl, "sd35-large": sd35_large, "flux-dev": flux_dev}
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


def count(name: str, targets: tuple[str, ...] = ATTENTION) -> tuple[float, float, float]:
    """Parameters, operations of one call, and megabytes (float32) per rank of a LoRA on the targets."""
    with torch.device("meta"):
        model, inputs = DENOISERS[name]()
    model.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**inputs)
    per_rank = sum(
        module.in_features + module.out_features
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and path.endswith(tuple(f".{target}" for target in targets))
    )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return float(parameters), float(counter.get_total_flops()), per_rank * 4 / 1e6


def _meta(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, device="meta")


def main() -> None:
    """Print what the presets hold."""
    table = Table("denoiser", "parameters, 1e9", "TFLOP per call", "forward_seconds", "megabytes_per_rank")
    for name in DENOISERS:
        parameters, operations, megabytes = count(name)
        seconds = operations / (PEAK * SHARE)
        table.add_row(name, f"{parameters / 1e9:.2f}", f"{operations / 1e12:.2f}", f"{seconds:.4f}", f"{megabytes:.2f}")
    _, _, megabytes = count("sdxl", ("attn2.to_k", "attn2.to_v"))
    table.add_row("sdxl, cross-attention k and v", "", "", "", f"{megabytes:.2f}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
