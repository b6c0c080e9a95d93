"""What the tiny models draw: objects with a body and a ring around it, on a ground, at a place, in a size.

A caption names any of these, or none. Some pairs of body and ring colour are never drawn for training: those are the
subjects, so that a subject is made of parts that every model knows and is itself new to all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

PIXELS = 16
SHAPES = ("square", "disc", "cross", "triangle")
COLOURS = {
    "red": (0.9, 0.15, 0.15),
    "gold": (0.95, 0.8, 0.1),
    "mint": (0.3, 0.9, 0.6),
    "blue": (0.2, 0.35, 0.95),
    "rose": (0.95, 0.5, 0.75),
}
GROUNDS = {
    "white": (0.95, 0.95, 0.95),
    "grey": (0.55, 0.55, 0.55),
    "navy": (0.1, 0.1, 0.35),
    "black": (0.03, 0.03, 0.03),
}
PLACES = {"left": -0.2, "middle": 0.0, "right": 0.2}
SIZES = {"small": 0.58, "medium": 0.72, "big": 0.88}
# Subject: (body, ring). With any shape, these two are never together in training.
HELD_OUT = {"mint_square": ("mint", "red"), "rose_disc": ("rose", "blue"), "gold_cross": ("gold", "mint")}
COMBINATIONS = tuple(product(COLOURS, COLOURS))
KNOWN = tuple(pair for pair in COMBINATIONS if pair not in HELD_OUT.values() and pair[0] != pair[1])


@dataclass(frozen=True)
class Scene:
    """One image: shape, colours of body and ring, ground, place and size, all by name."""

    shape: str
    body: str
    ring: str
    ground: str
    place: str = "middle"
    size: str = "medium"

    def caption(self, generator: torch.Generator) -> str:
        """Some of what is to be seen, in the words of the prompts in data/shapes.toml."""
        colours, ground, place, size = (torch.rand(4, generator=generator) < 0.5).tolist()
        words = ["a"]
        if size and self.size != "medium":
            words.append(self.size)
        if colours:
            words += [self.body, self.ring]
        words.append(self.shape)
        if place and self.place != "middle":
            words += ["on", "the", self.place]
        if ground:
            words += ["on", "a", self.ground, "ground"]
        photo = not ground and bool(torch.rand(1, generator=generator) < 0.5)  # both at once would be too long
        return " ".join(["a", "photo", "of", *words] if photo else words)


def words() -> list[str]:
    """Every word of the captions and prompts."""
    return ["a", "photo", "of", "on", "the", "ground", *SHAPES, *COLOURS, *GROUNDS, *PLACES, *SIZES]


def draw(scene: Scene) -> Tensor:
    """The image, (3, 16, 16) between 0 and 1, with smooth edges."""
    axis = (torch.arange(PIXELS) + 0.5) / PIXELS * 2 - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    x = x - PLACES[scene.place]
    size = SIZES[scene.size]
    image = _colour(GROUNDS[scene.ground]).expand(3, PIXELS, PIXELS)
    for radius, colour in ((size, scene.ring), (size * 0.6, scene.body)):
        inside = torch.sigmoid((radius - _distance(scene.shape, x, y)) * PIXELS)
        image = inside * _colour(COLOURS[colour]) + (1 - inside) * image
    return image.clone()


def _distance(shape: str, x: Tensor, y: Tensor) -> Tensor:
    """What is below the radius lies inside."""
    if shape == "disc":
        return (x.square() + y.square()).sqrt()
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) * 1.15
    if shape == "triangle":
        return torch.maximum(y * 1.3, x.abs() * 1.15 - y * 0.65 + 0.1)
    return torch.minimum(torch.maximum(x.abs() * 2.6, y.abs()), torch.maximum(x.abs(), y.abs() * 2.6))  # cross


def _colour(colour: tuple[float, float, float]) -> Tensor:
    return torch.tensor(colour).view(3, 1, 1)


def random_scene(generator: torch.Generator, colours: tuple[tuple[str, str], ...] = KNOWN) -> Scene:
    """A scene with one of these pairs of colours, everything else at random."""

    def one(of: tuple[str, ...]) -> str:
        return of[int(torch.randint(len(of), (1,), generator=generator))]

    body, ring = colours[int(torch.randint(len(colours), (1,), generator=generator))]
    return Scene(one(SHAPES), body, ring, one(tuple(GROUNDS)), one(tuple(PLACES)), one(tuple(SIZES)))


def subject_scenes(subject: str, count: int, generator: torch.Generator) -> list[Scene]:
    """Photographs of a subject, each elsewhere and on another ground."""
    shape = subject.partition("_")[2]
    grounds, places, sizes = tuple(GROUNDS), tuple(PLACES), tuple(SIZES)
    first = int(torch.randint(12, (1,), generator=generator))
    return [
        Scene(
            shape,
            *HELD_OUT[subject],
            grounds[(first + index) % 4],
            places[(first + index) % 3],
            sizes[(first + index // 2) % 3],
        )
        for index in range(count)
    ]


def labels() -> list[str]:
    """What the classifier tells apart: shape, body and ring, the subjects by their names."""
    subjects = {(name.partition("_")[2], *colours): name for name, colours in HELD_OUT.items()}
    every = [(shape, body, ring) for shape in SHAPES for body, ring in COMBINATIONS if body != ring]
    return [subjects.get(each, "-".join(each)) for each in every]


def label(scene: Scene) -> str:
    """The label of a scene."""
    for name, colours in HELD_OUT.items():
        if scene.shape == name.partition("_")[2] and (scene.body, scene.ring) == colours:
            return name
    return f"{scene.shape}-{scene.body}-{scene.ring}"
