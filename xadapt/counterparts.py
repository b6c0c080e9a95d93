"""The layers of an adapter with their counterparts in another base, by the module map and the widths that have to agree."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn

from xadapt.contract import Siblings
from xadapt.errors import some
from xadapt.update import to_stored

Side = Literal["input", "output", "both", "neither"]
"""The widths of a layer that a method has no way over a change of."""


@dataclass(frozen=True)
class Counterparts:
    """Where each layer goes, and why the others go nowhere."""

    found: dict[str, str] = field(default_factory=dict)  # source path → target path
    left_out: dict[str, str] = field(default_factory=dict)  # source path → why


def counterparts(paths: Iterable[str], bases: Siblings, agree: Side) -> Counterparts:
    """The counterpart of each of these source layers. Opens no weight.

    Raises:
        ValueError: none has one.
    """
    result = Counterparts()
    there, here = bases.source.modules(), bases.target.modules()
    for path in paths:
        lines = bases.modules.of(path)
        if len(lines) != 1 or lines[0].relation in ("part", "whole"):
            result.left_out[path] = _why(bases.modules.why_unmatched(path), [line.reason for line in lines])
        elif not agrees(shape_of(there[path]), shape_of(here[lines[0].target]), agree):
            result.left_out[path] = f"→ {lines[0].target}: {lines[0].reason}"
        else:
            result.found[path] = lines[0].target
    if result.left_out and not result.found:
        reasons = [f"{path}: {why}" for path, why in result.left_out.items()]
        raise ValueError(
            f"None of the adapter's {len(reasons)} layers can be carried to {bases.target.name} by this method:\n  "
            + some(reasons, separator="\n  ")
        )
    return result


def shape_of(module: nn.Module) -> tuple[int, ...]:
    """(out, in, *kernel) of a linear, convolution or embedding."""
    inputs, outputs = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(inputs, int) and isinstance(outputs, int):  # a quantised weight is stored in another shape
        return outputs, inputs
    weight = module.weight
    assert isinstance(weight, Tensor)
    return tuple(to_stored(module, weight).shape)


def agrees(source: tuple[int, ...], target: tuple[int, ...], side: Side) -> bool:
    """Whether two shapes (out, in, *kernel) have the widths in common that a method has no way over a change of."""
    if len(source) != len(target) or source[2:] != target[2:]:
        return False  # a convolution and a linear, or two kernels
    wanted = {"input": source[1:2] == target[1:2], "output": source[:1] == target[:1], "neither": True}
    return wanted.get(side, source == target)


def _why(unmatched: str | None, reasons: list[str]) -> str:
    if unmatched is not None:
        return unmatched
    return f"{reasons[0]}; an adapter is not split or fused" if reasons else "it is no linear, convolution or embedding"
