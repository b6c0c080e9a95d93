"""The target's own objective (A4A, Eq. 14): what it is shown, and what it should have predicted."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.transformers.transformer_flux import FluxAttention
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor, nn

from xadapt.errors import did_you_mean

from .coupling import check_choice
from .draws import Generators, drawn
from .processors import JOINT, Decoupled
from .targets import find_attention_layers, unwrapped, working_place

PREDICTIONS = ("epsilon", "v_prediction", "flow")
_OURS = ("latents", "image_embeds", "clip_embeds", "negative_image_embeds", "negative_clip_embeds", "empty_text")


@dataclass(frozen=True)
class Objective:
    """How a family of models is trained."""

    prediction: str
    schedule: DDPMScheduler | None  # None for flow

    def noisy(self, latents: Tensor, noise: Tensor, generator: Generators) -> tuple[Tensor, Tensor, Tensor]:
        """What the model sees, the time steps, and what it should predict: (B, C, H, W), (B,), (B, C, H, W)."""
        batch = latents.shape[0]
        if self.schedule is None:
            sigma = drawn(lambda n, one: torch.randn(n, generator=one), batch, generator).sigmoid().to(latents)
            x = torch.lerp(latents, noise, sigma.view(-1, *[1] * (latents.ndim - 1)))
            return x, sigma * 1000, noise - latents
        schedule: Any = self.schedule
        last: int = schedule.config.num_train_timesteps
        times = drawn(lambda n, one: torch.randint(last, (n,), generator=one), batch, generator).to(latents.device)
        x = schedule.add_noise(latents, noise, times)
        goal = schedule.get_velocity(latents, noise, times) if self.prediction == "v_prediction" else noise
        return x, times, goal


def objective_of(
    target: nn.Module, prediction: str = "auto", scheduler: str = "", subfolder: str | None = None
) -> Objective:
    """How this target was trained.

    Args:
        prediction: "epsilon", "v_prediction" or "flow"; "auto" takes what the scheduler's config says, without one flow for
            joint-attention transformers and epsilon for the others.
        scheduler: the folder or id of the pipeline's scheduler. Without one, the noise schedule of Stable Diffusion for U-Nets
            and that of PixArt for transformers.
        subfolder: where it lies in there.

    Raises:
        ValueError: the scheduler predicts something else.
    """
    check_choice("prediction", prediction, ("auto", *PREDICTIONS))
    schedule: Any
    if scheduler:
        config: Any = DDPMScheduler.load_config(scheduler, subfolder=subfolder)
        flow = str(config.get("_class_name", "")).startswith("FlowMatch")
        schedule = None if flow else DDPMScheduler.from_config(config)
        if prediction == "auto":
            prediction = "flow" if flow else schedule.config.prediction_type
        elif flow and prediction != "flow":
            raise ValueError(
                f"{scheduler} is a schedule of flow matching; prediction={prediction!r} needs one with noise levels."
            )
    elif hasattr(target, "down_blocks"):
        schedule = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    else:
        schedule = DDPMScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear")
    if prediction == "auto":
        prediction = "flow" if _is_joint(target) else "epsilon"
    check_choice("prediction", prediction, PREDICTIONS)
    return Objective(prediction, None if prediction == "flow" else schedule)


def predict(target: nn.Module, noisy: Tensor, times: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """The target's prediction, (B, C, …): of models that also predict a variance, the first C channels.

    What is not in the precision of the target's weights is cast to it; the times stay as they are.

    Raises:
        ValueError: the batch holds what the target's forward does not take.
    """
    known = inspect.signature(unwrapped(target).forward).parameters
    conditions = {name: value for name, value in batch.items() if name not in _OURS}
    for name in conditions:
        if name not in known:
            raise ValueError(
                f"The batch holds {name!r}, which {type(target).__name__} does not take. {did_you_mean(name, tuple(known))}"
            )
    if _is_flux(target):
        times = times / 1000  # it multiplies by 1000 itself
    dtype = working_place(target)[1]
    output: Tensor = target(_cast(noisy, dtype), timestep=times, **_cast(conditions, dtype), return_dict=False)[0]
    return output if noisy.ndim == 3 else output[:, : noisy.shape[1]]


def _cast(value: Any, dtype: torch.dtype | None) -> Any:
    """The same with its tensors of floats in this precision."""
    if isinstance(value, Mapping):
        return {name: _cast(one, dtype) for name, one in value.items()}
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _is_joint(target: nn.Module) -> bool:
    processor = find_attention_layers(unwrapped(target))[0].module.processor
    kind = processor.stock if isinstance(processor, Decoupled) else type(processor)
    return kind in JOINT or kind.__name__.startswith("Flux")


def _is_flux(target: nn.Module) -> bool:
    return isinstance(find_attention_layers(unwrapped(target))[0].module, FluxAttention)
