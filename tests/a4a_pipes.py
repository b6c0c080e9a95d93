"""Tiny pipelines and image encoders on disk, with real tokenizers, text encoders and VAEs, and images to encode with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import nn

from tests.a4a_models import flux_like, pixart_like, sd3_like, sd15_like, sdxl_like

WORDS = ["a", "red", "blue", "green", "square", "circle", "on", "white"]
COLOURS = ("red", "blue", "green")


def make_target(name: str) -> nn.Module:
    """A denoiser that the pipeline of the same name below fits."""
    if name == "sd15":
        return sd15_like(cross_attention_dim=32)
    return {"sdxl": sdxl_like, "pixart": pixart_like, "sd3": sd3_like, "flux": flux_like}[name]()


def write_pipeline(name: str, folder: Path) -> str:
    """A pipeline's folder, its denoiser as `make_target` makes it."""
    import diffusers

    target = make_target(name)
    parts: dict[str, Any]
    if name == "sd15":
        parts = {
            **{"vae": vae(), "text_encoder": clip(32), "tokenizer": clip_tokenizer(), "unet": target},
            **{
                "scheduler": diffusers.DDIMScheduler(prediction_type="v_prediction", steps_offset=1, clip_sample=False),
                "safety_checker": None,
            },
            **{"feature_extractor": None, "requires_safety_checker": False},
        }
        pipe: Any = diffusers.StableDiffusionPipeline(**parts)
    elif name == "sdxl":
        parts = {
            **{"vae": vae(), "text_encoder": clip(24), "text_encoder_2": clip(16, projected=16)},
            **{"tokenizer": clip_tokenizer(), "tokenizer_2": clip_tokenizer(), "unet": target},
            "scheduler": diffusers.DDIMScheduler(),
        }
        pipe = diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False)
    elif name == "pixart":
        parts = {"vae": vae(), "text_encoder": t5(), "tokenizer": t5_tokenizer(), "transformer": target}
        pipe = diffusers.PixArtAlphaPipeline(**parts, scheduler=diffusers.DDIMScheduler())
    elif name == "sd3":
        parts = {
            **{
                "vae": vae(shift_factor=0.1),
                "text_encoder": clip(8, projected=8),
                "text_encoder_2": clip(8, projected=8),
            },
            **{"text_encoder_3": t5(), "tokenizer": clip_tokenizer(), "tokenizer_2": clip_tokenizer()},
            **{"tokenizer_3": t5_tokenizer(), "transformer": target},
        }
        pipe = diffusers.StableDiffusion3Pipeline(**parts, scheduler=diffusers.FlowMatchEulerDiscreteScheduler())
    else:
        parts = {
            **{"vae": vae(channels=1, shift_factor=0.1), "text_encoder": clip(16), "text_encoder_2": t5()},
            **{"tokenizer": clip_tokenizer(), "tokenizer_2": t5_tokenizer(), "transformer": target},
        }
        pipe = diffusers.FluxPipeline(**parts, scheduler=diffusers.FlowMatchEulerDiscreteScheduler())
    pipe.save_pretrained(folder)
    return str(folder)


def vae(channels: int = 4, **options: Any) -> Any:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=16,
        **options,
    )


def clip(width: int, projected: int = 0) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(1)
    config = CLIPTextConfig(
        vocab_size=len(WORDS) + 2,
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        projection_dim=projected or 8,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def clip_tokenizer() -> Any:
    from transformers import CLIPTokenizer

    vocabulary = ["<|startoftext|>", "<|endoftext|>", *(f"{word}</w>" for word in WORDS)]
    merges: list[str] = []
    return CLIPTokenizer(
        vocab={word: number for number, word in enumerate(vocabulary)}, merges=merges, model_max_length=77
    )


def t5() -> Any:
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(2)
    return T5EncoderModel(T5Config(vocab_size=16, d_model=20, d_kv=8, d_ff=16, num_layers=1, num_heads=2))


def t5_tokenizer() -> Any:
    from transformers import T5Tokenizer

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -5.0), ("▁", -2.0)]
    return T5Tokenizer(vocab=[*special, *((f"▁{word}", -1.0) for word in WORDS)], extra_ids=0, model_max_length=120)


def write_image_encoder(folder: Path, width: int = 16, hidden: int = 16) -> str:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(3)
    config = CLIPVisionConfig(
        hidden_size=hidden,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        projection_dim=width,
    )
    CLIPVisionModelWithProjection(config).save_pretrained(folder)
    return str(folder)


def picture(number: int) -> Image.Image:
    image = Image.new("RGB", (24 + 4 * number, 20), "white")
    ImageDraw.Draw(image).rectangle((4, 4, 14 + number, 15), fill=COLOURS[number % 3])
    return image


def caption(number: int) -> str:
    return f"a {COLOURS[number % 3]} square"


def write_images(folder: Path, count: int = 5) -> Path:
    """NAME.png with NAME.txt beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        picture(number).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption(number))
    return folder
