"""Tiny pipelines of the four families: real diffusers classes, built from configs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.dreambooth.tiny.drawing import PIXELS, words
from benchmarks.dreambooth.tiny.tokens import LENGTH, clip_tokenizer, t5_tokenizer

CHANNELS = 16  # of the latents
TEXT = 48  # width of CLIP
T5 = 2 * TEXT  # SD3 puts both CLIPs side by side and T5 below them
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "prediction_type": "v_prediction"}
# v, not the noise: what is drawn from pure noise has next to no weight in the loss of the noise, and little time to be learnt


def autoencoder() -> Any:
    """16 x 16 pixels to 4 x 4 latents."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=8,
        sample_size=PIXELS,
        mid_block_add_attention=False,
    )


def clip() -> Any:
    """A CLIP that reads `words` and sees 16 x 16 pixels."""
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    tokenizer = clip_tokenizer(words())
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT,
        intermediate_size=4 * TEXT,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        projection_dim=TEXT,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=PIXELS,
        patch_size=4,
        projection_dim=TEXT,
    )
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=TEXT))


def classifier(labels: list[str]) -> Any:
    """A ViT for these labels; without its head it is the judge of DINO-I."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=PIXELS,
        patch_size=4,
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
    )
    return ViTForImageClassification(config)


@dataclass(frozen=True)
class Parts:
    """What all pipelines share, trained already."""

    vae: Any
    clip: Any
    mean: float  # of the latents
    std: float


def _text_encoder(clip_model: Any, *, projected: bool) -> Any:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    kind = CLIPTextModelWithProjection if projected else CLIPTextModel
    encoder: Any = kind(clip_model.config.text_config)
    wanted = encoder.state_dict().keys()
    state = clip_model.state_dict()
    prefix = "" if all(name in state for name in wanted) else "text_model."
    encoder.load_state_dict({name: state[name if name in state else f"{prefix}{name}"] for name in wanted})
    return encoder


def _t5() -> Any:
    """Frozen and never trained: its features tell words apart, which is all that is asked of them."""
    from transformers import T5Config, T5EncoderModel

    tokenizer = t5_tokenizer(words())
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=T5,
        d_kv=16,
        d_ff=2 * T5,
        num_layers=1,
        num_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        dropout_rate=0.0,
    )
    return T5EncoderModel(config)


def _vae(parts: Parts, *, shifted: bool) -> Any:
    vae = parts.vae
    vae.register_to_config(scaling_factor=1 / parts.std, shift_factor=parts.mean if shifted else None)
    return vae


def _unet(**options: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=PIXELS // 4,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=8,
        **options,
    )


def sd(parts: Parts) -> Any:
    """A U-Net that is told the prompt by cross-attention."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    return StableDiffusionPipeline(
        vae=_vae(parts, shifted=False),
        text_encoder=_text_encoder(parts.clip, projected=False),
        tokenizer=clip_tokenizer(words()),
        unet=_unet(cross_attention_dim=TEXT, attention_head_dim=4),
        scheduler=DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl(parts: Parts) -> Any:
    """A U-Net with two text encoders, a pooled text, and sizes."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    unet = _unet(
        cross_attention_dim=2 * TEXT,
        attention_head_dim=(4, 8),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=TEXT + 6 * 8,
    )
    return StableDiffusionXLPipeline(
        vae=_vae(parts, shifted=False),
        text_encoder=_text_encoder(parts.clip, projected=False),
        text_encoder_2=_text_encoder(parts.clip, projected=True),
        tokenizer=clip_tokenizer(words()),
        tokenizer_2=clip_tokenizer(words()),
        unet=unet,
        scheduler=EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1),
        add_watermarker=False,
    )


def sd3(parts: Parts) -> Any:
    """A transformer over image and text together, by flow matching."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    transformer = SD3Transformer2DModel(
        sample_size=PIXELS // 4,
        patch_size=1,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=T5,
        caption_projection_dim=64,
        pooled_projection_dim=2 * TEXT,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        vae=_vae(parts, shifted=True),
        text_encoder=_text_encoder(parts.clip, projected=True),
        text_encoder_2=_text_encoder(parts.clip, projected=True),
        text_encoder_3=_t5(),
        tokenizer=clip_tokenizer(words()),
        tokenizer_2=clip_tokenizer(words()),
        tokenizer_3=t5_tokenizer(words()),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def flux(parts: Parts) -> Any:
    """A transformer of double and single blocks with an embedded guidance."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * CHANNELS,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=T5,
        pooled_projection_dim=TEXT,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    return FluxPipeline(
        vae=_vae(parts, shifted=True),
        text_encoder=_text_encoder(parts.clip, projected=False),
        text_encoder_2=_t5(),
        tokenizer=clip_tokenizer(words()),
        tokenizer_2=t5_tokenizer(words()),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15),
    )


def lcm(pipe: Any) -> Any:
    """The pair's other half for `sd`: guidance by embedding, consistency sampling."""
    from diffusers import LatentConsistencyModelPipeline, LCMScheduler, UNet2DConditionModel

    # As a keyword: among the entries of the config, from_config would leave it at its default.
    unet = UNet2DConditionModel.from_config(pipe.unet.config, time_cond_proj_dim=32)
    _load_shared(unet, pipe.unet)
    return LatentConsistencyModelPipeline(
        **{name: part for name, part in pipe.components.items() if name not in ("unet", "scheduler")},
        unet=unet,
        scheduler=LCMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=True, steps_offset=1),
        requires_safety_checker=False,
    )


