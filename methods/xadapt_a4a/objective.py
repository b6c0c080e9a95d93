"""The target's own objective (A4A, Eq. 14): what it is shown, and what it should have predicted."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor, nn

from xadapt.errors import did_you_mean

from .coupling import check_choice
from .processors import JOINT, Decoupled
from .targets import find_attention_layers

PREDICTIONS = ("epsilon", "v_prediction", "flow")
_OURS = ("latents", "image_embeds", "clip_embeds", "negative_image_embeds", "negative_clip_embeds")


@dataclass(frozen=True)
class Objective:
    """How a family of models is trained."""

    prediction: str
    schedule: DDPMScheduler | None  # None for flow

    def noisy(self, latents: Tensor, noise: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """What the model sees, the time steps, and what it should predict: (B, C, H, W), (B,), (B, C, H, W)."""
        batch = latents.shape[0]
        if self.schedule is None:
            sigma = torch.randn(batch, generator=generator).sigmoid().to(latents)
            x = torch.lerp(latents, noise, sigma.view(-1, *[1] * (latents.ndim - 1)))
            return x, sigma * 1000, noise - latents
        schedule: Any = self.schedule
        times = torch.randint(schedule.config.num_train_timesteps, (batch,), generator=generator).to(latents.device)
        x = schedule.add_noise(latents, noise, times)
        goal = schedule.get_velocity(latents, noise, times) if self.prediction == "v_prediction" else noise
        return x, times, goal


def objective_of(target: nn.Module, prediction: str = "auto", scheduler: str = "") -> Objective:
    """How this target was trained.

    Args:
        prediction: "epsilon", "v_prediction" or "flow"; "auto" takes what the scheduler's config says, without one flow for
            joint-attention transformers and epsilon for the others.
        scheduler: the folder of the pipeline's scheduler. Without one, the noise schedule of Stable Diffusion for U-Nets and
            that of PixArt for transformers.
    """
    check_choice("prediction", prediction, ("auto", *PREDICTIONS))
    schedule: Any
    if scheduler:
        schedule = DDPMScheduler.from_pretrained(scheduler)
        prediction = schedule.config.prediction_type if prediction == "auto" else prediction
    elif hasattr(target, "down_blocks"):
        schedule = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    else:
        schedule = DDPMScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear")
    if prediction == "auto":
        prediction = "flow" if _is_joint(target) else "epsilon"
    return Objective(prediction, None if prediction == "flow" else schedule)


def predict(target: nn.Module, noisy: Tensor, times: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """The target's prediction, (B, C, H, W): of models that also predict a variance, the first C channels.

    Raises:
        ValueError: the batch holds what the target's forward does not take.
    """
    known = inspect.signature(target.forward).parameters
    conditions = {name: value for name, value in batch.items() if name not in _OURS}
    for name in conditions:
        if name not in known:
            raise ValueError(
                f"The batch holds {name!r}, which {type(target).__name__} does not take. {did_you_mean(name, tuple(known))}"
            )
    output: Tensor = target(noisy, timestep=times, **conditions, return_dict=False)[0]
    return output[:, : noisy.shape[1]]


def _is_joint(target: nn.Module) -> bool:
    processor = find_attention_layers(target)[0].module.processor
    kind = processor.stock if isinstance(processor, Decoupled) else type(processor)
    return kind in JOINT or kind.__name__.startswith("Flux")
