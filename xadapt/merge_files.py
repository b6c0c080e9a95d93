"""The files of a merged checkpoint: which are merged, copied or left out, and a folder that appears when it is whole."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal

from xadapt.checkpoint_base import CheckpointBase
from xadapt.merge_shard import Change

# Weights in other formats or precisions: beside merged ones they would be another model's.
OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data")
BOOKKEEPING = (".cache", ".git")
KEY_FILE = ".merge-key"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of a file system that has none, as some network ones


@dataclass(frozen=True)
class FilePlan:
    """What becomes of one file of the base."""

    path: Path  # relative to the folder
    size: int
    action: Literal["merge", "copy", "left out"]
    bytes_changed: int = 0


def plan_files(root: Path, base: CheckpointBase, changes: Sequence[Change]) -> tuple[FilePlan, ...]:
    """Every file under `root`, which is the base's folder or that of the pipeline it belongs to."""
    shards = set(base.checkpoint.shards)
    changed = {name for change in changes for name in change.names}
    index = base.checkpoint.index
    plans = []
    for path in _files(root):
        relative, size = path.relative_to(root), path.stat().st_size
        if path in shards:
            entries = [entry for entry in base.checkpoint.entries.values() if entry.shard == path]
            nbytes = sum(entry.nbytes for entry in entries if entry.name in changed)
            plans.append(FilePlan(relative, size, "merge", nbytes))
        elif path != index and _holds_weights(path) and _is_of(path.parent, base.folder, root):
            plans.append(FilePlan(relative, size, "left out"))
        else:
            plans.append(FilePlan(relative, size, "copy"))
    return tuple(plans)


def _files(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """The files in a folder and below, links followed; without what git and downloads keep for themselves."""
    real = folder.resolve()
    if real in above:
        raise ValueError(
            f"{folder} is a link to a folder that it is in; a checkpoint cannot be copied round in circles."
        )
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            if path.name not in BOOKKEEPING:
                yield from _files(path, (*above, real))
        elif path.is_file():
            yield path
        else:
            raise ValueError(f"{path} is a link to nothing, or no file; is the download complete?")


def _is_of(folder: Path, base: Path, root: Path) -> bool:
    """Whether weights in this folder are another form of the base's, and not a further component with a config."""
    return folder in (base, root) or (base in folder.parents and not (folder / "config.json").exists())


def _holds_weights(path: Path) -> bool:
    return path.suffix in OTHER_WEIGHTS or path.name.endswith(".index.json")


class WorkFolder:
    """A hidden folder beside the result, which becomes the result in one step.

    What a killed merge has left there is taken up by the next one if its key is the same, and thrown away otherwise.
    Every other failure leaves nothing.
    """

    def __init__(self, out: Path, key: str) -> None:
        self.out = out
        self.folder = out.parent / f".{out.name}.merging"
        self._key = key
        self._lock = -1
        self._new_parents = [parent for parent in self.out.parents if not parent.exists()]

    def __enter__(self) -> WorkFolder:
        self._lock = self._locked()
        try:
            self._check_free()
            mark = self.folder / KEY_FILE
            if not mark.is_file() or mark.read_text() != self._key:
                for left in self.folder.iterdir():
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
                mark.write_text(self._key)
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def _locked(self) -> int:
        """The folder, made and locked. Whoever had the lock before may have renamed or removed it just now."""
        while True:
            self.folder.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):
                lock = os.open(self.folder, os.O_RDONLY)
                try:
                    self._take(lock)
                    if os.path.samestat(os.fstat(lock), self.folder.stat()):
                        return lock
                except BaseException:
                    os.close(lock)
                    raise
                os.close(lock)

    def _take(self, lock: int) -> None:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"Another merge is writing {self.out} at this moment; choose another folder.") from error
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            for parent in self._new_parents:  # the innermost first
                with suppress(OSError):
                    parent.rmdir()
        os.close(self._lock)

    @contextmanager
    def unfinished(self, path: Path) -> Iterator[Path | None]:
        """A place to write a file to, which is put under its name afterwards; None if an earlier merge finished it."""
        target = self.folder / path
        if target.exists():
            yield None
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f"{target.name}.part")
        yield part
        os.replace(part, target)

    def copy(self, source: Path, path: Path) -> None:
        """Copies a file's contents: links, as the hub's cache is made of, are followed."""
        with self.unfinished(path) as part:
            if part is not None:
                shutil.copyfile(source, part)

    def finish(self) -> None:
        """The folder becomes the result."""
        self._check_free()
        (self.folder / KEY_FILE).unlink()
        os.replace(self.folder, self.out)

    def _check_free(self) -> None:
        if os.path.lexists(self.out):
            raise ValueError(f"{self.out} has come into being meanwhile; choose another folder.")
