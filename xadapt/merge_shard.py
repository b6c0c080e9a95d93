"""Write one shard of a merged checkpoint: its bytes as they are, but for the tensors that change."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from xadapt.checkpoint import Checkpoint, Entry
from xadapt.finite import is_finite
from xadapt.matrix import Dense, LowRank, Matrix, sum_rows
from xadapt.workers import each

PIECE = 64 * 2**20  # bytes copied by one worker at a time
BUFFER = 2**20  # bytes that one worker holds where the kernel does not copy by itself
_UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EXDEV)
_ONE_AT_A_TIME = Lock()

Summand = Matrix | Tensor
"""A Matrix is added to a tensor of the checkpoint, as `tensor.flatten(1)`; a Tensor takes its place."""


@dataclass(frozen=True)
class Change:
    """What one layer's adapters do to the tensors of a checkpoint."""

    names: tuple[str, ...]
    summands: Callable[[], Mapping[str, Summand]]
    """By those names; ones that stay as they are may be absent."""
    is_large: bool = False
    """Whether PEFT makes the summands, with many copies of the tensor."""


def write_shard(checkpoint: Checkpoint, source: Path, part: Path, changes: Sequence[Change], progress: bool) -> None:
    """Writes `part`, of the size and the header of the shard `source`. Room for all of it is asked for at once.

    Raises:
        ValueError: a sum is not finite, or too large for the tensor's dtype.
        OSError: there is no room.
    """
    offsets = _offsets(checkpoint, source)
    changed = [change for change in changes if any(name in offsets for name in change.names)]
    names = {name for change in changed for name in change.names}
    with source.open("rb") as old, part.open("wb") as new:
        size = os.fstat(old.fileno()).st_size
        _reserve(new.fileno(), size)
        jobs: list[Callable[[], None]] = [
            partial(_copy, old.fileno(), new.fileno(), start, end)
            for start, end in _pieces(_unchanged(offsets, names, size))
        ]
        jobs += [partial(_write_change, checkpoint, change, new.fileno(), offsets) for change in changed]
        for _ in each(_run, jobs, f"merging {source.name}", progress):
            pass
        os.fsync(new.fileno())


def in_turn(is_large: bool) -> AbstractContextManager[Any]:
    """Layers that PEFT merges by itself take turns, over all threads: its copies of one large tensor are enough."""
    return _ONE_AT_A_TIME if is_large else nullcontext()


def _run(job: Callable[[], None]) -> None:
    job()


def _offsets(checkpoint: Checkpoint, source: Path) -> dict[str, tuple[int, Entry]]:
    """Where each tensor of a shard begins in its file. Data fill the file from the end of the header to its own."""
    entries = [entry for entry in checkpoint.entries.values() if entry.shard == source]
    position = source.stat().st_size - sum(entry.nbytes for entry in entries)
    offsets = {}
    for entry in entries:
        offsets[entry.name] = (position, entry)
        position += entry.nbytes
    return offsets


def _unchanged(offsets: Mapping[str, tuple[int, Entry]], names: set[str], size: int) -> list[tuple[int, int]]:
    """The stretches of the file between the tensors that change; the header is one of them."""
    stretches, reached = [], 0
    for name, (start, entry) in offsets.items():
        if name in names:
            stretches.append((reached, start))
            reached = start + entry.nbytes
    stretches.append((reached, size))
    return [(start, end) for start, end in stretches if end > start]


def _pieces(stretches: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    return [(begin, min(begin + PIECE, end)) for start, end in stretches for begin in range(start, end, PIECE)]


def _reserve(file: int, size: int) -> None:
    """Asks for the room, where the system (macOS has no such call) and the file system can promise it."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file, 0, size)
            return
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
    os.ftruncate(file, size)


def _copy(old: int, new: int, start: int, end: int) -> None:
    while start < end:
        copied = _copy_some(old, new, start, end)
        if copied == 0:
            raise ValueError("A file of the base became shorter while it was read; nothing was written.")
        start += copied


def _copy_some(old: int, new: int, start: int, end: int) -> int:
    """Copies some of the bytes and says how many: within the kernel where it can, which is not between any two disks."""
    if hasattr(os, "copy_file_range"):
        try:
            return os.copy_file_range(old, new, end - start, start, start)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
    data = os.pread(old, min(BUFFER, end - start), start)
    return os.pwrite(new, data, start)


def _write_change(checkpoint: Checkpoint, change: Change, new: int, offsets: Mapping[str, tuple[int, Entry]]) -> None:
    with in_turn(change.is_large):
        summands = change.summands()
    for name in change.names:
        if name not in offsets:
            continue
        position, entry = offsets[name]
        summand = summands.get(name)
        if isinstance(summand, (Dense, LowRank)):
            _write_sum(checkpoint[name], summand, new, position, name)
        else:
            tensor = checkpoint[name] if summand is None else _rounded(summand, entry.dtype, name)
            _write(new, tensor.contiguous(), position)


def _write_sum(tensor: Tensor, matrix: Matrix, new: int, position: int, name: str) -> None:
    rows = tensor.flatten(1) if tensor.ndim > 1 else tensor[:, None]
    for strip in sum_rows(rows, matrix):
        rounded = _rounded(strip, tensor.dtype, name)
        _write(new, rounded, position)
        position += rounded.nbytes


def _rounded(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    rounded = tensor.to(dtype)
    if not is_finite(rounded):
        raise ValueError(
            f"{name} with the adapter in it holds NaN or infinity in {dtype}: the base or the adapter does, or a number is "
            "too large for this dtype. Nothing was written."
        )
    return rounded


def _write(file: int, tensor: Tensor, position: int) -> None:
    data = bytes_of(tensor)
    while data:
        written = os.pwrite(file, data, position)
        data, position = data[written:], position + written


def bytes_of(tensor: Tensor) -> memoryview:
    """A contiguous tensor's memory, as it lies in a safetensors file."""
    array: Any = tensor.detach().cpu().flatten().view(torch.uint8).numpy()
    return memoryview(array)
