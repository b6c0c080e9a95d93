"""Pipelines that stay loaded from cell to cell, with the prompts that they have encoded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.dreambooth.families import FAMILIES, FamilyOf
from benchmarks.dreambooth.settings import Compute, Sampling


@dataclass
class Loaded:
    """A pipeline. Its denoiser and autoencoder are on the device, its text encoders there only while they encode."""

    pipe: Any
    family: FamilyOf
    device: torch.device
    prompts: dict[tuple[str, int | None], dict[str, Tensor]] = field(default_factory=dict)

    @property
    def denoiser(self) -> nn.Module:
        found: nn.Module = getattr(self.pipe, self.family.denoiser)
        return found

    @property
    def dtype(self) -> torch.dtype:
        return next(self.denoiser.parameters()).dtype

    def conditions(self, prompts: list[str], text_length: int | None) -> dict[str, Tensor]:
        """The conditions of the prompts, on the device. Encodes only what it has not met."""
        fresh = [prompt for prompt in dict.fromkeys(prompts) if (prompt, text_length) not in self.prompts]
        if fresh:
            with self._encoders_on_device(), torch.inference_mode():
                for prompt in fresh:
                    found = self.family.encode(self.pipe, [prompt], text_length)
                    self.prompts[prompt, text_length] = {name: value.clone().cpu() for name, value in found.items()}
        rows = [self.prompts[prompt, text_length] for prompt in prompts]
        return {name: torch.cat([row[name] for row in rows]).to(self.device) for name in rows[0]}

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """(c, h, w) of a square image."""
        side = resolution // self.family.pixels_per_latent(self.pipe)
        return int(self.pipe.vae.config.latent_channels), side, side

    def generate(
        self, prompts: list[str], seeds: list[int], resolution: int, sampling: Sampling, batch: int
    ) -> Iterator[Any]:
        """PIL images, one per prompt and seed: the seed alone says the noise, whichever model and batch it meets."""
        shape = self.latent_shape(resolution)
        for start in range(0, len(prompts), batch):
            some = slice(start, start + batch)
            generators = [torch.Generator().manual_seed(seed) for seed in seeds[some]]
            noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
            conditions = self.conditions(prompts[some], sampling.text_length)
            noise = noise.to(self.device, self.dtype)
            yield from self.family.generate(self.pipe, conditions, noise, sampling, generators)

    @contextlib.contextmanager
    def _encoders_on_device(self) -> Iterator[None]:
        found = [getattr(self.pipe, name, None) for name in self.family.encoders]
        encoders = [encoder for encoder in found if encoder is not None]
        hooked = any(hasattr(encoder, "_hf_hook") for encoder in encoders)  # offloading moves them by itself
        if not hooked:
            for encoder in encoders:
                encoder.to(self.device)
        try:
            yield
        finally:
            if not hooked:
                for encoder in encoders:
                    encoder.to("cpu")


def default_device() -> torch.device:
    from accelerate import PartialState

    device: torch.device = PartialState().device
    return device


def load_pipeline(family: str, model: str, revision: str | None, compute: Compute) -> Loaded:
    """A pipeline from the hub or a folder, frozen, on this process's device.

    Raises:
        ValueError: the folder holds no pipeline, or one of another family. What the hub says of names it does not know and
            of gated models is passed on; the frame adds what to do.
    """
    from diffusers import DiffusionPipeline

    of = FAMILIES[family]
    folder = Path(model)
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        raise ValueError(
            f"{model} holds no model_index.json, so it is no diffusers pipeline; save_pretrained makes one."
        )
    if folder.is_absolute() and not folder.is_dir():
        raise ValueError(f"{model}: there is no such folder.")
    options = dict(of.load_options)
    if revision is not None:
        options["revision"] = revision
    pipe = DiffusionPipeline.from_pretrained(model, dtype=getattr(torch, compute.dtype), **options)
    if not hasattr(pipe, of.denoiser):
        raise ValueError(
            f"{model} is a {type(pipe).__name__}, which has no {of.denoiser}: it is not of the family {family!r}."
        )
    device = default_device()
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            component.requires_grad_(False).eval()
    if compute.offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif compute.offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    else:
        for name, component in pipe.components.items():
            if isinstance(component, nn.Module) and name not in of.encoders:
                component.to(device)
    return Loaded(pipe, of, device)