def sdxl_turbo(pipe: Any) -> Any:
    """The pair's other half for `sdxl`: few steps of an ancestral sampler, no guidance."""
    from diffusers import EulerAncestralDiscreteScheduler, StableDiffusionXLPipeline

    unet = type(pipe.unet).from_config(pipe.unet.config)
    _load_shared(unet, pipe.unet)
    others = {name: part for name, part in pipe.components.items() if name not in ("unet", "scheduler")}
    scheduler = EulerAncestralDiscreteScheduler(**BETAS, timestep_spacing="trailing")
    return StableDiffusionXLPipeline(**others, unet=unet, scheduler=scheduler, add_watermarker=False)


def sd3_turbo(pipe: Any) -> Any:
    """The pair's other half for `sd3`: few steps, no guidance."""
    transformer = type(pipe.transformer).from_config(pipe.transformer.config)
    _load_shared(transformer, pipe.transformer)
    others = {name: part for name, part in pipe.components.items() if name not in ("transformer",)}
    return type(pipe)(**others, transformer=transformer)


def schnell(pipe: Any) -> Any:
    """The pair's other half for `flux`: few steps, no guidance embedding."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    transformer = type(pipe.transformer).from_config(pipe.transformer.config, guidance_embeds=False)
    _load_shared(transformer, pipe.transformer)
    others = {name: part for name, part in pipe.components.items() if name not in ("transformer", "scheduler")}
    return type(pipe)(**others, transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0))


SOURCES: dict[str, Callable[[Parts], Any]] = {"sd": sd, "sdxl": sdxl, "sd3": sd3, "flux": flux}
TARGETS: dict[str, Callable[[Any], Any]] = {"sd": lcm, "sdxl": sdxl_turbo, "sd3": sd3_turbo, "flux": schnell}


def frozen(pipe: Any) -> Any:
    """The pipeline with every part in eval mode, so that images can be repeated."""
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.requires_grad_(False).eval()
    return pipe


def _load_shared(model: Any, like: Any) -> None:
    """The weights that both have: a guidance embedding stands on one side only."""
    state, own = like.state_dict(), model.state_dict()
    model.load_state_dict({name: state.get(name, tensor) for name, tensor in own.items()})
    if "time_embedding.cond_proj.weight" in own:
        model.time_embedding.cond_proj.weight.data.zero_()  # told later
