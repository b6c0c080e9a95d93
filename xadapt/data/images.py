"""A folder of pictures as noised latents, by the VAE of the pipeline that a denoiser belongs to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xadapt.base import CheckpointBase
from xadapt.contract import Base
from xadapt.opening import pipeline_of

from .denoisers import size_of

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def images_in(folder: Path, limit: int) -> list[Path]:
    """The first pictures in a folder, by name.

    Raises:
        ValueError: there is none.
    """
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)[:limit]
    if not found:
        raise ValueError(f"{folder} holds no picture ({', '.join(SUFFIXES)}).")
    return found


def noised_latents(paths: list[Path], base: Base, times: Tensor, generator: torch.Generator) -> Tensor:
    """The pictures as latents (count, channels, height, width), noised as Stable Diffusion's schedule does at these times.

    Args:
        times: (count,), 1 to 999.

    Raises:
        ValueError: the base is no component of a pipeline with a VAE, or a file is no picture.
    """
    import numpy as np
    from PIL import Image, UnidentifiedImageError

    vae = _vae(base)
    scale = 2 ** (len(vae.config.block_out_channels) - 1)
    height, width = (edge * scale for edge in size_of(dict(getattr(base, "config", {}))))
    latents = []
    for path in paths:
        try:
            with Image.open(path) as opened:
                picture = np.asarray(opened.convert("RGB").resize((width, height)))
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"{path} is no picture that can be opened: {error}") from error
        pixels = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
        with torch.no_grad():
            mean = vae.encode(pixels).latent_dist.mean
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        latents.append((mean - shift) * vae.config.scaling_factor)
    clean = torch.cat(latents)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()
    kept = (1 - betas).cumprod(0)[times].float()[:, None, None, None]
    return kept.sqrt() * clean + (1 - kept).sqrt() * torch.randn(clean.shape, generator=generator)


def _vae(base: Base) -> Any:
    index = pipeline_of(base) if isinstance(base, CheckpointBase) else None
    if not isinstance(base, CheckpointBase) or index is None or not any(index.get("vae") or ()):
        raise ValueError(
            f"Pictures become a denoiser's latents by the VAE of its pipeline, and {base.name} is in none that has one. Pass the "
            "pipeline's folder with component=…, or latents: batches of the arguments of its forward."
        )
    from xadapt.base import open_base

    return open_base(base.folder.parent, component="vae").module()
