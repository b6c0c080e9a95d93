"""Small cells for the tests of benchmarks/frame. At module level of a module: other processes import them."""

from __future__ import annotations

import errno
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.frame.cell import Cell, Estimate, Result, how
from benchmarks.frame.worker import Worker


@dataclass(frozen=True, kw_only=True)
class Square(Cell):
    """Squares a number; notes every run in a file, so that tests can count runs."""

    number: float
    notes: str = how("")  # a folder
    family: str = ""

    def run(self, worker: Worker) -> Result:
        if self.notes:
            with (Path(self.notes) / "runs.txt").open("a") as file:
                file.write(f"{self.number:g} {os.getpid()}\n")
        base = worker.base(self.family, lambda: f"loaded {self.family}") if self.family else ""
        (worker.out / "square.txt").write_text(str(self.number**2))
        return {"square": self.number**2, "base": base, "rows": [{"metric": "square", "value": self.number**2}]}

    def base(self) -> str:
        return self.family

    def estimate(self) -> Estimate:
        return Estimate(hours=0.5, megabytes=2.0)


@dataclass(frozen=True, kw_only=True)
class Plus(Cell):
    """Adds to what another cell found."""

    of: Square
    term: float

    def run(self, worker: Worker) -> Result:
        stored = float((worker.artifacts(self.of) / "square.txt").read_text())
        return {"sum": worker.result(self.of)["square"] + self.term, "stored": stored}


@dataclass(frozen=True, kw_only=True)
class Fails(Square):
    """Fails, in a way to choose."""

    error: str = "value"

    def run(self, worker: Worker) -> Result:
        (worker.out / "half.txt").write_text("half")
        if self.error == "memory":
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")
        if self.error == "disk":
            raise OSError(errno.ENOSPC, "No space left on device")
        raise ValueError("a number that does not please")


@dataclass(frozen=True, kw_only=True)
class Dies(Square):
    """Kills its own process: the first time, or every time."""

    always: bool = False

    def run(self, worker: Worker) -> Result:
        marker = Path(self.notes) / f"died-{self.number:g}"
        assert [path.name for path in worker.out.iterdir()] == [], "what a killed worker left is still there"
        (worker.out / "half.txt").write_text("half")
        if self.always or not marker.exists():
            marker.write_text("")
            os.kill(os.getpid(), signal.SIGKILL)
        return super().run(worker)


@dataclass(frozen=True, kw_only=True)
class Slow(Square):
    """Says that it has begun, and waits for a file."""

    def run(self, worker: Worker) -> Result:
        notes = Path(self.notes)
        (notes / "begun").write_text(str(os.getpid()))
        while not (notes / "go").exists():
            time.sleep(0.02)
        return super().run(worker)


@dataclass(frozen=True, kw_only=True)
class Together(Cell):
    """Adds up the ranks of its processes."""

    processes: int = how(1)

    def run(self, worker: Worker) -> Result:
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=True)
        import torch

        rank = torch.tensor([float(accelerator.process_index)])
        return {"processes": accelerator.num_processes, "ranks": accelerator.gather(rank).tolist()}

    def process_count(self) -> int:
        return self.processes
