"""A tiny source, trained on drawings, and a target of few steps that is distilled from it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.dreambooth.families import FAMILIES, FamilyOf
from benchmarks.dreambooth.noise import Process, Times, add_noise, noise_in
from benchmarks.dreambooth.settings import Sampling
from benchmarks.dreambooth.tiny import models
from benchmarks.dreambooth.tiny.drawing import PIXELS
from benchmarks.dreambooth.tiny.settings import TinySettings
from benchmarks.dreambooth.tiny.tokens import LENGTH
from benchmarks.dreambooth.tiny.world import known_scenes, minimise

UNTOLD_SHARE = 0.12
TOLD_GUIDANCE = 3.5
CHUNK = 128
"""What goes through a teacher at once."""


def make_pair(
    family: str, settings: TinySettings, world: Path, folder: Path, sampling: Sampling, *, quiet: bool
) -> dict[str, float]:
    """Writes source/ and target/, two pipelines of the family. `sampling` is the target's."""
    from diffusers import AutoencoderKL
    from transformers import CLIPModel

    torch.manual_seed(settings.seed)
    vae: Any = AutoencoderKL.from_pretrained(world / "autoencoder")
    parts = models.Parts(
        vae.eval(),
        CLIPModel.from_pretrained(world / "clip").eval(),
        float(vae.config.shift_factor),
        1 / float(vae.config.scaling_factor),
    )
    source = models.frozen(models.SOURCES[family](parts))
    generator = torch.Generator().manual_seed(settings.seed)
    material = prepare(FAMILIES[family], source, settings.scenes, generator)
    loss = pretrain(source, material, settings, generator, quiet)
    source.save_pretrained(folder / "source")
    target = models.frozen(models.TARGETS[family](source))
    error = distil(source, target, material, settings, sampling, generator, quiet)
    target.save_pretrained(folder / "target")
    return {"source_loss": loss, "target_error": error}


@dataclass(frozen=True)
class Material:
    """Latents (m, c, h, w), the conditions of their captions and those of no caption (m rows each)."""

    family: FamilyOf
    latents: Tensor
    told: dict[str, Tensor]
    untold: dict[str, Tensor]

    def conditions(self, rows: Tensor, untold: Tensor) -> dict[str, Tensor]:
        """Conditions of these rows, without the caption where `untold` (n, bool) says so."""
        found = {}
        for name, value in self.told.items():
            own = value[rows]
            if name in self.untold:
                where = untold.view(-1, *(1,) * (own.ndim - 1))
                own = torch.where(where, self.untold[name][rows], own)
            found[name] = own
        return found


@torch.no_grad()
def prepare(family: FamilyOf, pipe: Any, count: int, generator: torch.Generator) -> Material:
    """Drawings as latents, and their captions as conditions: both once."""
    scenes, pictures = known_scenes(count, generator)
    captions = [scene.caption(generator) for scene in scenes]
    latents, told = [], []
    for start in range(0, count, 250):
        some = slice(start, start + 250)
        latents.append(family.scale(pipe, pipe.vae.encode(pictures[some] * 2 - 1).latent_dist.mean))
        told.append(family.encode(pipe, captions[some], LENGTH))
    sizes = torch.tensor([PIXELS, PIXELS, 0, 0, PIXELS, PIXELS], dtype=torch.float32).expand(count, 6)
    conditions = family.with_size({name: torch.cat([each[name] for each in told]) for name in told[0]}, sizes)
    return Material(family, torch.cat(latents), dict(conditions), dict(family.untold(conditions)))


