"""Which batch comes when: one numbered sequence, that every process and every resumed run sees in the same way."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from .training import endless

Numbered = tuple[int, Mapping[str, Any]]


@runtime_checkable
class Batches(Protocol):
    """A sequence of batches without end, that can be entered anywhere."""

    def numbered(self, start: int, every: int, seed: int) -> Iterator[Numbered]:
        """The batches start, start + every, start + 2·every, …, each with its number. The seed decides their order."""


class ReadyBatches:
    """Batches that the user has made, over and over. Those in between are made and left out, as they cannot be skipped."""

    def __init__(self, batches: Iterable[Mapping[str, Any]]) -> None:
        if not isinstance(batches, Iterable) or isinstance(batches, Mapping):
            raise TypeError(
                f"Batches are a list, a DataLoader or the like, of dicts; got {type(batches).__name__}. Put a single batch into a list."
            )
        self._batches = batches

    def numbered(self, start: int, every: int, seed: int) -> Iterator[Numbered]:
        return islice(enumerate(endless(self._batches, seed)), start, None, every)


def as_batches(given: Any) -> Batches:
    """What the trainer reads, from that or from batches that are ready."""
    return given if isinstance(given, Batches) else ReadyBatches(given)


def signature(batch: Mapping[str, Any]) -> list[float]:
    """Two numbers of each of a batch's main parts: enough to tell it from others, whatever machine encoded it."""
    parts: list[Tensor] = [
        batch[name].detach().float() for name in ("latents", "image_embeds", "encoder_hidden_states")
    ]
    return [number for part in parts for number in (part.mean().item(), part.abs().mean().item())]


def alike(one: list[float], other: list[float]) -> bool:
    """Whether two signatures are of one batch, encoded on two machines at most."""
    return len(one) == len(other) and all(
        math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-5) for a, b in zip(one, other, strict=True)
    )
