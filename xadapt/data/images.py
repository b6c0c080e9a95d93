"""Pictures as noised latents, by the VAE of the pipeline that a denoiser belongs to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from xadapt.base import CheckpointBase
from xadapt.contract import Base
from xadapt.opening import pipeline_of
from xadapt.strict_json import read_object

from .denoisers import size_of

if TYPE_CHECKING:
    from PIL import Image

    Picture = Path | Image.Image

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


def images_of_rows(rows: Iterable[Any], limit: int) -> list[Picture]:
    """The pictures of the first rows of a `datasets.Dataset`.

    Raises:
        ValueError: there is no row, or no column of pictures.
    """
    from PIL import Image

    first = list(islice(rows, limit))
    if not first:
        raise ValueError("The data is empty: the dataset has no row.")
    held = dict(first[0]) if isinstance(first[0], Mapping) else {}
    columns = [name for name, value in held.items() if isinstance(value, Image.Image)]
    if not columns:
        raise ValueError(
            f"A denoiser's dataset has a column of pictures (datasets.Image); this one has {', '.join(map(repr, held)) or 'no columns'}."
        )
    return [row[columns[0]] for row in first]


def noised_latents(pictures: Sequence[Picture], base: Base, times: Tensor, generator: torch.Generator) -> Tensor:
    """The pictures as latents (count, channels, height, width), noised for these times: along a straight line where the
    pipeline's scheduler is one of flow matching, else by Stable Diffusion's schedule.

    Args:
        times: (count,), 1 to 999.

    Raises:
        ValueError: the base is no component of a pipeline with a VAE, or a file is no picture.
    """
    import numpy as np

    vae = _vae(base)
    scale = 2 ** (len(vae.config.block_out_channels) - 1)
    height, width = (edge * scale for edge in size_of(dict(getattr(base, "config", {}))))
    latents = []
    for picture in pictures:
        small = np.asarray(_opened(picture).resize((width, height)))
        pixels = torch.from_numpy(small.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
        with torch.no_grad():
            mean = vae.encode(pixels).latent_dist.mean
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        latents.append((mean - shift) * vae.config.scaling_factor)
    clean = torch.cat(latents)
    noise = torch.randn(clean.shape, generator=generator)
    if _flows(base):
        share = (times / 1000)[:, None, None, None]
        return (1 - share) * clean + share * noise
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()
    kept = (1 - betas).cumprod(0)[times].float()[:, None, None, None]
    return kept.sqrt() * clean + (1 - kept).sqrt() * noise


def _opened(picture: Picture) -> Image.Image:
    from PIL import Image, UnidentifiedImageError

    if isinstance(picture, Image.Image):
        return picture.convert("RGB")
    try:
        with Image.open(picture) as opened:
            return opened.convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{picture} is no picture that can be opened: {error}") from error


def _flows(base: Base) -> bool:
    """Whether the pipeline that a base is a component of has a scheduler of flow matching."""
    path = base.folder.parent / "scheduler" / "scheduler_config.json" if isinstance(base, CheckpointBase) else None
    return path is not None and path.is_file() and "FlowMatch" in str(read_object(path).get("_class_name"))


def _vae(base: Base) -> Any:
    index = pipeline_of(base) if isinstance(base, CheckpointBase) else None
    if not isinstance(base, CheckpointBase) or index is None or not any(index.get("vae") or ()):
        raise ValueError(
            f"Pictures become a denoiser's latents by the VAE of its pipeline, and {base.name} is in none that has one. Pass the "
            "pipeline's folder with component=…, or latents: batches of the arguments of its forward."
        )
    from xadapt.base import open_base

    return open_base(base.folder.parent, component="vae").module()
