"""What exists before any adapter is carried: denoisers that follow the prompt and know no reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.a4a import models, world
from xadapt_a4a.objective import Objective, predict

Progress = Callable[[str, float], None]  # what is being done, and the share of it that is done


def pretrain(
    name: str, seed: int, *, steps: int, batch: int, learning_rate: float, text_drop: float, progress: Progress
) -> nn.Module:
    """A denoiser of that name, trained on scenes in all colours with the prompts that say the scene."""
    model = models.build(name, seed)
    text, objective = models.Text(name, seed), models.objective(model)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, betas=(0.9, 0.95), fused=True)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    model.train()
    for step in range(steps):
        if step % 10 == 0:
            progress(f"{name}, pre-training", step / steps)
        drawn = world.draw(batch, generator)
        loss = denoising_loss(
            model, drawn.images, text(dropped(drawn.scenes, text_drop, generator)), objective, generator
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rates.step()
    return model.eval().requires_grad_(False)


def dropped(scenes: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """The scenes' prompts, a share of them empty."""
    empty = torch.rand(len(scenes), 1, generator=generator) < share
    return torch.where(empty, world.blank_prompts(len(scenes)), world.prompts(scenes))


def denoising_loss(
    model: nn.Module,
    images: Tensor,
    conditions: dict[str, Any],
    objective: Objective,
    generator: torch.Generator,
) -> Tensor:
    """Mean squared error of what the model should predict, at random times."""
    noise = torch.randn(images.shape, generator=generator)
    noisy, times, goal = objective.noisy(images, noise, generator)
    return F.mse_loss(predict(model, noisy, times, conditions), goal)
