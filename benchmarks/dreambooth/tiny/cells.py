"""The cells that make models and images on the spot; everything after them reads folders, as it does of real ones."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.dreambooth.settings import Family, Sampling
from benchmarks.dreambooth.tiny.settings import TinySettings
from benchmarks.frame.cell import Cell, Estimate, Result, how
from benchmarks.frame.worker import Worker


@dataclass(frozen=True, kw_only=True)
class TinyWorld(Cell):
    """Autoencoder, judges, and the subjects' images: made once."""

    settings: TinySettings
    hours: float = how(0.0)

    def run(self, worker: Worker) -> Result:
        from benchmarks.dreambooth.tiny.world import make_world

        return {"made": make_world(self.settings, worker.out, quiet=worker.quiet)}

    def estimate(self) -> Estimate:
        return Estimate(self.hours, 4.0)


@dataclass(frozen=True, kw_only=True)
class TinyPair(Cell):
    """A source and its time-distilled target."""

    world: TinyWorld
    family: Family
    settings: TinySettings
    target_sampling: Sampling
    hours: float = how(0.0)

    def run(self, worker: Worker) -> Result:
        from benchmarks.dreambooth.tiny.pretrain import make_pair

        made = make_pair(
            self.family,
            self.settings,
            worker.artifacts(self.world),
            worker.out,
            self.target_sampling,
            quiet=worker.quiet,
        )
        return {"made": made}

    def estimate(self) -> Estimate:
        return Estimate(self.hours, 10.0)

    def describe(self) -> str:
        return f"tiny {self.family}"
