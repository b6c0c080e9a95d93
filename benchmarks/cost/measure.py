"""Time and peak memory of steps that take turns, so that a busy machine slows all of them alike."""

from __future__ import annotations

import gc
import random
import statistics
import time
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .stacks import TrainingStep


def time_in_turns(
    steps: Mapping[str, TrainingStep], seconds: float, device: str, seed: int = 0
) -> dict[str, list[float]]:
    """Seconds of each step, one row per round; the order inside a round is shuffled. At least 10 rounds."""
    # On a CPU, the process's own time: what else the machine does is left out.
    clock = time.process_time if device == "cpu" else time.perf_counter
    order = list(steps)
    shuffle = random.Random(seed).shuffle
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():  # warm-up: allocator, thread pools, compilation
        step()
        step()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[order[0]]) < 10:
        shuffle(order)
        for name in order:
            _wait(device)
            start = clock()
            steps[name]()
            _wait(device)
            times[name].append(clock() - start)
    return times


def _wait(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


def ratio(times: dict[str, list[float]], variant: str, to: str) -> tuple[float, float, float]:
    """Median over rounds of time(variant) / time(to), and the quartiles of that ratio."""
    ratios = [a / b for a, b in zip(times[variant], times[to], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return middle, low, high


def peak_memory(step: TrainingStep, device: str) -> int:
    """Bytes that training holds at most beside the model: activations, gradients and the optimiser's state."""
    step.forget()
    gc.collect()
    if device != "cpu":
        torch.accelerator.synchronize()
        torch.accelerator.reset_peak_memory_stats()
        before: int = torch.accelerator.memory_allocated()
        _two(step)
        peak: int = torch.accelerator.max_memory_allocated()
        return peak - before
    with _LiveStorages() as live:
        _two(step)
    return live.peak


def _two(step: TrainingStep) -> None:
    """The first step makes the optimiser's state, the second has it from the beginning."""
    step()
    step()


class _LiveStorages(TorchDispatchMode):
    """Counts the bytes of all storages made inside that are alive: the CPU allocator keeps no such count."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {s for t in tree_leaves((args, kwargs or {})) if isinstance(t, torch.Tensor) and (s := _storage(t))}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage(), given)
        return out

    def _add(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key, size = storage.data_ptr(), storage.nbytes()
        if key in given or key in self._seen or size == 0:
            return
        self.now += size
        self.peak = max(self.peak, self.now)
        self._seen[key] = weakref.ref(storage, lambda _: self._remove(key, size))

    def _remove(self, key: int, size: int) -> None:
        if self._seen.pop(key, None) is not None:
            self.now -= size


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
