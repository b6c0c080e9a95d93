"""What a target makes of references: a sheet with a row per reference and, for each prompt, an image per sampling seed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.a4a import world
from benchmarks.a4a.adapt import Place
from benchmarks.a4a.evaluate import Exam, attached, sample

REFERENCES, SEEDS = 5, 2
PROMPTS = (0, 7, 9, 14)  # scenes: one of each shape, each at another place
GAP = 1


def sheet(adapter: Any, place: Place, exam: Exam) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """RGB (height, width, 3): the reference first, then prompt by prompt its images. The same references and noise for all."""
    generator = torch.Generator().manual_seed(exam.seed + 3)
    drawn = world.draw(REFERENCES, generator)
    scenes = torch.tensor(PROMPTS).repeat_interleave(SEEDS).repeat(REFERENCES)
    prompts = torch.cat([world.blank_prompts(len(scenes)), world.prompts(scenes)])
    embeds = place.encoder(drawn.images).repeat_interleave(len(PROMPTS) * SEEDS, dim=0)
    with attached(adapter, place, embeds, guidance=True):
        made = sample(place, place.text(prompts), len(scenes), exam)
    rows = torch.cat([drawn.images[:, None], made.unflatten(0, (REFERENCES, -1))], dim=1)
    return _tiled(rows)


def _tiled(pictures: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """(rows, columns, 3, h, w) in -1 to 1 as one picture, with grey between."""
    grey = ((pictures.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 1, 3, 4, 2).numpy()
    framed = np.pad(grey, ((0, 0), (0, 0), (GAP, GAP), (GAP, GAP), (0, 0)), constant_values=144)
    rows, columns, height, width, channels = framed.shape
    return np.ascontiguousarray(framed.transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, channels))
