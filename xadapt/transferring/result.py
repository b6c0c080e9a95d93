"""What a transfer says before (the plan) and after (the result)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from xadapt.layer_names import grouped, merged, pattern_of, together, wording_of


@dataclass(frozen=True)
class PlannedLayer:
    """A layer that the adapter changes, and where the module map sends it."""

    source: str
    target: str | None
    relation: str | None
    reason: str
    bytes: int
    """Of the two weights together, if a method reads them."""


@dataclass(frozen=True, kw_only=True)
class TransferPlan:
    """What a transfer would do. Only headers and the adapter have been read."""

    adapter: str
    source: str
    target: str
    out: Path
    method: str
    options: Mapping[str, Any]
    reads: str
    writes: str
    learns: bool
    """Whether it learns from data before it carries anything."""

    loads: tuple[str, ...]
    """The bases that would be loaded, because data is given or needed."""

    layers: tuple[PlannedLayer, ...]
    adapter_bytes: int
    refused: str | None = None
    """Why it would be refused, as far as that is known before anything is carried."""

    untested: str | None = None
    """What it may still be refused for, as only the weights or the data show it; None where the plan has seen all."""

    @property
    def weight_bytes(self) -> int:
        """The adapted layers' weights in both bases: the most that a method reads that looks at weights alone."""
        return sum(layer.bytes for layer in self.layers)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "out": str(self.out), "options": dict(self.options), "weight_bytes": self.weight_bytes}


@dataclass(frozen=True)
class CarriedLayer:
    """A layer of the target that the written adapter changes."""

    path: str
    method: str
    """Which method made it: a method that chooses by layer says so in its evidence."""

    evidence: Mapping[str, float | str]


@dataclass(frozen=True, kw_only=True)
class TransferResult:
    """What was written, and how it came about."""

    out: Path
    adapter: str
    source: str
    target: str
    method: str
    options: Mapping[str, Any]
    read: str
    """The kind that was read."""

    written: str
    """The kind that was written."""

    layers: tuple[CarriedLayer, ...]
    left_out: Mapping[str, str]
    """By layer of the source, why it was not carried: only with partial=True."""

    belongs: Mapping[str, int]
    """The adapter's recorded fingerprint against the source; empty where none is recorded."""

    considered: Mapping[str, Mapping[str, float | str]] = field(default_factory=dict)
    """Of a method that chooses among others: by their names, what was measured of each."""

    source_fingerprint: Mapping[str, str] = field(repr=False)
    target_fingerprint: Mapping[str, str] = field(repr=False)
    parameters: int
    bytes: int
    data: str | None = None
    notes: tuple[str, ...] = ()
    """What a reader should know and the numbers do not say."""

    trusted: bool = False
    """The source was taken for the adapter's own against its fingerprint, because the caller said so."""

    @property
    def methods(self) -> dict[str, int]:
        """How many layers each method made, the most frequent first."""
        return dict(Counter(layer.method for layer in self.layers).most_common())

    def summary(self) -> str:
        """Some lines for people."""
        made = ", ".join(f"{name} on {count} layers" for name, count in self.methods.items())
        lines = [
            f"{self.out}: {self.adapter} ({self.read}) carried from {self.source} to {self.target} as {self.written}",
            f"by {made}; {self.parameters:,} parameters",
        ]
        errors = [float(layer.evidence["error"]) for layer in self.layers if "error" in layer.evidence]
        if errors:
            lines.append(
                f"relative error of the updates: {sum(errors) / len(errors):.3f} on average, {max(errors):.3f} at most"
            )
        if self.left_out:
            lines.append(f"left out {len(self.left_out)} layers:")
            groups = grouped(self.left_out.items(), lambda one: (pattern_of(one[0]), wording_of(one[1])))
            lines += [f"  {together([path for path, _ in one])}: {merged([why for _, why in one])}" for one in groups]
        if self.trusted:
            lines.append("The source was not the base that the adapter was trained on, by its fingerprint.")
        lines += self.notes
        return "\n".join(lines)

    def record(self) -> dict[str, Any]:
        """What the adapter's config keeps of it."""
        from xadapt.version import __version__

        return {
            "xadapt_version": __version__,
            "method": self.method,
            "options": dict(self.options),
            "read": self.read,
            "source": self.source,
            "target": self.target,
            "source_fingerprint": dict(self.source_fingerprint),
            "target_fingerprint": dict(self.target_fingerprint),
            "layers": {layer.path: {"method": layer.method, **layer.evidence} for layer in self.layers},
            "left_out": dict(self.left_out),
            "considered": {name: dict(measured) for name, measured in self.considered.items()},
            "data": self.data,
        }

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "out": str(self.out),
            "adapter": self.adapter,
            "written": self.written,
            "methods": self.methods,
            "belongs": dict(self.belongs),
            "parameters": self.parameters,
            "bytes": self.bytes,
            "notes": list(self.notes),
            "trusted": self.trusted,
            **self.record(),
        }
