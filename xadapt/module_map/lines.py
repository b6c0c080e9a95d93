"""What a module map says: its lines, what it could not map, and how much it covers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

Relation = Literal["same", "renamed", "aligned", "given", "heads", "reshaped", "part", "whole"]
"""How a source layer relates to a target layer:

same      name and shape
renamed   the shape; the name, or the name of a module around it, differs
aligned   the shape; in stacks of different depth, the blocks around them were aligned
given     the shape; the user's map says so
heads     all but the number of attention heads
reshaped  the place in the network; widths, kernel or sort of layer differ
part      the source layer is a part of a fused target layer
whole     the source layer is fused, and the target layer is a part of it
"""

ALIKE: tuple[Relation, ...] = ("same", "renamed", "aligned", "given")  # shapes are equal: tensors fit as they are


@dataclass(frozen=True)
class MappedLayer:
    """One line: a source layer, the target layer that does its work, and why."""

    source: str
    target: str
    relation: Relation
    reason: str
    rows: tuple[int, int] | None = None
    """The outputs [start, stop) of the fused layer that the part has. None where there is no fused layer, or where the
    part's outputs do not lie together in it or have other widths."""

    @property
    def fits(self) -> bool:
        """Whether a tensor of the one layer has the shape of the other's."""
        return self.relation in ALIKE


@dataclass(frozen=True)
class Unmatched:
    """A layer without a counterpart, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class Coverage:
    """How many layers a map covers."""

    source: int  # layers there are
    target: int
    mapped_source: int  # layers that have a line
    mapped_target: int
    relations: Mapping[Relation, int]  # lines of each

    def __str__(self) -> str:
        relations = ", ".join(f"{count} {relation}" for relation, count in self.relations.items()) or "nothing"
        return (
            f"{self.mapped_source} of {self.source} source layers → {self.mapped_target} of {self.target} target layers "
            f"({relations})"
        )


@dataclass(frozen=True)
class ModuleMap:
    """Source layer → target layer, in the source's order, and what is left on either side."""

    lines: tuple[MappedLayer, ...]
    unmatched_source: tuple[Unmatched, ...]
    unmatched_target: tuple[Unmatched, ...]

    @property
    def coverage(self) -> Coverage:
        sources, targets = {line.source for line in self.lines}, {line.target for line in self.lines}
        return Coverage(
            source=len(sources) + len(self.unmatched_source),
            target=len(targets) + len(self.unmatched_target),
            mapped_source=len(sources),
            mapped_target=len(targets),
            relations=dict(Counter(line.relation for line in self.lines).most_common()),
        )

    def of(self, source: str) -> tuple[MappedLayer, ...]:
        """The lines of one source layer: several where it is fused and the target's are not, none if it is unmatched."""
        return tuple(line for line in self.lines if line.source == source)

    def why_unmatched(self, source: str) -> str | None:
        """Why this source layer has no line, or None if it has one or is no layer."""
        return next((layer.reason for layer in self.unmatched_source if layer.path == source), None)

    def restricted(self, sources: Collection[str]) -> ModuleMap:
        """The map of these source layers only, those of an adapter for instance. Target layers are not listed then."""
        return ModuleMap(
            tuple(line for line in self.lines if line.source in sources),
            tuple(layer for layer in self.unmatched_source if layer.path in sources),
            (),
        )

    def summary(self) -> str:
        """The coverage, then what does not fit as it is, one layer a line."""
        rows = [str(self.coverage)]
        rows += [f"  {line.source} → {line.target}: {line.reason}" for line in self.lines if not line.fits]
        rows += [f"  {layer.path} → nothing: {layer.reason}" for layer in self.unmatched_source]
        rows += [f"  nothing → {layer.path}: {layer.reason}" for layer in self.unmatched_target]
        return "\n".join(rows)
