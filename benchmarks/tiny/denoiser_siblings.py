"""Siblings of the source that were distilled from it: one that samples in four steps, one with a layer less."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from benchmarks.tiny.denoiser_model import FIRST_TIME, Loss, Progress, fit, generate, guided, noise_in, predict, rotate
from benchmarks.tiny.denoiser_settings import DenoiserSettings
from benchmarks.tiny.denoiser_world import BLANK, STYLES, WORDS, Batch, draw_styles

KEPT_BY_STUDENT = {0: 0, 2: 1}  # block of the source -> block of the student
GRID = 16  # times between which the few-step model is made consistent
LCM_STEPS = 4


@dataclass(frozen=True)
class Sibling:
    """A model and how it is sampled."""

    model: nn.Module
    steps: int
    guidance: float
    fresh_noise: bool = False
    blocks: Mapping[int, int] | None = None  # block of the source -> block here, where they differ

    def generate(self, model: nn.Module, table: Tensor, asked: Tensor, seed: int) -> Tensor:
        """Images (n, 1, 8, 8) for prompts (n, 3), by `model`, which is this sibling with an adapter or without."""
        return generate(
            model, table, asked, seed, steps=self.steps, guidance=self.guidance, fresh_noise=self.fresh_noise
        )


def few_step(source: nn.Module, table: Tensor, settings: DenoiserSettings, seed: int, progress: Progress) -> Sibling:
    """The source after consistency distillation (Luo et al. 2023): guidance is built in, four steps are enough."""
    model = copy.deepcopy(source)
    times = torch.linspace(FIRST_TIME, 1.0, GRID)

    def loss(batch: Batch, generator: torch.Generator) -> Tensor:
        """Its answer at a time equals its answer one step of the guided source earlier; at the first time, the source's."""
        count = len(batch.images)
        index = torch.randint(GRID, (count,), generator=generator)
        noisy = rotate(batch.images, torch.randn(batch.images.shape, generator=generator), times[index])
        with torch.no_grad():
            v = guided(source, table, noisy, times[index], batch.prompts, settings.guidance)
            clean = rotate(noisy, -v, times[index]).clamp(-1, 1)
            before = times[(index - 1).clamp(min=0)]
            less_noisy = rotate(clean, noise_in(noisy, clean, times[index]), before)
            answer = rotate(less_noisy, -predict(model, less_noisy, before, table[batch.prompts]), before).clamp(-1, 1)
            wanted = torch.where((index == 0).view(-1, 1, 1, 1), clean, answer)
        mine = rotate(noisy, -predict(model, noisy, times[index], table[batch.prompts]), times[index])
        return mse_loss(mine, wanted)

    _distil(model, loss, settings, seed, 1e-3, "distilling the few-step model", progress)
    return Sibling(model, LCM_STEPS, guidance=1.0, fresh_noise=True)


def student(source: nn.Module, table: Tensor, settings: DenoiserSettings, seed: int, progress: Progress) -> Sibling:
    """The source without its middle block, taught to predict what the source predicts."""
    model = copy.deepcopy(source)
    blocks = [model.get_submodule(f"transformer_blocks.{block}") for block in KEPT_BY_STUDENT]
    model.transformer_blocks = nn.ModuleList(blocks)

    def loss(batch: Batch, generator: torch.Generator) -> Tensor:
        count = len(batch.images)
        time = FIRST_TIME + (1 - FIRST_TIME) * torch.rand(count, generator=generator)
        noisy = rotate(batch.images, torch.randn(batch.images.shape, generator=generator), time)
        blank = torch.rand(count, 1, generator=generator) < settings.blank_share
        words = table[torch.where(blank, WORDS.index(BLANK), batch.prompts)]
        with torch.no_grad():
            wanted = predict(source, noisy, time, words)
        return mse_loss(predict(model, noisy, time, words), wanted)

    _distil(model, loss, settings, seed, 2e-3, "distilling the student", progress)
    return Sibling(model, settings.sampling_steps, settings.guidance, blocks=KEPT_BY_STUDENT)


def _distil(
    model: nn.Module,
    loss: Loss,
    settings: DenoiserSettings,
    seed: int,
    learning_rate: float,
    title: str,
    progress: Progress,
) -> None:
    fit(
        model,
        lambda generator: draw_styles(generator, settings.pretrain_batch, STYLES),
        loss,
        steps=settings.distil_steps,
        learning_rate=learning_rate,
        seed=seed + 2000,
        title=title,
        progress=progress,
    )
