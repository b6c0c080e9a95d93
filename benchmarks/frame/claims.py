"""Which worker has which cell: a file that only one can create, kept warm by its owner."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BEAT = 15.0
"""Seconds between two signs of life."""
COLD = 20 * BEAT
"""An owner on another machine that has been silent for so long is taken for dead."""


@dataclass(frozen=True)
class Owner:
    """Who holds a claim."""

    token: str
    host: str
    pid: int
    started: str | None  # the process's start time: a new process may have an old one's pid

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def claim(path: Path) -> Claim | Owner:
    """The claim, if it was free or its owner is dead; otherwise who has it."""
    mine = Owner(uuid.uuid4().hex, socket.gethostname(), os.getpid(), _started(os.getpid()))
    path.parent.mkdir(parents=True, exist_ok=True)
    while not _create(path, mine):
        owner = _read(path)
        if owner is None:  # released meanwhile
            continue
        if _alive(owner, path):
            return owner
        _remove(path, owner)
    return Claim(path, mine)


class Claim:
    """A cell held by this process, until `release`; as a context manager, until its end."""

    def __init__(self, path: Path, owner: Owner) -> None:
        self.path, self.owner = path, owner
        self._over = threading.Event()
        self._heart = threading.Thread(target=self._beat, daemon=True, name=f"claim of {path.stem}")
        self._heart.start()

    def still_mine(self) -> bool:
        """False if another worker took this one for dead, as after a laptop's sleep. Its result is then the one to keep."""
        found = _read(self.path)
        return found is not None and found.token == self.owner.token

    def release(self) -> None:
        self._over.set()
        self._heart.join()
        if self.still_mine():
            self.path.unlink(missing_ok=True)

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _beat(self) -> None:
        while not self._over.wait(BEAT):
            if not self.still_mine():
                return
            try:
                os.utime(self.path)
            except OSError:  # gone, or a disk that comes back; `still_mine` tells before anything is written
                continue


def _create(path: Path, owner: Owner) -> bool:
    """A file with its content in one step (an empty one would look like a dead owner's); False if there is one."""
    temporary = path.with_name(f".{path.name}.{owner.token}.tmp")
    try:
        temporary.write_text(json.dumps(vars(owner)), encoding="utf-8")
        os.link(temporary, path)  # fails if `path` exists, on network disks as well
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    return True


def _read(path: Path) -> Owner | None:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return Owner(**found)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        raise ValueError(f"{path} is no claim. If no run is under way, delete it.") from None


def _alive(owner: Owner, path: Path) -> bool:
    if owner.host == socket.gethostname():
        return owner.started == _started(owner.pid) if owner.started else _exists(owner.pid)
    try:
        return time.time() - path.stat().st_mtime < COLD
    except FileNotFoundError:
        return False


def _remove(path: Path, dead: Owner) -> None:
    """Take a dead owner's claim away, and not the one that somebody else put there in the same moment."""
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.dead")
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return
    try:
        found = _read(aside)
        if found is not None and found.token != dead.token:
            os.link(aside, path)
    except FileExistsError:
        pass  # the third one's; whose claim was taken away sees that before it writes
    finally:
        aside.unlink(missing_ok=True)


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _started(pid: int) -> str | None:
    """The start time in ticks since boot, from /proc; None for no such process, a dead one, or another system."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return None
    return None if after_name[0] in "ZX" else after_name[19]
