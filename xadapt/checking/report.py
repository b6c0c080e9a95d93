"""What check returns: measures, verdicts, coverage, and what the adapter says of its base."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from xadapt.fingerprint import Match

from .decisions import Decision
from .measures import LayerMeasures, mean, mean_of_lowest
from .thresholds import Thresholds


@dataclass(frozen=True, kw_only=True)
class CheckReport:
    """What carrying an adapter would meet."""

    adapter: str
    kind: str
    source: str
    target: str
    belongs: dict[Match, int]
    """The adapter's recorded fingerprint of its base against the source: how many layers are the same, differ, …; empty where
    none is recorded, as in stock LoRAs."""

    coverage: str
    """Of the module map, restricted to the adapter's layers."""

    data: str | None
    """What the activations were measured on; None without data."""

    layers: tuple[LayerMeasures, ...]
    decision: Decision
    recommended: str | None
    """A method to pass to transfer; None where nothing that is installed is advised."""

    thresholds: Thresholds = field(default_factory=Thresholds)
    notes: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        return self.decision.verdict

    @property
    def refused(self) -> bool:
        return self.decision.verdict == "refused"

    @property
    def weight_similarity(self) -> dict[str, float | None]:
        """The mean cosine of the weights, over all of the adapter's layers and over the fifth with the lowest."""
        cosines = [layer.weight_cosine for layer in self.layers]
        return {"all layers": mean(cosines), "lowest 20 %": mean_of_lowest(cosines)}

    @property
    def belongs_to_source(self) -> bool:
        """False where the recorded fingerprint is another base's."""
        return belongs(self.belongs)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        rows = [
            {**asdict(layer), **asdict(verdict)}
            for layer, verdict in zip(self.layers, self.decision.layers, strict=True)
        ]
        return {
            "adapter": self.adapter,
            "kind": self.kind,
            "source": self.source,
            "target": self.target,
            "verdict": self.verdict,
            "why": self.decision.why,
            "recommended": self.recommended,
            "ways": self.decision.ways,
            "belongs": dict(self.belongs),
            "coverage": self.coverage,
            "weight_similarity": self.weight_similarity,
            "data": self.data,
            "notes": list(self.notes),
            "thresholds": asdict(self.thresholds),
            "layers": rows,
        }


def belongs(matches: dict[Match, int]) -> bool:
    """Whether an adapter's fingerprint speaks for a base: not where more layers differ than agree."""
    told = Counter(matches)
    return told["differs"] + told["other shape"] <= told["same"]
