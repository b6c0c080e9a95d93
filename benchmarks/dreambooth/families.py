"""What the four families of pipelines do differently: conditions, one call of the denoiser, images from noise.

Conditions are tensors under the pipeline's own keyword names, one row per prompt: what is cached, and what is passed.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from benchmarks.dreambooth.noise import Diffusion, Flow, Process, Times
from benchmarks.dreambooth.settings import Sampling

Conditions = Mapping[str, Tensor]


class FamilyOf(ABC):
    """One family. Latents are (n, c, h, w) everywhere outside of these classes."""

    name: ClassVar[str]
    denoiser: ClassVar[str] = "transformer"  # the pipeline's component
    encoders: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2", "text_encoder_3")
    load_options: ClassVar[dict[str, Any]] = {}

    @abstractmethod
    def process(self, pipe: Any) -> Process:
        """How its models are trained."""

    @abstractmethod
    def encode(self, pipe: Any, prompts: list[str], text_length: int | None) -> dict[str, Tensor]:
        """The conditions of the prompts."""

    @abstractmethod
    def predict(
        self, pipe: Any, model: Any, noisy: Tensor, times: Times, conditions: Conditions, guidance: float
    ) -> Tensor:
        """The denoiser's output (n, c, h, w), without classifier-free guidance.

        `model` is the pipe's denoiser, perhaps wrapped; `guidance` is what an embedded guidance is told.
        """

    def pack(self, pipe: Any, latents: Tensor) -> Tensor:
        """Latents as the pipeline wants them."""
        return latents

    def with_size(self, conditions: Conditions, size: Tensor) -> Conditions:
        """Conditions that also say the sizes (n, 6): original height and width, crop's top and left, height and width."""
        return conditions

    def untold(self, conditions: Conditions) -> Conditions:
        """The conditions of no prompt, where classifier-free guidance is by a second call."""
        return {name: conditions[f"negative_{name}"] for name in conditions if f"negative_{name}" in conditions}

    def scale(self, pipe: Any, sample: Tensor) -> Tensor:
        """Latents as the denoiser knows them, from a sample of the autoencoder's posterior."""
        config = pipe.vae.config
        return (sample - (getattr(config, "shift_factor", None) or 0.0)) * config.scaling_factor

    @torch.inference_mode()
    def generate(
        self, pipe: Any, conditions: Conditions, noise: Tensor, sampling: Sampling, generators: list[torch.Generator]
    ) -> list[Any]:
        """PIL images (n) from noise (n, c, h, w): one generator each, for samplers that add noise of their own."""
        height, width = (side * self.pixels_per_latent(pipe) for side in noise.shape[-2:])
        taken = inspect.signature(pipe.__call__).parameters
        given = {name: value for name, value in conditions.items() if name in taken}
        if sampling.guidance <= 1:
            given = {name: value for name, value in given.items() if not name.startswith("negative_")}
        pipe.set_progress_bar_config(disable=True)
        images: list[Any] = pipe(
            **given,
            latents=self.pack(pipe, noise),
            num_inference_steps=sampling.steps,
            guidance_scale=sampling.guidance,
            generator=generators,
            height=height,
            width=width,
        ).images
        return images

    def pixels_per_latent(self, pipe: Any) -> int:
        return int(2 ** (len(pipe.vae.config.block_out_channels) - 1))


class StableDiffusion(FamilyOf):
    name = "sd"
    denoiser = "unet"
    load_options: ClassVar[dict[str, Any]] = {"safety_checker": None, "requires_safety_checker": False}  # a black
    # image would count as one of the subject

    def process(self, pipe: Any) -> Process:
        return Diffusion(pipe.scheduler)

    def encode(self, pipe: Any, prompts: list[str], text_length: int | None) -> dict[str, Tensor]:
        told, untold = pipe.encode_prompt(prompts, pipe._execution_device, 1, True)
        return {"prompt_embeds": told, "negative_prompt_embeds": untold}

    def predict(
        self, pipe: Any, model: Any, noisy: Tensor, times: Times, conditions: Conditions, guidance: float
    ) -> Tensor:
        output: Tensor = model(
            noisy,
            times.timestep,
            encoder_hidden_states=conditions["prompt_embeds"],
            timestep_cond=_guidance_embedding(pipe, noisy, guidance),
            added_cond_kwargs=self.added(conditions),
            return_dict=False,
        )[0]
        return output

    def added(self, conditions: Conditions) -> dict[str, Tensor] | None:
        return None


