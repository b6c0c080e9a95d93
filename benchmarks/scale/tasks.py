"""The tasks that are compared: each prepares, untimed, and returns what is timed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.export.tasks import read_needed
from xadapt import registry
from xadapt.base import open_base
from xadapt.journal import Journal, keeping
from xadapt.reading import read_adapter
from xadapt.siblings import Pair

READS_BOTH = ("lora_x", "prolora")  # the others read the source alone
METHODS: dict[str, dict[str, Any]] = {
    "copy": {},
    "pinv_input": {"precision": "float32"},
    "pinv_output": {"precision": "float32"},
    "lora_x": {"rank": 64},
    "prolora": {"rank": 64},
}
Task = Callable[[], None]


def plain_read(base: Path, adapter: Path) -> Task:
    """A sequential read of the adapted weights, once."""
    read = read_needed(base, adapter)
    return lambda: read(base)


def transfer(method: str, base: Path, adapter: Path, journal: Path | None = None) -> Task:
    """A transfer from the base to itself, which costs what one between siblings does; with a journal, finished layers are kept."""
    step: Any = registry.get(method).build(**METHODS[method])
    read, pair = read_adapter(adapter), Pair(open_base(base), open_base(base))

    def run() -> None:
        if journal is None:
            step.transfer(read, pair)
        else:
            with keeping(Journal(journal, method)):
                step.transfer(read, pair)

    return run
