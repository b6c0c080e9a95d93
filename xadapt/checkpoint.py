"""The tensors of a checkpoint on disk, by the names they have there: headers are read at once, data one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from types import MappingProxyType

from torch import Tensor

from xadapt.checkpoint_files import CheckpointFiles, find_files
from xadapt.errors import some
from xadapt.safetensors_header import Entry
from xadapt.shards import PickleShard, SafetensorsShard, Shard

__all__ = ["Checkpoint", "Entry"]


class Checkpoint(Mapping[str, Tensor]):
    """A folder of safetensors files, or one such file.

        checkpoint = Checkpoint.open("llama/")
        checkpoint["model.norm.weight"]           # mapped from disk, not copied
        checkpoint.entries["model.norm.weight"]   # its dtype, shape, shard

    Tensors are views of the files: clone one before changing it. Look-ups are safe from several threads.
    """

    def __init__(self, shards: Sequence[Shard], files: CheckpointFiles) -> None:
        """Use `Checkpoint.open`."""
        self._shards = {shard.path: shard for shard in shards}
        self.entries: Mapping[str, Entry] = MappingProxyType(_joined(shards))
        self.index = files.index
        if files.weight_map is not None and files.index is not None:
            _check_index(files.index, files.weight_map, self.entries)

    @classmethod
    def open(cls, path: str | PathLike[str], *, variant: str | None = None, allow_pickle: bool = False) -> Checkpoint:
        """Reads and checks the headers.

        Args:
            path: a folder with model.safetensors or diffusion_pytorch_model.safetensors, in one file or in shards with
                an index; or any one .safetensors file.
            variant: "fp16" reads model.fp16.safetensors; without it, the file without variant is read.
            allow_pickle: also read .bin files, if there is no safetensors file. Only tensors are unpickled.

        Raises:
            ValueError: there is no checkpoint, or a file of it is damaged or contradicts another.
        """
        files = find_files(Path(path), variant=variant, allow_pickle=allow_pickle)
        kind = PickleShard if files.pickled else SafetensorsShard
        return cls([kind(shard) for shard in files.shards], files)

    @property
    def shards(self) -> list[Path]:
        """The files, in the order of their names."""
        return list(self._shards)

    def metadata(self, shard: Path) -> Mapping[str, str]:
        """The `__metadata__` in a shard's header."""
        return self._shards[shard].metadata

    def __getitem__(self, name: str) -> Tensor:
        return self._shards[self.entries[name].shard].tensor(name)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def _joined(shards: Sequence[Shard]) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    for shard in shards:
        for entry in shard.entries:
            if entry.name in entries:
                raise ValueError(
                    f"{entry.name!r} is in {entries[entry.name].shard} and in {shard.path}; "
                    "these shards are not of one checkpoint. Download or save it again."
                )
            entries[entry.name] = entry
    return entries


def _check_index(index: Path, weight_map: Mapping[str, Path], entries: Mapping[str, Entry]) -> None:
    lacking = [
        f"{name} in {shard.name}"
        for name, shard in weight_map.items()
        if name not in entries or entries[name].shard != shard
    ]
    if lacking:
        raise ValueError(f"{index} names tensors that their shards lack: {some(lacking)}. Download or save it again.")
    unnamed = [f"{name} in {entry.shard.name}" for name, entry in entries.items() if name not in weight_map]
    if unnamed:
        raise ValueError(
            f"The shards beside {index} hold tensors that it does not name: {some(unnamed)}. Download or save it again."
        )
