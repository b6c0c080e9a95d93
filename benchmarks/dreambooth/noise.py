"""How noise is added, what is to be predicted, and what a prediction says: diffusion and flow matching.

Latents are (n, c, h, w), `Times` holds one value per image. Draws are made on the CPU, so that they are the same everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Times:
    """Points of a process: what the model is told (n), and x = signal · x0 + sigma · noise, each (n, 1, 1, 1)."""

    timestep: Tensor
    signal: Tensor
    sigma: Tensor


class Process(Protocol):
    """A scheduler's training side."""

    def draw(self, count: int, generator: torch.Generator, like: Tensor) -> Times:
        """Times for training, by the density of the family."""

    def at(self, timesteps: Tensor, like: Tensor) -> Times:
        """The times with these timesteps (n), as schedulers give them."""

    def loss(self, output: Tensor, x0: Tensor, noise: Tensor, times: Times) -> Tensor:
        """Mean squared error of a model's output, in float32."""

    def clean(self, output: Tensor, noisy: Tensor, times: Times) -> Tensor:
        """x0 as the model's output at `noisy` says."""

    def output_for(self, x0: Tensor, noisy: Tensor, times: Times) -> Tensor:
        """The output that says x0."""


def add_noise(x0: Tensor, noise: Tensor, times: Times) -> Tensor:
    """x at these times."""
    return times.signal * x0 + times.sigma * noise


def noise_in(x0: Tensor, noisy: Tensor, times: Times) -> Tensor:
    """The noise in x, given x0."""
    return (noisy - times.signal * x0) / times.sigma


class Diffusion:
    """SD1.5, SDXL: uniform integer times, and the model says the noise or v (Salimans & Ho 2022)."""

    def __init__(self, scheduler: Any) -> None:
        from diffusers import DDPMScheduler

        training = DDPMScheduler.from_config(scheduler.config)
        self.kind = training.config.prediction_type
        if self.kind not in ("epsilon", "v_prediction"):
            raise ValueError(f"the scheduler's prediction_type is {self.kind!r}; allowed are epsilon and v_prediction.")
        self.alphas = training.alphas_cumprod

    def draw(self, count: int, generator: torch.Generator, like: Tensor) -> Times:
        return self.at(torch.randint(len(self.alphas), (count,), generator=generator), like)

    def at(self, timesteps: Tensor, like: Tensor) -> Times:
        alphas = self.alphas[timesteps.long().cpu()].view(-1, 1, 1, 1).to(like.device)
        return Times(timesteps.to(like.device), alphas.sqrt(), (1 - alphas).sqrt())

    def loss(self, output: Tensor, x0: Tensor, noise: Tensor, times: Times) -> Tensor:
        wanted = noise if self.kind == "epsilon" else times.signal * noise - times.sigma * x0
        return (output.float() - wanted.float()).square().mean()

    def clean(self, output: Tensor, noisy: Tensor, times: Times) -> Tensor:
        if self.kind == "epsilon":
            return (noisy - times.sigma * output) / times.signal
        return times.signal * noisy - times.sigma * output

    def output_for(self, x0: Tensor, noisy: Tensor, times: Times) -> Tensor:
        noise = noise_in(x0, noisy, times)
        return noise if self.kind == "epsilon" else times.signal * noise - times.sigma * x0


class Flow:
    """SD3.5, FLUX: x = (1 - sigma) x0 + sigma noise, and the model says noise - x0.

    `logit_normal` and `preconditioned` are SD3.5's: times by sigmoid(N(0, 1)), and x0 = x - sigma · output compared with x0,
    which weighs the squared error by sigma². FLUX has uniform times and weight 1.
    """

    def __init__(self, scheduler: Any, *, logit_normal: bool, preconditioned: bool) -> None:
        fresh = type(scheduler).from_config(scheduler.config)  # unshifted where the shift depends on the image's size
        self.sigmas, self.total = fresh.sigmas, fresh.config.num_train_timesteps
        self.logit_normal, self.preconditioned = logit_normal, preconditioned

    def draw(self, count: int, generator: torch.Generator, like: Tensor) -> Times:
        if self.logit_normal:
            share = torch.randn(count, generator=generator).sigmoid()
        else:
            share = torch.rand(count, generator=generator)
        return self.at(self.sigmas[(share * self.total).long()] * self.total, like)

    def at(self, timesteps: Tensor, like: Tensor) -> Times:
        sigma = (timesteps / self.total).view(-1, 1, 1, 1).to(like.device)
        return Times(timesteps.to(like.device), 1 - sigma, sigma)

    def loss(self, output: Tensor, x0: Tensor, noise: Tensor, times: Times) -> Tensor:
        error = (output.float() - (noise - x0).float()).square()
        return (times.sigma.square() * error if self.preconditioned else error).mean()

    def clean(self, output: Tensor, noisy: Tensor, times: Times) -> Tensor:
        return noisy - times.sigma * output

    def output_for(self, x0: Tensor, noisy: Tensor, times: Times) -> Tensor:
        return (noisy - x0) / times.sigma
