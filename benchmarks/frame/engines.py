"""Where cells run: in this process, in several local ones, or under Ray. All of them yield outcomes as they come."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

from benchmarks.frame.cell import Cell
from benchmarks.frame.files import DiskFull
from benchmarks.frame.store import Store
from benchmarks.frame.worker import Outcome, Worker, execute


class Engine(Protocol):
    """Runs cells that do not wait for each other."""

    def run(self, cells: Sequence[Cell]) -> Iterator[Outcome]:
        """One outcome per cell, in any order."""

    def close(self) -> None:
        """Let the workers go, and with them what they keep loaded."""


class InProcess:
    """One cell after another, here. Errors in a debugger's reach, and progress bars of the cells on the terminal."""

    def __init__(self, store: Store, keep: int) -> None:
        self.worker = Worker(store, keep=keep)

    def run(self, cells: Sequence[Cell]) -> Iterator[Outcome]:
        for cell in cells:
            yield execute(cell, self.worker)

    def close(self) -> None:
        self.worker.forget_bases()


class LocalProcesses:
    """Several worker processes on this machine. One that dies takes only its cell along, which is tried once more."""

    def __init__(self, store: Store, keep: int, workers: int, devices: Sequence[str] = ()) -> None:
        """`devices`: one CUDA_VISIBLE_DEVICES per worker, taken in turn; none leaves the environment as it is."""
        self.store, self.keep = store, keep
        self._context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self._hands = [
            _Hand(index, devices[index % len(devices)] if devices else None, folder=store.folder, keep=keep)
            for index in range(workers)
        ]

    def run(self, cells: Sequence[Cell]) -> Iterator[Outcome]:
        waiting = deque(cells)
        tries: dict[str, int] = {}
        while waiting or any(hand.cell for hand in self._hands):
            for hand in self._hands:
                if not hand.cell and waiting:
                    hand.give(_next_for(hand, waiting), self._context)
            for hand in _ready(self._hands):
                answer = hand.take()
                cell, hand.cell = hand.cell, None
                assert cell is not None
                if isinstance(answer, Outcome):
                    yield answer
                elif isinstance(answer, DiskFull):
                    raise DiskFull(self.store.folder)
                else:
                    tries[cell.name] = tries.get(cell.name, 0) + 1
                    if tries[cell.name] < 2:
                        waiting.appendleft(cell)  # its claim is cold: the owner is dead
                    else:
                        yield dead(self.store, cell, answer)

    def close(self) -> None:
        for hand in self._hands:
            hand.stop()


def dead(store: Store, cell: Cell, why: str) -> Outcome:
    """The outcome of a cell that killed two workers, or was unlucky twice."""
    error = RuntimeError(
        f"the worker died twice on this cell ({why}). If the system killed it, memory is short: see the advice."
    )
    from benchmarks.frame.advice import MEMORY

    store.put_failure(cell, error, MEMORY)
    return Outcome(cell.name, "failed", message=str(error))


def _next_for(hand: _Hand, waiting: deque[Cell]) -> Cell:
    """Rather a cell of the base that this worker has loaded."""
    for index, cell in enumerate(waiting):
        if cell.base() == hand.last_base:
            del waiting[index]
            return cell
    return waiting.popleft()


def _ready(hands: Sequence[_Hand]) -> list[_Hand]:
    """Those that have an answer or are dead; waits for the first."""
    busy = [hand for hand in hands if hand.cell]
    ends: dict[Any, _Hand] = {}
    for hand in busy:
        ends[hand.ends()[0]], ends[hand.ends()[1].sentinel] = hand, hand
    return list(dict.fromkeys(ends[end] for end in wait(list(ends))))


@dataclass(eq=False)
class _Hand:
    """A worker process as its employer sees it."""

    index: int
    device: str | None
    folder: Path
    keep: int
    cell: Cell | None = None
    last_base: str = ""
    pipe: Connection | None = field(default=None, repr=False)
    process: multiprocessing.context.SpawnProcess | None = field(default=None, repr=False)

    def give(self, cell: Cell, context: multiprocessing.context.SpawnContext) -> None:
        if self.process is None or not self.process.is_alive():
            self.pipe, theirs = context.Pipe()
            log = self.folder / "logs" / f"worker-{self.index}.log"
            self.process = context.Process(target=_work, args=(theirs, self.folder, self.keep, self.device, log))
            self.process.start()
            theirs.close()
        assert self.pipe is not None
        self.cell, self.last_base = cell, cell.base()
        self.pipe.send(cell)

    def take(self) -> Outcome | DiskFull | str:
        """The answer, or in words how the process ended."""
        pipe, process = self.ends()
        try:
            if pipe.poll():
                return pipe.recv()
        except EOFError:  # it died, perhaps in the middle of an answer
            pass
        process.join()
        self.last_base = ""
        return f"exit status {process.exitcode}"

    def ends(self) -> tuple[Connection, multiprocessing.context.SpawnProcess]:
        assert self.pipe is not None
        assert self.process is not None
        return self.pipe, self.process

    def stop(self) -> None:
        if self.process is None or self.pipe is None:
            return
        self.pipe.close()  # ends the loop of an idle worker
        if self.cell:
            self.process.terminate()
        self.process.join()


def _work(pipe: Connection, folder: Path, keep: int, device: str | None, log: Path) -> None:
    """What a worker process does until its pipe is closed. Its prints go to a log, not between the bars."""
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        worker = Worker(Store(folder), keep=keep, quiet=True)
        while True:
            try:
                cell = pipe.recv()
            except (EOFError, KeyboardInterrupt):
                return
            try:
                pipe.send(execute(cell, worker))
            except DiskFull as error:
                pipe.send(error)
            except (KeyboardInterrupt, BrokenPipeError):
                return
