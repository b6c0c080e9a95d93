"""The generated world: a scene, which the prompt says, in the colours of an identity, which only the reference shows.

An image is 8 x 8 in colour: one of four shapes at one of four places. Its identity is three colours, of the background, of the
shape's even and of its odd rows. A reference is an image of the same identity in another scene, so whoever copies the reference does not follow
the prompt. The reference is seen through a frozen random network on its pixels, in which scene and colours are entangled.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import pairwise, product

import torch
from torch import Tensor

SIDE = 8
COLOURS = 3  # of an identity
IDENTITY = 3 * COLOURS  # its numbers, each from -1 to 1
SHAPES = ("disc", "frame", "cross", "bar")
PLACES = ("upper left", "upper right", "lower left", "lower right")
SCENES = tuple(product(SHAPES, PLACES))
WORDS = (*SHAPES, *PLACES, "-")
PROMPT = 3  # words; the first is always "-", as tokenizers begin with a word of their own
GRAIN = 0.03

_PATTERNS = {
    "disc": ("01110", "11111", "11111", "11111", "01110"),
    "frame": ("11111", "10001", "10001", "10001", "11111"),
    "cross": ("00100", "00100", "11111", "00100", "00100"),
    "bar": ("00000", "11111", "11111", "11111", "00000"),
}


@dataclass(frozen=True)
class Scenes:
    """Images (n, 3, 8, 8) between -1 and 1, the identities (n, 9) and the scenes (n) that they show."""

    images: Tensor
    identities: Tensor
    scenes: Tensor


@cache
def _masks() -> Tensor:
    """Which colour each pixel of each scene has, (16, 3, 8, 8)."""
    masks = torch.zeros(len(SCENES), COLOURS, SIDE, SIDE)
    for number, (shape, place) in enumerate(SCENES):
        top, left = (3 if "lower" in place else 0), (3 if "right" in place else 0)
        for row, line in enumerate(_PATTERNS[shape]):
            for column, mark in enumerate(line):
                masks[number, (1 + row % 2) * int(mark), top + row, left + column] = 1
    masks[:, 0] = 1 - masks[:, 1] - masks[:, 2]
    return masks


def identities(count: int, generator: torch.Generator) -> Tensor:
    """New identities, (count, 9)."""
    return 2 * torch.rand(count, IDENTITY, generator=generator) - 1


def render(who: Tensor, scenes: Tensor, generator: torch.Generator) -> Tensor:
    """Identities (n, 9) in scenes (n): images (n, 3, 8, 8), with a little grain."""
    colours = who.view(-1, COLOURS, 3)
    images = torch.einsum("npyx,npc->ncyx", _masks()[scenes], colours)
    return images + GRAIN * torch.randn(images.shape, generator=generator)


def some_scenes(count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(len(SCENES), (count,), generator=generator)


def draw(count: int, generator: torch.Generator) -> Scenes:
    """New identities, each in a scene of its own."""
    who, scenes = identities(count, generator), some_scenes(count, generator)
    return Scenes(render(who, scenes, generator), who, scenes)


def prompts(scenes: Tensor) -> Tensor:
    """What says these scenes, (n, 3): rows of a table of words."""
    blank = torch.full_like(scenes, WORDS.index("-"))
    return torch.stack([blank, scenes // len(PLACES), len(SHAPES) + scenes % len(PLACES)], dim=1)


def blank_prompts(count: int) -> Tensor:
    return torch.full((count, PROMPT), WORDS.index("-"))


def word_table(width: int, seed: int) -> Tensor:
    """A model's text encoder, (words, width): every model has one of its own."""
    return torch.randn(len(WORDS), width, generator=torch.Generator().manual_seed(seed))


class Encoder:
    """The image encoder: a frozen random network of `depth` layers on the pixels. `gain` is how entangled its output is."""

    def __init__(self, width: int, depth: int, gain: float, seed: int = 77) -> None:
        generator = torch.Generator().manual_seed(seed)
        sizes = [3 * SIDE * SIDE, *[width] * depth]
        self.layers = [torch.randn(below, above, generator=generator) / below**0.5 for below, above in pairwise(sizes)]
        self.gain = gain

    def __call__(self, images: Tensor) -> Tensor:
        """image_embeds (n, width) of images (n, 3, 8, 8)."""
        x = images.flatten(1)
        for weight in self.layers:
            x = torch.sin(self.gain * (x @ weight))
        return x * 2**0.5