class StableDiffusionXL(StableDiffusion):
    name = "sdxl"
    load_options: ClassVar[dict[str, Any]] = {}

    def encode(self, pipe: Any, prompts: list[str], text_length: int | None) -> dict[str, Tensor]:
        encoded = pipe.encode_prompt(prompts, device=pipe._execution_device, do_classifier_free_guidance=True)
        names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
        return dict(zip(names, encoded, strict=True))

    def with_size(self, conditions: Conditions, size: Tensor) -> Conditions:
        return {**conditions, "time_ids": size}

    def untold(self, conditions: Conditions) -> Conditions:
        return {**super().untold(conditions), "time_ids": conditions["time_ids"]}

    def added(self, conditions: Conditions) -> dict[str, Tensor] | None:
        return {"text_embeds": conditions["pooled_prompt_embeds"], "time_ids": conditions["time_ids"]}


class StableDiffusion3(FamilyOf):
    name = "sd3"

    def process(self, pipe: Any) -> Process:
        return Flow(pipe.scheduler, logit_normal=True, preconditioned=True)

    def encode(self, pipe: Any, prompts: list[str], text_length: int | None) -> dict[str, Tensor]:
        encoded = pipe.encode_prompt(
            prompts, None, None, device=pipe._execution_device, max_sequence_length=text_length or 256
        )
        names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
        return dict(zip(names, encoded, strict=True))

    def predict(
        self, pipe: Any, model: Any, noisy: Tensor, times: Times, conditions: Conditions, guidance: float
    ) -> Tensor:
        output: Tensor = model(
            hidden_states=noisy,
            timestep=times.timestep,
            encoder_hidden_states=conditions["prompt_embeds"],
            pooled_projections=conditions["pooled_prompt_embeds"],
            return_dict=False,
        )[0]
        return output


class Flux(FamilyOf):
    name = "flux"

    def process(self, pipe: Any) -> Process:
        return Flow(pipe.scheduler, logit_normal=False, preconditioned=False)

    def encode(self, pipe: Any, prompts: list[str], text_length: int | None) -> dict[str, Tensor]:
        told, pooled, _ = pipe.encode_prompt(
            prompts, None, device=pipe._execution_device, max_sequence_length=text_length or 512
        )
        return {"prompt_embeds": told, "pooled_prompt_embeds": pooled}

    def predict(
        self, pipe: Any, model: Any, noisy: Tensor, times: Times, conditions: Conditions, guidance: float
    ) -> Tensor:
        count, _, height, width = noisy.shape
        text = conditions["prompt_embeds"]
        told = pipe.transformer.config.guidance_embeds
        output = model(
            hidden_states=self.pack(pipe, noisy),
            timestep=times.timestep / 1000,
            guidance=torch.full((count,), guidance, device=noisy.device) if told else None,
            pooled_projections=conditions["pooled_prompt_embeds"],
            encoder_hidden_states=text,
            txt_ids=torch.zeros(text.shape[1], 3, device=noisy.device, dtype=noisy.dtype),
            img_ids=pipe._prepare_latent_image_ids(count, height // 2, width // 2, noisy.device, noisy.dtype),
            return_dict=False,
        )[0]
        factor = self.pixels_per_latent(pipe)
        unpacked: Tensor = pipe._unpack_latents(output, height * factor, width * factor, factor)
        return unpacked

    def pack(self, pipe: Any, latents: Tensor) -> Tensor:
        packed: Tensor = pipe._pack_latents(latents, *latents.shape)
        return packed

    def untold(self, conditions: Conditions) -> Conditions:
        return {}


def _guidance_embedding(pipe: Any, noisy: Tensor, guidance: float) -> Tensor | None:
    """LCM's: the guidance that was distilled into the model, less 1 (Luo et al. 2023)."""
    width = pipe.unet.config.time_cond_proj_dim
    if width is None:
        return None
    told = torch.full((len(noisy),), guidance - 1.0)
    embedding: Tensor = pipe.get_guidance_scale_embedding(told, embedding_dim=width)
    return embedding.to(noisy)


FAMILIES: dict[str, FamilyOf] = {
    family.name: family for family in (StableDiffusion(), StableDiffusionXL(), StableDiffusion3(), Flux())
}
