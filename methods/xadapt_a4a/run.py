"""What a training run is told, and what whoever watches it is shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from diffusers.training_utils import EMAModel
from torch import nn

from .reference import ReferenceAdapter

Observer = Callable[["Progress"], Mapping[str, float] | None]
"""Called after each step, in the main process; what it returns goes to the trackers."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """How to train, whatever is trained."""

    steps: int
    seed: int = 0
    image_drop: float = 0.05
    text_drop: float | None = None
    both_drop: float | None = None
    ema: float = 0.0  # the average's decay; 0 keeps none
    max_grad_norm: float = 0.0  # 0 clips nothing
    recompute: bool = False  # gradient checkpointing of the target
    checkpoints: str = ""
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    settings: Mapping[str, Any] = field(default_factory=dict)  # what else must be the same in a run that goes on

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps={self.steps}: a run has at least one step.")
        if not 0 <= self.ema < 1:
            raise ValueError(
                f"ema={self.ema} is no decay; write a number from 0 (no average) to below 1, such as 0.9999."
            )
        if self.checkpoint_every < 1:
            raise ValueError(f"checkpoint_every={self.checkpoint_every}: write a number of steps, 1 or more.")


@dataclass(frozen=True)
class Progress:
    """What an observer is shown."""

    step: int  # steps done
    steps: int
    loss: float
    model: ReferenceAdapter
    target: nn.Module
    ema: EMAModel | None = None

    @contextmanager
    def averaged(self) -> Iterator[ReferenceAdapter]:
        """The adapter with its averaged weights, where an average is kept."""
        with averaged(self.model, self.ema):
            yield self.model


@contextmanager
def averaged(model: nn.Module, ema: EMAModel | None) -> Iterator[None]:
    """The model with its averaged weights inside the block, where there are some, and with its own again afterwards."""
    if ema is None:
        yield
        return
    ema.store(model.parameters())
    ema.copy_to(model.parameters())
    try:
        yield
    finally:
        ema.restore(model.parameters())
