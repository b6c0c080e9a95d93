"""Results on disk: `cells/<name>.json` for what is finished, `failed/<name>.json` for what is not, `artifacts/<name>/` for files."""

from __future__ import annotations

import os
import shutil
import traceback
from collections.abc import Iterator
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks import provenance
from benchmarks.frame.cell import Cell, Result, plain
from benchmarks.frame.claims import Claim, Owner, claim
from benchmarks.frame.files import read_json, write_json

SCHEMA = 1


def versions(cell: Cell) -> dict[str, str | None]:
    """What this cell would be made with now; None for a package that is not installed."""
    found = provenance.versions()
    for package in cell.packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


@cache
def _hardware() -> dict[str, Any]:
    return provenance.hardware()


@cache
def _git() -> dict[str, Any]:
    """As this process began: what it has imported does not change with the checkout."""
    return provenance.git()


class Store:
    """One folder, on a disk that all workers see. Any number of runs may share it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()

    def record(self, cell: Cell) -> dict[str, Any] | None:
        """All that is stored of a finished cell: settings, result, seconds, versions, hardware, git. None before that."""
        path = self._path("cells", cell)
        if not path.is_file():
            return None
        found = read_json(path)
        if not isinstance(found, dict) or found.get("schema") != SCHEMA:
            raise ValueError(f"{path} is not a result in schema {SCHEMA}. Move it away, and its cell runs again.")
        return found

    def result(self, cell: Cell) -> Result | None:
        found = self.record(cell)
        return None if found is None else found["result"]

    def is_finished(self, cell: Cell) -> bool:
        return self._path("cells", cell).is_file()

    def failure(self, cell: Cell) -> dict[str, Any] | None:
        """What went wrong the last time: error, message, traceback, advice."""
        path = self._path("failed", cell)
        return read_json(path) if path.is_file() else None

    def put(self, cell: Cell, result: Result, seconds: float) -> None:
        """Finish a cell."""
        write_json(self._path("cells", cell), self._described(cell) | {"result": result, "seconds": seconds})
        self._path("failed", cell).unlink(missing_ok=True)

    def put_failure(self, cell: Cell, error: BaseException, advice: str) -> None:
        text = "".join(traceback.format_exception(error))
        found = {"error": type(error).__name__, "message": str(error), "advice": advice, "traceback": text}
        write_json(self._path("failed", cell), self._described(cell) | found)

    def claim(self, cell: Cell) -> Claim | Owner:
        return claim(self._path("claims", cell))

    def artifacts(self, cell: Cell) -> Path:
        """Where the files of a finished cell are."""
        return self.folder / "artifacts" / cell.name

    def fresh_scratch(self, cell: Cell) -> Path:
        """An empty folder for the cell's files; what a killed worker left there is removed."""
        scratch = self.folder / "artifacts" / f".{cell.name}.unfinished"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        return scratch

    def keep_scratch(self, cell: Cell, scratch: Path) -> None:
        """Give the files their place. Before `put`: a cell with a result has its files."""
        shutil.rmtree(self.artifacts(cell), ignore_errors=True)
        if any(scratch.iterdir()):
            os.replace(scratch, self.artifacts(cell))
        else:
            scratch.rmdir()

    def records(self) -> Iterator[dict[str, Any]]:
        """Everything that is finished, whoever asked for it."""
        for path in sorted((self.folder / "cells").glob("*.json")):
            yield read_json(path)

    def _described(self, cell: Cell) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "name": cell.name,
            "kind": cell.kind,
            "settings": plain(cell, identity_only=False),
            "when": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
            "versions": versions(cell),
            "hardware": _hardware(),
            "git": _git(),
        }

    def _path(self, folder: str, cell: Cell) -> Path:
        return self.folder / folder / f"{cell.name}.json"
