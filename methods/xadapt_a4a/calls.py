"""Targets that pipelines call once per half of guidance, instead of once on [negative; positive]: which half it is.

FLUX with true_cfg_scale, and Chroma. Their pipelines say it with diffusers' `transformer.cache_context("cond" | "uncond")`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from diffusers.models.transformers.transformer_flux import FluxAttention
from torch import nn

from .targets import AttentionLayer

NEGATIVE = "uncond"


def are_separate(layers: Sequence[AttentionLayer]) -> bool:
    """Whether the halves come in two calls."""
    return any(isinstance(layer.module, FluxAttention) for layer in layers)


class _Announced:
    """A target's own `cache_context`, which also tells its listeners."""

    def __init__(self, own: Any) -> None:
        self.own = own
        self.listeners: list[Callable[[str], None]] = []

    @contextmanager
    def __call__(self, name: str, **named: Any) -> Iterator[None]:
        try:
            for listener in self.listeners:
                listener(name)
            with self.own(name, **named):
                yield
        finally:
            for listener in self.listeners:
                listener("")


def listen(target: nn.Module, listener: Callable[[str], None]) -> Callable[[], None]:
    """Calls the listener with the name of each context that is entered, and with "" when it is left.

    Returns:
        What ends that. With the last listener the target is as it was.
    """
    announced: Any = vars(target).get("cache_context")
    if not isinstance(announced, _Announced):
        own = getattr(target, "cache_context", None)
        if own is None:  # nobody can say which half it is
            return lambda: None
        announced = _Announced(own)
        vars(target)["cache_context"] = announced

    def stop() -> None:
        announced.listeners.remove(listener)
        if not announced.listeners:
            del vars(target)["cache_context"]

    announced.listeners.append(listener)
    return stop
