"""What a cell finds around it while it runs, and the one place where cells are run."""

from __future__ import annotations

import gc
import os
import shutil
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from benchmarks.frame.advice import advice_for
from benchmarks.frame.cell import Cell, Result
from benchmarks.frame.claims import Owner
from benchmarks.frame.files import DiskFull, is_disk_full
from benchmarks.frame.store import Store

T = TypeVar("T")


class Worker:
    """One process's surroundings: the store, the bases that stay loaded from cell to cell, the cell's own folder."""

    def __init__(self, store: Store, *, keep: int = 2, quiet: bool = False, nested: bool = False) -> None:
        self.store, self.keep, self.quiet, self.nested = store, keep, quiet, nested
        self.out = Path()  # the running cell's folder for files to keep
        self._bases: OrderedDict[str, Any] = OrderedDict()
        self._shared: dict[str, Any] = {}

    def base(self, key: str, make: Callable[[], T]) -> T:
        """The base of that key, loaded at most once while it is among the `keep` last used. Leave it as you found it."""
        if key in self._bases:
            self._bases.move_to_end(key)
        else:
            while len(self._bases) >= self.keep:
                self._bases.popitem(last=False)
                gc.collect()  # the old one must be gone before the new one comes
            self._bases[key] = make()
        return self._bases[key]

    def shared(self, key: str, make: Callable[[], T]) -> T:
        """Something small that many cells need and that is slow to make: made once, kept for good."""
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

    def forget_bases(self) -> None:
        """After a failure: what is left on the device may be the reason of the next one."""
        self._bases.clear()
        gc.collect()
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def result(self, cell: Cell) -> Result:
        """What a needed cell found."""
        found = self.store.result(cell)
        if found is None:
            raise ValueError(f"{cell.name} is not finished; name it in needs() of the cell that reads it.")
        return found

    def artifacts(self, cell: Cell) -> Path:
        """The files of a needed cell."""
        return self.store.artifacts(cell)

    @property
    def is_main(self) -> bool:
        """Whether this process writes, of those that run the cell together."""
        return os.environ.get("RANK", "0") == "0"


@dataclass(frozen=True)
class Outcome:
    """What became of a cell in this run."""

    name: str
    state: Literal["kept", "done", "failed", "blocked", "busy"]
    seconds: float = 0.0
    message: str = ""


def execute(cell: Cell, worker: Worker) -> Outcome:
    """Run a cell unless it is finished, and store what it finds or why it failed.

    Raises:
        DiskFull: and nothing of this cell is left behind.
        KeyboardInterrupt: likewise.
    """
    store = worker.store
    if store.is_finished(cell):
        return Outcome(cell.name, "kept")
    missing = [needed.name for needed in cell.needs() if not store.is_finished(needed)]
    if missing:
        return Outcome(cell.name, "blocked", message=f"needs {', '.join(missing)}, which failed")
    held = store.claim(cell)
    if isinstance(held, Owner):
        return Outcome(cell.name, "busy", message=f"{held} is at it")
    with held:
        if store.is_finished(cell):  # between the look and the claim
            return Outcome(cell.name, "kept")
        started = time.perf_counter()
        worker.out = scratch = _room(store, cell)
        try:
            result = _run(cell, worker)
            seconds = time.perf_counter() - started
            if not held.still_mine():
                return Outcome(cell.name, "busy", message="another worker took this one for dead and does it again")
            store.keep_scratch(cell, scratch)
            store.put(cell, result, seconds)
        except DiskFull:
            raise
        except Exception as error:
            if is_disk_full(error):
                raise DiskFull(store.folder) from error
            advice = advice_for(error)
            store.put_failure(cell, error, advice)
            worker.forget_bases()
            first_line = str(error).strip().splitlines()[:1]
            message = ": ".join([type(error).__name__, *first_line, *filter(None, [advice])])
            return Outcome(cell.name, "failed", time.perf_counter() - started, message)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        return Outcome(cell.name, "done", seconds)


def _run(cell: Cell, worker: Worker) -> Result:
    if cell.process_count() == 1 or worker.nested:
        return cell.run(worker)
    from benchmarks.frame.launch import run_together

    return run_together(cell, worker)


def _room(store: Store, cell: Cell) -> Path:
    try:
        return store.fresh_scratch(cell)
    except OSError as error:
        if is_disk_full(error):
            raise DiskFull(store.folder) from error
        raise
