"""Randomness that belongs to a sample, not to a process or a moment.

A sample's noise, time step and drops follow from the seed and from its place in the run alone: its batch and its row. So a run
that goes on from a checkpoint has no state of a generator to restore, and two processes draw what one would have drawn.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Generators = torch.Generator | Sequence[torch.Generator]
"""One generator for a batch, or one for each sample, as diffusers' `randn_tensor` takes them."""


def seed_of(seed: int, *place: int | str) -> int:
    """A seed of 63 bits for one place in a run."""
    text = "/".join(map(str, (seed, *place)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def sample_generators(seed: int, batch: int, size: int) -> list[torch.Generator]:
    """A generator for each of the `size` samples of the batch with this number."""
    return [torch.Generator().manual_seed(seed_of(seed, batch, row)) for row in range(size)]


def drawn(draw: Callable[[int, torch.Generator], Tensor], size: int, generators: Generators) -> Tensor:
    """`draw(n, generator)`, (n, …), for a whole batch or sample by sample."""
    if isinstance(generators, torch.Generator):
        return draw(size, generators)
    if len(generators) != size:
        raise ValueError(
            f"There are {len(generators)} generators for {size} samples; pass one for each, or one for all."
        )
    return torch.cat([draw(1, one) for one in generators])
