"""What the denoiser draws and how it is asked: handwritten digits in four styles, and a text space of seventeen words.

A style is a polarity and a rotation. A prompt is three words, for example "7 inverted turned", and the words are rows of one
frozen table of random vectors. The table is all that independently trained models have in common.

The concept to be learned is one of the four styles under a new name, which is two words that no model has seen, as a
tokenizer would split a name.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import product

import torch
from torch import Tensor

POLARITIES = ("bright", "inverted")
ROTATIONS = ("upright", "turned")
Style = tuple[str, str]
STYLES: tuple[Style, ...] = tuple(product(POLARITIES, ROTATIONS))
CONCEPT: Style = ("inverted", "turned")
BLANK = "-"
NAME = ("kor", "vel")  # the new name of the concept
ONE_WORD = ("kor", "kor")  # the same with one vector for both, so that one vector has to say it all
WORDS = (*map(str, range(10)), *POLARITIES, *ROTATIONS, BLANK, *NAME)
TRAINING_IMAGES = 1300  # of the 1797


@dataclass(frozen=True)
class Batch:
    """images (n, 1, 8, 8) between -1 and 1; prompts (n, 3), rows of the table of words."""

    images: Tensor
    prompts: Tensor


@cache
def digits() -> tuple[Tensor, Tensor]:
    """The handwritten digits that ship with scikit-learn, in one fixed random order: images (1797, 1, 8, 8) in -1 to 1, labels (1797)."""
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]  # scikit-learn has no types

    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(found.images).float()[:, None] / 8 - 1
    return images[order], torch.from_numpy(found.target).long()[order]


def render(images: Tensor, style: Style) -> Tensor:
    """The images in that style: turned by a quarter, inverted, both or neither."""
    polarity, rotation = style
    turned = images.rot90(1, (2, 3)) if rotation == "turned" else images
    return -turned if polarity == "inverted" else turned


def concept_images(part: slice) -> tuple[Tensor, Tensor]:
    """Real images of the concept and their labels."""
    images, labels = digits()
    return render(images[part], CONCEPT), labels[part]


def prompts(labels: Tensor, words: tuple[str, str]) -> Tensor:
    """Prompts (n, 3): the digit, then the two words."""
    rest = torch.tensor([WORDS.index(word) for word in words])
    return torch.cat([labels[:, None], rest.expand(len(labels), 2)], dim=1)


def word_table(width: int, seed: int) -> Tensor:
    """The frozen text space, (words, width)."""
    return torch.randn(len(WORDS), width, generator=torch.Generator().manual_seed(seed + 1000))


@cache
def _training_set(styles: tuple[Style, ...]) -> Batch:
    """Every training image in each of the styles, with the prompts that say so."""
    images, labels = digits()
    images, labels = images[:TRAINING_IMAGES], labels[:TRAINING_IMAGES]
    return Batch(
        images=torch.cat([render(images, style) for style in styles]),
        prompts=torch.cat([prompts(labels, style) for style in styles]),
    )


def draw_styles(generator: torch.Generator, count: int, styles: tuple[Style, ...]) -> Batch:
    """Training images in random styles, with the prompts that say so."""
    everything = _training_set(styles)
    rows = torch.randint(len(everything.images), (count,), generator=generator)
    return Batch(images=everything.images[rows], prompts=everything.prompts[rows])


def draw_concept(generator: torch.Generator, count: int, part: slice, name: tuple[str, str]) -> Batch:
    """Images of the concept from that part of the digits, under its name."""
    images, labels = concept_images(part)
    rows = torch.randint(len(labels), (count,), generator=generator)
    return Batch(images=images[rows], prompts=prompts(labels[rows], name))
