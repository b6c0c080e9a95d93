"""A diffusion transformer for 8 x 8 images: built by diffusers, trained to predict v, sampled with DDIM.

Noise is an angle: at time t, x_t = cos(πt/2) x_0 + sin(πt/2) ε and v = cos(πt/2) ε - sin(πt/2) x_0 (Salimans & Ho 2022).
Times start at 0.3, not at 0: what less noise hides of an image this small is no more than its grey levels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from benchmarks.tiny.denoiser_settings import DenoiserSettings
from benchmarks.tiny.denoiser_world import BLANK, STYLES, WORDS, Batch, Style, draw_styles
from benchmarks.tiny.pretrain import schedule

FIRST_TIME = 0.3
Progress = Callable[[str, float], None]  # what is being done, and the share of it that is done
Draw = Callable[[torch.Generator], Batch]
Loss = Callable[[Batch, torch.Generator], Tensor]


def tiny_pixart(settings: DenoiserSettings, seed: int) -> nn.Module:
    """An untrained denoiser whose cross-attention reads the words as they are."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = PixArtTransformer2DModel(
            num_attention_heads=settings.heads,
            attention_head_dim=settings.width // settings.heads,
            num_layers=settings.layers,
            in_channels=1,
            out_channels=1,
            sample_size=8,
            patch_size=2,
            cross_attention_dim=settings.width,
            use_additional_conditions=False,
        )
    return cast(nn.Module, model).eval()  # diffusers shows type checkers a stand-in


def pretrain(
    settings: DenoiserSettings,
    table: Tensor,
    seed: int,
    title: str,
    progress: Progress,
    styles: tuple[Style, ...] = STYLES,
) -> nn.Module:
    """A denoiser trained on the digits in those styles."""
    model = tiny_pixart(settings, seed)
    fit(
        model,
        lambda generator: draw_styles(generator, settings.pretrain_batch, styles),
        lambda batch, generator: v_loss(model, table, batch, generator, settings.blank_share),
        steps=settings.pretrain_steps,
        learning_rate=settings.pretrain_learning_rate,
        weight_decay=0.1,
        seed=seed,
        title=title,
        progress=progress,
    )
    return model


def fit(
    model: nn.Module,
    draw: Draw,
    loss: Loss,
    *,
    steps: int,
    learning_rate: float,
    seed: int,
    title: str,
    progress: Progress,
    weight_decay: float = 0.0,
) -> None:
    """Train whatever of `model` asks for gradients: AdamW, short warm-up, linear decay."""
    generator = torch.Generator().manual_seed(seed)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, learning_rate, betas=(0.9, 0.95), weight_decay=weight_decay, fused=True)
    model.train()
    for step in range(steps):
        if step % 10 == 0:
            progress(title, step / steps)
        optimizer.param_groups[0]["lr"] = learning_rate * schedule(step, steps)
        value = loss(draw(generator), generator)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    model.eval()
    progress(title, 1.0)


def v_loss(
    model: nn.Module, table: Tensor, batch: Batch, generator: torch.Generator, blank_share: float = 0.0
) -> Tensor:
    """Mean squared error of the predicted v, with a share of the prompts blanked."""
    count = len(batch.images)
    blank = torch.rand(count, 1, generator=generator) < blank_share
    words = table[torch.where(blank, WORDS.index(BLANK), batch.prompts)]
    # One time in each of `count` equal intervals: a steadier mean than independent draws.
    time = FIRST_TIME + (1 - FIRST_TIME) * (torch.arange(count) + torch.rand(count, generator=generator)) / count
    noise = torch.randn(batch.images.shape, generator=generator)
    noisy = rotate(batch.images, noise, time)
    return mse_loss(predict(model, noisy, time, words), rotate(noise, -batch.images, time))


def predict(model: nn.Module, noisy: Tensor, time: Tensor, words: Tensor) -> Tensor:
    """v (n, 1, 8, 8) for noisy images (n, 1, 8, 8) at times (n) with words (n, 3, width)."""
    return model(noisy, encoder_hidden_states=words, timestep=1000 * time, return_dict=False)[0]


def rotate(first: Tensor, second: Tensor, time: Tensor) -> Tensor:
    """cos(πt/2) first + sin(πt/2) second: x_t of (x_0, ε), v of (ε, -x_0), x_0 of (x_t, -v), ε of (v, x_t)."""
    angle = (time * (math.pi / 2)).view(-1, 1, 1, 1)
    return angle.cos() * first + angle.sin() * second


def guided(model: nn.Module, table: Tensor, noisy: Tensor, time: Tensor, asked: Tensor, guidance: float) -> Tensor:
    """v with classifier-free guidance; 1 is none, and half the work."""
    if guidance == 1.0:
        return predict(model, noisy, time, table[asked])
    words = table[torch.cat([asked, torch.full_like(asked, WORDS.index(BLANK))])]
    told, untold = predict(model, torch.cat([noisy, noisy]), torch.cat([time, time]), words).chunk(2)
    return untold + guidance * (told - untold)


@torch.inference_mode()
def generate(
    model: nn.Module, table: Tensor, asked: Tensor, seed: int, *, steps: int, guidance: float, fresh_noise: bool = False
) -> Tensor:
    """Images (n, 1, 8, 8) for prompts (n, 3), by DDIM; with `fresh_noise` as consistency models are sampled."""
    generator = torch.Generator().manual_seed(seed)
    noisy = torch.randn(len(asked), 1, 8, 8, generator=generator)
    clean = noisy
    times = torch.linspace(1.0, FIRST_TIME, steps)
    for index, now in enumerate(times):
        time = now.expand(len(asked))
        clean = rotate(noisy, -guided(model, table, noisy, time, asked, guidance), time).clamp(-1, 1)
        if index + 1 < steps:
            noise = torch.randn(noisy.shape, generator=generator) if fresh_noise else noise_in(noisy, clean, time)
            noisy = rotate(clean, noise, times[index + 1].expand(len(asked)))
    return clean


def noise_in(noisy: Tensor, clean: Tensor, time: Tensor) -> Tensor:
    """ε, given x_t and x_0; t must not be 0."""
    angle = (time * (math.pi / 2)).view(-1, 1, 1, 1)
    return (noisy - angle.cos() * clean) / angle.sin()
