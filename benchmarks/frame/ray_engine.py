"""Cells under Ray: many GPUs, many machines. `pip install 'xadapt[sweep]'`, and RAY_ADDRESS for a cluster that is up already.

All machines see the store at the same path, and this checkout too.
"""

from __future__ import annotations

import os
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.frame.cell import Cell
from benchmarks.frame.engines import dead
from benchmarks.frame.files import DiskFull, write_whole
from benchmarks.frame.store import Store
from benchmarks.frame.worker import Outcome, Worker, execute
from benchmarks.provenance import ROOT


class Ray:
    """One actor per worker; Ray finds the machine and sets CUDA_VISIBLE_DEVICES. An actor keeps its bases loaded."""

    def __init__(self, store: Store, keep: int, workers: int, gpus: float = 0.0, cpus: float = 1.0) -> None:
        """`gpus`, `cpus`: what one worker asks of Ray; fractions share a device."""
        try:
            import ray
        except ModuleNotFoundError:
            raise ValueError("the engine ray needs Ray: pip install 'xadapt[sweep]', or take --engine local.") from None
        self.ray, self.store, self.keep = ray, store, keep
        if not ray.is_initialized():
            address = os.environ.get("RAY_ADDRESS") or None
            environment = {"env_vars": {"PYTHONPATH": str(ROOT)}}
            own: dict[str, Any] = (
                {} if address else {"num_cpus": max(1, round(workers * cpus)), "include_dashboard": False}
            )
            ray.init(address=address, runtime_env=environment, log_to_driver=False, **own)
        self._actor = ray.remote(num_gpus=gpus, num_cpus=cpus)(_Actor)
        self._actors: list[Any] = [None] * workers

    def run(self, cells: Sequence[Cell]) -> Iterator[Outcome]:
        ray = self.ray
        waiting, tries = deque(cells), dict[str, int]()
        running: dict[Any, tuple[int, Cell]] = {}
        free = deque(range(len(self._actors)))
        probe = self.store.folder / "logs" / f".probe-{uuid.uuid4().hex}"
        write_whole(probe, "")
        try:
            while waiting or running:
                while waiting and free:
                    index, cell = free.popleft(), waiting.popleft()
                    if self._actors[index] is None:
                        self._actors[index] = self._actor.remote(str(self.store.folder), self.keep, str(probe))
                    running[self._actors[index].run.remote(cell)] = (index, cell)
                (done,), _ = ray.wait(list(running), num_returns=1)
                index, cell = running.pop(done)
                free.append(index)
                try:
                    answer: Outcome | str = ray.get(done)
                except ray.exceptions.RayActorError as error:
                    self._actors[index] = None
                    tries[cell.name] = tries.get(cell.name, 0) + 1
                    if "StoreNotShared" in str(error):
                        raise ValueError(
                            f"a Ray worker does not see {self.store.folder}. Give an --out on a disk that all machines share."
                        ) from None
                    if tries[cell.name] < 2:
                        waiting.appendleft(cell)
                        continue
                    answer = dead(self.store, cell, str(error).strip().splitlines()[0])
                if isinstance(answer, str):
                    raise DiskFull(self.store.folder)
                yield answer
        finally:
            probe.unlink(missing_ok=True)

    def close(self) -> None:
        for actor in self._actors:
            if actor is not None:
                self.ray.kill(actor)
        self._actors = [None] * len(self._actors)


class StoreNotShared(Exception):
    """A machine on which the store's folder is another one, or none."""


class _Actor:
    def __init__(self, folder: str, keep: int, probe: str) -> None:
        if not Path(probe).exists():
            raise StoreNotShared(folder)
        self.worker = Worker(Store(Path(folder)), keep=keep, quiet=True)

    def run(self, cell: Cell) -> Outcome | str:
        try:
            return execute(cell, self.worker)
        except DiskFull as error:
            return str(error)