def pretrain(pipe: Any, material: Material, settings: TinySettings, generator: torch.Generator, quiet: bool) -> float:
    """Trains the denoiser; returns its mean loss on the last batches."""
    family = material.family
    denoiser = getattr(pipe, family.denoiser).requires_grad_(True).train()
    process = family.process(pipe)
    losses: list[float] = []

    def loss() -> Tensor:
        count = settings.pretrain_batch
        rows = torch.randint(len(material.latents), (count,), generator=generator)
        x0 = material.latents[rows]
        noise = torch.randn(x0.shape, generator=generator)
        times = process.draw(count, generator, x0)
        conditions = material.conditions(rows, torch.rand(count, generator=generator) < UNTOLD_SHARE)
        output = family.predict(pipe, denoiser, add_noise(x0, noise, times), times, conditions, TOLD_GUIDANCE)
        value = process.loss(output, x0, noise, times)
        losses.append(float(value.detach()))
        return value

    minimise(denoiser, loss, settings.pretrain_steps, settings.pretrain_learning_rate, "source", quiet)
    denoiser.requires_grad_(False).eval()
    last = losses[-max(1, len(losses) // 10) :]
    return sum(last) / len(last)


@dataclass(frozen=True)
class Endpoints:
    """Noisy latents, where the teacher takes them, and the rows of their conditions."""

    noisy: Tensor
    clean: Tensor
    timesteps: Tensor
    rows: Tensor


def distil(
    teacher: Any,
    student: Any,
    material: Material,
    settings: TinySettings,
    sampling: Sampling,
    generator: torch.Generator,
    quiet: bool,
) -> float:
    """The student's denoiser learns to say, at the few times that it is asked at, where the teacher's many steps end.

    A direct form of consistency distillation (Song et al. 2023; Luo et al. 2023), for all families alike; returns the mean
    squared error at the end. The endpoints are made once.
    """
    family = material.family
    process = family.process(student)
    points = endpoints(teacher, student, material, settings, sampling, generator)
    denoiser = getattr(student, family.denoiser).requires_grad_(True).train()
    errors: list[float] = []

    def loss() -> Tensor:
        some = torch.randint(len(points.noisy), (settings.distil_batch,), generator=generator)
        noisy, times = points.noisy[some], process.at(points.timesteps[some], points.noisy)
        conditions = material.conditions(points.rows[some], torch.zeros(len(some), dtype=torch.bool))
        output = family.predict(student, denoiser, noisy, times, conditions, sampling.guidance)
        clean = process.clean(output, noisy, times)
        wanted = points.clean[some]
        # Of x0, not of the output: at the highest noise, the two differ by the square of a large number.
        value = (clean - wanted).square().mean()
        errors.append(float(value.detach()))
        return value

    minimise(denoiser, loss, settings.distil_steps, settings.pretrain_learning_rate / 2, "target", quiet)
    denoiser.requires_grad_(False).eval()
    last = errors[-max(1, len(errors) // 10) :]
    return sum(last) / len(last)


@torch.no_grad()
def endpoints(
    teacher: Any,
    student: Any,
    material: Material,
    settings: TinySettings,
    sampling: Sampling,
    generator: torch.Generator,
) -> Endpoints:
    """A pool of where the guided teacher ends, from each of the times that the student's scheduler asks at."""
    process = material.family.process(teacher)
    student.scheduler.set_timesteps(sampling.steps)
    asked = student.scheduler.timesteps.float()
    found: list[Endpoints] = []
    for timestep in asked.tolist():
        for start in range(0, settings.pool, CHUNK):
            size = min(CHUNK, settings.pool - start)
            rows = torch.randint(len(material.latents), (size,), generator=generator)
            x0 = material.latents[rows]
            times = process.at(torch.full((size,), timestep), x0)
            noisy = add_noise(x0, torch.randn(x0.shape, generator=generator), times)
            count = max(2, round(settings.teacher_steps * timestep / 1000))
            clean = _ode(teacher, material, process, noisy, rows, timestep, count, settings.teacher_guidance)
            found.append(Endpoints(noisy, clean, times.timestep, rows))
    return Endpoints(
        *(torch.cat([getattr(each, name) for each in found]) for name in ("noisy", "clean", "timesteps", "rows"))
    )


def _ode(
    teacher: Any,
    material: Material,
    process: Process,
    noisy: Tensor,
    rows: Tensor,
    first: float,
    count: int,
    guidance: float,
) -> Tensor:
    """x0 by deterministic steps at evenly spaced times from `first` down (DDIM; Euler, of a flow)."""
    grid = torch.linspace(first, 1000 / 50, count).round()
    clean = noisy
    for index, timestep in enumerate(grid):
        times = process.at(timestep.expand(len(noisy)), noisy)
        clean = _guided(teacher, material, process, noisy, rows, times, guidance)
        if index + 1 < count:
            following = process.at(grid[index + 1].expand(len(noisy)), noisy)
            noisy = add_noise(clean, noise_in(clean, noisy, times), following)
    return clean


def _guided(
    teacher: Any, material: Material, process: Process, noisy: Tensor, rows: Tensor, times: Times, guidance: float
) -> Tensor:
    """x0 with classifier-free guidance, in the families that have it."""
    family = material.family
    denoiser = getattr(teacher, family.denoiser)
    told = material.conditions(rows, torch.zeros(len(rows), dtype=torch.bool))
    output = family.predict(teacher, denoiser, noisy, times, told, TOLD_GUIDANCE)
    if material.untold:
        untold = material.conditions(rows, torch.ones(len(rows), dtype=torch.bool))
        without = family.predict(teacher, denoiser, noisy, times, untold, TOLD_GUIDANCE)
        output = without + guidance * (output - without)
    return process.clean(output, noisy, times)
