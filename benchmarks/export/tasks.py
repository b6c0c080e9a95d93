"""The tasks that are compared. Each is prepared, untimed, for a base and an adapter, and then writes to a place."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import xadapt
from xadapt.base import CheckpointBase, open_base
from xadapt.export import export_lora
from xadapt.folding import layers_of
from xadapt.merging import merge
from xadapt.reading import read_adapter

BUFFER = 16 * 2**20


Task = Callable[[Path], None]


def read_needed(base: Path, adapter: Path) -> Task:
    """A plain sequential read of the weights that the adapter touches, and of nothing else."""
    stretches, view = needed(base, adapter), memoryview(bytearray(BUFFER))

    def run(out: Path) -> None:
        for shard, places in stretches.items():
            with open(shard, "rb", buffering=0) as file:
                for start, end in places:
                    file.seek(start)
                    while start < end:
                        start += file.readinto(view[: min(BUFFER, end - start)]) or 0

    return run


def copy(base: Path, adapter: Path) -> Task:
    """A plain copy of the checkpoint's tensors through a buffer, on the disk at the end."""

    def run(out: Path) -> None:
        out.mkdir(parents=True)
        for shard in sorted(base.glob("*.safetensors")):
            with open(shard, "rb", buffering=0) as old, open(out / shard.name, "wb", buffering=0) as new:
                shutil.copyfileobj(old, new, BUFFER)
                os.fsync(new.fileno())

    return run


def xadapt_export(base: Path, adapter: Path) -> Task:
    return lambda out: _void(export_lora(adapter, base, out))


def xadapt_merge(base: Path, adapter: Path) -> Task:
    return lambda out: _void(merge(adapter, base, out))


def peft_save_as_lora(base: Path, adapter: Path) -> Task:
    """Load the model, attach the adapter, and let PEFT find the LoRA by singular value decomposition."""
    from peft import save_as_lora

    def run(out: Path) -> None:
        model = xadapt.load(_load(base), adapter, torch_device="cpu")
        rank: Any = model.peft_config["default"]
        save_as_lora(str(out), model, rank=rank.r)

    return run


def peft_merge(base: Path, adapter: Path) -> Task:
    """Load the model, attach the adapter, merge_and_unload, save_pretrained."""

    def run(out: Path) -> None:
        model: Any = xadapt.load(_load(base), adapter, torch_device="cpu")
        model.merge_and_unload().save_pretrained(out)

    return run


TASKS: dict[str, Callable[[Path, Path], Task]] = {
    "plain read": read_needed,
    "plain copy": copy,
    "xadapt export": xadapt_export,
    "xadapt merge": xadapt_merge,
    "PEFT save_as_lora": peft_save_as_lora,
    "PEFT merge": peft_merge,
}


COLD = ", cold"  # after a task's name: with the base's files out of the page cache


def evict(base: Path) -> None:
    """Asks the kernel to drop a checkpoint's files from memory, so that they come from the disk."""
    for shard in base.glob("*.safetensors"):
        file = os.open(shard, os.O_RDONLY)
        try:
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)


def _void(result: object) -> None:
    """Drops a result."""


def _load(base: Path) -> torch.nn.Module:
    opened = open_base(base)
    return opened.module(dtype=torch.bfloat16)


def needed(base: Path, adapter: Path) -> dict[Path, list[tuple[int, int]]]:
    """The bytes of the adapted weights, by file, in file order."""
    opened = open_base(base)
    assert isinstance(opened, CheckpointBase)
    layers = layers_of([read_adapter(adapter)], opened)
    names = {opened.stored_name(layer.weight_name) for layer in layers}
    needed: dict[Path, list[tuple[int, int]]] = {}
    for shard in opened.checkpoint.shards:
        entries = [entry for entry in opened.checkpoint.entries.values() if entry.shard == shard]
        position = shard.stat().st_size - sum(entry.nbytes for entry in entries)
        for entry in entries:
            if entry.name in names:
                needed.setdefault(shard, []).append((position, position + entry.nbytes))
            position += entry.nbytes
    return needed
