"""The images of a training as latents, encoded once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

    from benchmarks.dreambooth.pipelines import Loaded


@dataclass(frozen=True)
class Examples:
    """Posteriors of the autoencoder, (m, c, h, w) each, and their sizes (m, 6) as SDXL is told them."""

    mean: Tensor
    std: Tensor
    sizes: Tensor

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Samples of random posteriors, not yet scaled, and their sizes."""
        rows = torch.randint(len(self.mean), (count,), generator=generator)
        noise = torch.randn((count, *self.mean.shape[1:]), generator=generator).to(self.mean)
        return self.mean[rows] + self.std[rows] * noise, self.sizes[rows]


@torch.inference_mode()
def encode(
    loaded: Loaded, images: Sequence[Image], resolution: int, crops: int, generator: torch.Generator
) -> Examples:
    """`crops` squares of each image, the shorter side resized to the resolution: at random, or of one the centre."""
    vae = loaded.pipe.vae
    kept = vae.dtype
    if kept == torch.float16 and getattr(vae.config, "force_upcast", False):
        vae.to(torch.float32)  # SDXL's overflows
    means, stds, sizes = [], [], []
    for image in images:
        for _ in range(crops):
            square, size = crop(image, resolution, generator if crops > 1 else None)
            pixels = loaded.pipe.image_processor.preprocess(square, height=resolution, width=resolution)
            posterior: Any = vae.encode(pixels.to(loaded.device, vae.dtype)).latent_dist
            means.append(posterior.mean.float())
            stds.append(posterior.std.float())
            sizes.append(size)
    if vae.dtype != kept:
        vae.to(kept)
    told = torch.tensor(sizes, device=loaded.device, dtype=torch.float32)
    # Clones: a tensor that was made without gradients may not be saved for a backward pass.
    return Examples(torch.cat(means).clone(), torch.cat(stds).clone(), told)


def crop(image: Image, side: int, generator: torch.Generator | None) -> tuple[Image, tuple[int, ...]]:
    """A square of the image and its size (original height and width, crop's top and left, height and width)."""
    from PIL.Image import Resampling

    width, height = image.size
    factor = side / min(width, height)
    scaled = (max(side, round(width * factor)), max(side, round(height * factor)))
    resized = image.resize(scaled, Resampling.BICUBIC)
    room = (scaled[0] - side, scaled[1] - side)
    if generator is None:
        left, top = room[0] // 2, room[1] // 2
    else:
        left, top = (int(torch.randint(space + 1, (1,), generator=generator)) for space in room)
    return resized.crop((left, top, left + side, top + side)), (height, width, top, left, side, side)
