"""One task in a process of its own: python -m benchmarks.scale.child TASK WARM_BASE WARM_ADAPTER BASE ADAPTER [JOURNAL]

Prints one line of JSON: seconds, and the peak of anonymous memory above what the process held before, with everything imported by
running the task on a small checkpoint first.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from benchmarks.export.child import PeakMemory
from benchmarks.scale.tasks import Task, plain_read, transfer


def main() -> None:
    name, *paths = sys.argv[1:]
    warm_base, warm_adapter, base, adapter = map(Path, paths[:4])
    journal = Path(paths[4]) if len(paths) > 4 else None
    _task(name, warm_base, warm_adapter, None)()
    run = _task(name, base, adapter, journal)
    with PeakMemory() as memory:
        start = time.perf_counter()
        run()
        seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "bytes": memory.peak - memory.before}))


def _task(name: str, base: Path, adapter: Path, journal: Path | None) -> Task:
    return plain_read(base, adapter) if name == "plain read" else transfer(name, base, adapter, journal)


if __name__ == "__main__":
    main()
