"""What a sweep is: every adapter to every target by every method, and how each is looked at afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from benchmarks.frame.cell import Cell
from benchmarks.frame.sweep import Finished
from benchmarks.sweep.cells import Transferred, Verified


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Paths and hub ids are as `xadapt transfer` takes them."""

    source: str
    adapters: tuple[str, ...]
    targets: tuple[str, ...]
    methods: tuple[str, ...] = ("auto",)
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """By method, its options: {"lora_x": {"rank": 64}}."""

    data: str | None = None
    """Unlabelled inputs: given to methods that learn, and to verify. Without it nothing is verified."""

    neutral: str | None = None
    samples: int = 128
    component: str | None = None
    partial: bool = False
    seed: int = 0


def check(settings: Settings) -> None:
    """Raises ValueError for a method that there is not, or options of a method that is not asked for."""
    from xadapt import registry
    from xadapt.method_options import build

    for method in settings.methods:
        build(registry.get(method), dict(settings.options.get(method, {})))
    strange = sorted(settings.options.keys() - set(settings.methods))
    if strange:
        raise ValueError(f"options are given for {', '.join(strange)}, which methods does not name.")


def stages(settings: Settings, finished: Finished) -> Iterator[Sequence[Cell]]:
    """All transfers, then what became of them."""
    transfers = [
        Transferred(
            adapter=adapter,
            source=settings.source,
            target=target,
            method=method,
            options=dict(settings.options.get(method, {})),
            data=settings.data,
            samples=settings.samples,
            component=settings.component,
            partial=settings.partial,
            seed=settings.seed,
        )
        for target, adapter, method in product(settings.targets, settings.adapters, settings.methods)
    ]
    yield transfers
    if settings.data is not None:
        yield [Verified(transfer=each, neutral=settings.neutral) for each in transfers]
