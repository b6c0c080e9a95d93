"""Files and folders with the access that a user's own would have: tempfile's and safetensors' are for their owner alone."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def save_tensors(
    tensors: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None
) -> None:
    """A .safetensors file that those may read who may read any new file there.

    Args:
        tensors: contiguous, no two of one storage.
    """
    from safetensors.torch import save_file

    save_file(dict(tensors), path, None if metadata is None else dict(metadata))
    usual_access(Path(path))


def usual_access(path: Path) -> None:
    """Gives a file the access that a new one beside it gets. Asked of the file system, as os.umask can only be read by setting it,
    for all threads."""
    probe = beside(path)
    probe.touch()
    try:
        path.chmod(stat.S_IMODE(probe.stat().st_mode))
    finally:
        os.remove(probe)


def check_place(path: Path) -> None:
    """ValueError where nothing can lie, as what should be a folder above it is a file. Nothing is made."""
    above = next((parent for parent in path.absolute().parents if os.path.lexists(parent)), None)
    if above is not None and not above.is_dir():
        raise ValueError(f"{above} is a file, so {path} cannot lie in it; choose another place.")


def beside(path: Path) -> Path:
    """A name that nothing has, in the same folder, for unfinished work: there os.replace is one step."""
    return path.parent / f".{path.name}.{secrets.token_hex(4)}.part"
