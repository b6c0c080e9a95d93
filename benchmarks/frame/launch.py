"""One cell in several processes that work together (accelerate finds them by torchrun's environment)."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.frame.cell import Cell, Result, plain
from benchmarks.frame.files import write_json
from benchmarks.frame.settings import from_plain
from benchmarks.frame.store import Store
from benchmarks.provenance import ROOT

if TYPE_CHECKING:
    from benchmarks.frame.worker import Worker

LINES = 40
"""How much of a failed process's output goes into the error."""


def run_together(cell: Cell, worker: Worker) -> Result:
    """Run `cell` in `cell.process_count()` new processes; what the first of them returns."""
    task, answer = worker.out / ".task.json", worker.out / ".answer.json"
    kind = type(cell)
    task.write_text(
        json.dumps(
            {
                "cell": f"{kind.__module__}:{kind.__qualname__}",
                "settings": plain(cell, identity_only=False),
                "store": str(worker.store.folder),
                "out": str(worker.out),
                "quiet": worker.quiet,
            }
        ),
        encoding="utf-8",
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command = [*torchrun, str(cell.process_count()), "-m", "benchmarks.frame.launch", str(task)]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    }
    _watched(command, environment)
    result: Result = json.loads(answer.read_text(encoding="utf-8"))
    task.unlink()
    answer.unlink()
    return result


def _watched(command: list[str], environment: dict[str, str]) -> None:
    last: deque[str] = deque(maxlen=LINES)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment) as run:
        assert run.stdout is not None
        try:
            for line in run.stdout:
                last.append(line)
        except BaseException:  # Ctrl-C above all: the others must not go on alone
            run.terminate()
            raise
    if run.returncode:
        raise RuntimeError(
            f"one of the processes failed with status {run.returncode}. Its last lines:\n{''.join(last)}"
        )


def _import(name: str) -> Any:
    module, _, qualified = name.partition(":")
    found: Any = importlib.import_module(module)
    for part in qualified.split("."):
        found = getattr(found, part)
    return found


def main(path: Path) -> None:
    """What each of the processes does."""
    from benchmarks.frame.worker import Worker

    task = json.loads(path.read_text(encoding="utf-8"))
    cell: Cell = from_plain(_import(task["cell"]), task["settings"])
    worker = Worker(Store(Path(task["store"])), quiet=task["quiet"], nested=True)
    worker.out = Path(task["out"])
    result = cell.run(worker)
    if worker.is_main:
        write_json(path.with_name(".answer.json"), result)
    _part()


def _part() -> None:
    """Leaves the group of processes together: one that goes first would take the connection from under the others."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
