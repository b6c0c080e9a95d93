"""A4A around stock pipelines: with guidance and several images per prompt, and nothing left of it afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    PixArtAlphaPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from torch import Tensor

from tests.a4a_models import SD15_WIDTHS, base_file, pixart_like, sd15_like, sdxl_like
from tests.a4a_pipes import vae
from xadapt_a4a import A4AModel

IMAGES = 3


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sdxl() -> tuple[Any, Any, dict[str, Any]]:
    parts = dict.fromkeys(("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    pipe = StableDiffusionXLPipeline(
        **parts, unet=sdxl_like(), scheduler=DDIMScheduler(), force_zeros_for_empty_prompt=True, add_watermarker=False
    )
    call = {
        "prompt_embeds": randn(2, 5, 40),
        "negative_prompt_embeds": randn(2, 5, 40, seed=1),
        "pooled_prompt_embeds": randn(2, 16),
        "negative_pooled_prompt_embeds": randn(2, 16, seed=1),
        "height": 64,
        "width": 64,
    }
    return pipe, pipe.unet, call


def pixart() -> tuple[Any, Any, dict[str, Any]]:
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
    pipe = PixArtAlphaPipeline(**parts, transformer=pixart_like(), scheduler=DDIMScheduler())
    call = {
        "negative_prompt": None,
        "prompt_embeds": randn(2, 5, 20),
        "negative_prompt_embeds": randn(2, 5, 20, seed=1),
        "prompt_attention_mask": torch.ones(2, 5),
        "negative_prompt_attention_mask": torch.ones(2, 5),
        "use_resolution_binning": False,
        "height": 64,
        "width": 64,
    }
    return pipe, pipe.transformer, call


PIPELINES = {"sdxl": sdxl, "pixart": pixart}


@pytest.mark.parametrize("name", PIPELINES)
def test_through_a_stock_pipeline(name: str) -> None:
    pipe, target, call = PIPELINES[name]()
    pipe.set_progress_bar_config(disable=True)

    def generate(guidance_scale: float = 5.0) -> Tensor:
        return pipe(
            **call,
            num_inference_steps=2,
            guidance_scale=guidance_scale,
            num_images_per_prompt=IMAGES,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        ).images

    bare = generate()
    assert bare.shape[0] == 2 * IMAGES
    torch.manual_seed(0)
    adapter = A4AModel.from_ip_adapter(base_file(SD15_WIDTHS), target, depth=1).eval()
    bank = adapter.encode(randn(2, 16, seed=3))
    with adapter.attached(target, bank, num_images_per_prompt=IMAGES) as attachment:
        first = generate()
        assert not torch.allclose(first, bare)
        assert torch.equal(generate(), first)
        attachment.set_scale(0.0)
        assert torch.equal(generate(), bare)
        adapter.set_scale(1.0)
        with pytest.raises(ValueError, match="Say how the pipeline is called"):
            generate(guidance_scale=1.0)
    assert torch.equal(generate(), bare)

    # Each prompt has its own reference: with another second one, the first prompt's images stay.
    changed = adapter.encode(torch.cat([randn(2, 16, seed=3)[:1], randn(1, 16, seed=4)]))
    with adapter.attached(target, changed, num_images_per_prompt=IMAGES):
        second = generate()
    torch.testing.assert_close(second[:IMAGES], first[:IMAGES])
    assert not torch.allclose(second[IMAGES:], first[IMAGES:])
    with adapter.attached(target, bank, guidance=False, num_images_per_prompt=IMAGES):
        assert not torch.allclose(generate(guidance_scale=1.0), bare)


@pytest.mark.parametrize("name", ["text", "img2img", "inpaint", "controlnet"])
def test_through_the_pipelines_of_stable_diffusion(name: str) -> None:
    """One reference for two prompts, a ControlNet that knows nothing of it, and latents to start from."""
    unet: Any = sd15_like()
    parts: Any = dict.fromkeys(("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    parts |= {
        "unet": unet,
        "scheduler": DDIMScheduler(steps_offset=1, clip_sample=False),
        "requires_safety_checker": False,
    }
    call: dict[str, Any] = {"prompt_embeds": randn(2, 5, 24), "negative_prompt_embeds": randn(2, 5, 24, seed=1)}
    pipe: Any
    if name == "controlnet":
        controlnet = ControlNetModel.from_unet(unet, conditioning_channels=3)
        for parameter in controlnet.parameters():
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
        pipe = StableDiffusionControlNetPipeline(**parts, controlnet=controlnet)
        call |= {"image": torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))}
    elif name == "img2img":
        pipe = StableDiffusionImg2ImgPipeline(**parts)
        call |= {"image": randn(2, 4, 8, 8), "strength": 1.0}
    elif name == "inpaint":
        pipe = StableDiffusionInpaintPipeline(**{**parts, "vae": vae()})
        hole = torch.zeros(2, 1, 16, 16)
        hole[..., 8:] = 1
        call |= {"image": randn(2, 3, 16, 16).sigmoid(), "mask_image": hole, "height": 16, "width": 16}
    else:
        pipe = StableDiffusionPipeline(**parts)
        call |= {"height": 64, "width": 64}
    pipe.set_progress_bar_config(disable=True)

    def generate() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return pipe(**call, num_inference_steps=2, generator=generator, output_type="latent").images

    bare = generate()
    torch.manual_seed(0)
    adapter = A4AModel.from_ip_adapter(base_file(SD15_WIDTHS), unet, depth=1).eval()
    with adapter.attached(unet, adapter.encode(randn(1, 16, seed=3))) as attachment:
        assert not torch.allclose(generate(), bare)
        attachment.set_scale(0.0)
        assert torch.equal(generate(), bare)
    assert torch.equal(generate(), bare)


def test_masks_say_where_each_reference_acts() -> None:
    """Of two references, the one whose region is the whole image is as if it were alone."""
    pipe, target, call = sdxl()
    pipe.set_progress_bar_config(disable=True)
    one = {name: value[:1] if isinstance(value, Tensor) else value for name, value in call.items()}
    torch.manual_seed(0)
    adapter = A4AModel.from_ip_adapter(base_file(SD15_WIDTHS), target, depth=1).eval()
    references = randn(2, 16, seed=3)

    def generate(image_embeds: Tensor, masks: Tensor | None = None) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        with adapter.attached(target, adapter.encode(image_embeds), masks=masks):
            return pipe(**one, num_inference_steps=2, generator=generator, output_type="latent").images

    alone = [generate(references[index : index + 1]) for index in (0, 1)]
    assert not torch.allclose(*alone)
    for index, masks in ((0, [1.0, 0.0]), (1, [0.0, 1.0])):
        found = generate(references[None], torch.tensor(masks).view(2, 1, 1).expand(2, 64, 64))
        torch.testing.assert_close(found, alone[index], atol=1e-4, rtol=1e-4)  # over two steps of some ten layers
    halves = torch.zeros(2, 64, 64)
    halves[0, :, :32], halves[1, :, 32:] = 1, 1
    mixed = generate(references[None], halves)
    assert not any(torch.allclose(mixed, single) for single in alone)
