"""One task in a process of its own: python -m benchmarks.export.child TASK WARM_BASE WARM_ADAPTER BASE ADAPTER OUT

Prints one line of JSON: seconds, and the peak of anonymous memory above what the process held before. Everything is
imported by running the task on a small checkpoint first. File pages, which the kernel may drop, do not count.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path

from benchmarks.export.tasks import COLD, TASKS, evict


class PeakMemory:
    """Samples RssAnon every few milliseconds."""

    def __init__(self) -> None:
        self.before = self.peak = _anonymous()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.peak = max(self.peak, _anonymous())

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            self.peak = max(self.peak, _anonymous())


def _anonymous() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon; this benchmark needs Linux.")


def main() -> None:
    name, *paths = sys.argv[1:]
    name, is_cold = name.removesuffix(COLD), name.endswith(COLD)
    warm_base, warm_adapter, base, adapter, out = map(Path, paths)
    TASKS[name](warm_base, warm_adapter)(out.with_name(f"{out.name}-warm"))
    run = TASKS[name](base, adapter)
    if is_cold:
        evict(base)
    with PeakMemory() as memory:
        start = time.perf_counter()
        run(out)
        seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "bytes": memory.peak - memory.before}))


if __name__ == "__main__":
    main()
