"""What a sweep is: every adapter to every target by every method, and how each is looked at afterwards."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
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


def digest(path: str | None) -> str:
    """A hash of a file, or of the files of a folder and their names; "" of what is neither, such as a data set of the hub."""
    root = Path(path or "")
    if not path or not root.exists():
        return ""
    found = hashlib.sha256()
    for file in sorted(each for each in (root.rglob("*") if root.is_dir() else [root]) if each.is_file()):
        found.update(f"{file.relative_to(root)}\0".encode())
        with file.open("rb") as content:
            while piece := content.read(1 << 20):
                found.update(piece)
    return found.hexdigest()[:16]


def stages(settings: Settings, finished: Finished) -> Iterator[Sequence[Cell]]:
    """All transfers, then what became of them."""
    digests, data = {adapter: digest(adapter) for adapter in settings.adapters}, digest(settings.data)
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
            contents=(digests[adapter], data),
        )
        for target, adapter, method in product(settings.targets, settings.adapters, settings.methods)
    ]
    yield transfers
    if settings.data is not None:
        yield [Verified(transfer=each, neutral=settings.neutral) for each in transfers]
