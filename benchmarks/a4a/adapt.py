"""Training an adapter on a frozen target through the library's own loop, and what is measured on the way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.a4a import world
from benchmarks.a4a.models import Text, objective
from benchmarks.a4a.pretrain import dropped
from xadapt_a4a.objective import Objective
from xadapt_a4a.training import train


@dataclass(frozen=True)
class Place:
    """A frozen target and all that an adapter is trained with there."""

    target: nn.Module
    text: Text
    encoder: world.Encoder
    objective: Objective

    @classmethod
    def of(cls, target: nn.Module, text: Text, encoder: world.Encoder) -> Place:
        return cls(target, text, encoder, objective(target))


@dataclass(frozen=True)
class References:
    """Training data: ever new identities, or only so many references, each with one picture, as a folder of photographs has."""

    count: int  # 0: ever new ones
    batch: int
    text_drop: float


class Batches:
    """Batches without end, as the trainer takes them. A reference shows its identity in another scene than the picture."""

    def __init__(self, references: References, place: Place, seed: int) -> None:
        self.references, self.place = references, place
        self.generator = torch.Generator().manual_seed(seed)
        self.pool = self._pairs(references.count) if references.count else None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            yield self._next()

    def _next(self) -> dict[str, Any]:
        size = self.references.batch
        images, scenes, embeds = self.pool or self._pairs(size)
        if self.pool:
            rows = torch.randint(len(images), (size,), generator=self.generator)
            images, scenes, embeds = images[rows], scenes[rows], embeds[rows]
        words = dropped(scenes, self.references.text_drop, self.generator)
        return {"latents": images, "image_embeds": embeds, **self.place.text(words)}

    def _pairs(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Pictures, their scenes, and the embeddings of their references."""
        drawn = world.draw(count, self.generator)
        seen = world.some_scenes(count, self.generator)
        return drawn.images, drawn.scenes, self.place.encoder(world.render(drawn.identities, seen, self.generator))


def learn(
    adapter: Any,
    place: Place,
    references: References,
    groups: Sequence[dict[str, Any]],
    stops: Sequence[int],
    *,
    image_drop: float,
    weight_decay: float,
    seed: int,
) -> Iterator[int]:
    """Trains, and yields the number of steps done at each of the stops."""
    optimizer = torch.optim.AdamW(list(groups), weight_decay=weight_decay, fused=True)
    batches = Batches(references, place, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    done = 0
    for stop in stops:
        if stop > done:
            train(
                adapter,
                place.target,
                batches,
                place.objective,
                optimizer=optimizer,
                steps=stop - done,
                generator=generator,
                image_drop=image_drop,
            )
        done = stop
        yield done
