"""Files that are there whole or not at all."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any


class DiskFull(Exception):
    """No room left: going on would only fail again, so the whole run stops."""

    def __init__(self, where: Path) -> None:
        super().__init__(
            f"the disk that holds {where} is full. Finished cells are kept and nothing half-written is left; free some "
            "space and give the same command again, or another --out."
        )


FULL = (errno.ENOSPC, errno.EDQUOT)


def is_disk_full(error: BaseException | None) -> bool:
    """Whether `error`, or what it was raised from, says that there is no room."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return True
        if any(os.strerror(number) in str(error) for number in FULL):  # safetensors and other writers have no errno
            return True
        error = error.__cause__ or error.__context__
    return False


def write_whole(path: Path, text: str) -> None:
    """Write through a temporary neighbour and `os.replace`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # a crash after the rename must not leave an empty result
        os.replace(temporary, path)
    except OSError as error:
        if is_disk_full(error):
            raise DiskFull(path.parent) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    write_whole(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """What the file holds; a ValueError names the file if that is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}). Delete it, and its cell runs again.") from None
