"""The command line that all drivers share: `python -m benchmarks.<driver> PRESET [options]`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table as RichTable

from benchmarks.frame.cell import Cell
from benchmarks.frame.engines import Engine, InProcess, LocalProcesses
from benchmarks.frame.files import DiskFull
from benchmarks.frame.progress import Board, duration
from benchmarks.frame.settings import override, preset_path, read_preset
from benchmarks.frame.store import Store
from benchmarks.frame.sweep import Plan, Stages, Summary, changed_versions, plan, sweep
from benchmarks.frame.tables import Table
from benchmarks.provenance import ROOT


@dataclass(frozen=True, kw_only=True)
class Run:
    """How to run: none of this changes a result."""

    out: str | None = None
    """Folder of the cells; runs/<driver> if not given. Any number of runs may share it, and presets share their cells."""
    results: str | None = None
    """Folder for the tables; the folder of the cells if not given."""
    engine: Literal["here", "local", "ray"] = "here"
    workers: int = 1
    devices: tuple[str, ...] = ()
    """Engine local: CUDA_VISIBLE_DEVICES of each worker, taken in turn: '["0", "1"]'."""
    gpus: float = 0.0
    """Engine ray: GPUs that one worker asks for."""
    cpus: float = 1.0
    """Engine ray: CPU cores that one worker asks for."""
    keep: int = 2
    """Bases that a worker keeps loaded."""
    threads: int | None = None
    """Threads of torch in each worker."""
    plan: bool = False
    """Say what would run, how long and how much disk it would take, and stop."""
    collect: bool = False
    """Only write the tables of what is finished."""
    strict_versions: bool = False
    """Refuse to go on with other library versions than those of the finished cells."""


@dataclass(frozen=True, kw_only=True)
class Driver:
    """One benchmark: its settings, its cells, its tables."""

    name: str  # benchmarks/<name>
    title: str
    settings: type  # a dataclass, which a preset fills in
    stages: Stages
    tables: Callable[[Any, Sequence[dict[str, Any]]], list[Table]]  # (settings, records of its cells)
    html: Callable[[Any, Sequence[dict[str, Any]], Store], list[str]] = lambda settings, records, store: []
    prepare: Callable[[Any], None] = lambda settings: None  # checks that need no cell; ValueError stops the run

    @property
    def presets(self) -> Path:
        return ROOT / "benchmarks" / self.name / "presets"


def main(driver: Driver, arguments: Sequence[str] | None = None) -> int:
    """Run a preset and write its tables; the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    console = Console()
    try:
        return _main(driver, given, console)
    except (ValueError, TypeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except DiskFull as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        console.print(
            "\nInterrupted. Nothing half-written is left; the same command goes on after the last finished cell."
        )
        return 130


def _main(driver: Driver, given: list[str], console: Console) -> int:
    prog = f"python -m benchmarks.{driver.name}"
    known = sorted(path.stem for path in driver.presets.glob("*.toml"))
    if not given or given[0].startswith("-"):
        text = f"usage: {prog} PRESET [--plan] [--engine here|local|ray] [--workers N] [--field value ...]"
        print(f"{text}\npresets: {', '.join(known)}, or path/to/my.toml\nall options: {prog} {known[0]} --help")
        return 0 if given and given[0] in ("-h", "--help") else 2
    path = preset_path(given[0], driver.presets)
    preset: Any = read_preset(driver.settings, path)
    settings, options = override(preset, {"run": Run}, given[1:], f"{prog} {given[0]}")
    run: Run = options["run"]
    store = Store(Path(run.out) if run.out else ROOT / "runs" / driver.name)
    planned = plan(driver.stages, settings, store)
    if run.plan:
        _show(planned, store, run, console)
        return 0
    summary = Summary()
    if not run.collect:
        driver.prepare(settings)
        _check_versions(planned, store, run, console)
        board = Board(console, workers=run.workers, bar=run.engine != "here")
        summary = sweep(driver.stages, settings, store, engine(store, run), board)
    return _write(driver, settings, path.stem, store, run, console, summary)


def engine(store: Store, run: Run) -> Engine:
    """The engine that the options ask for."""
    if run.workers < 1:
        raise ValueError(f"--workers {run.workers}; give 1 or more.")
    if run.threads is not None:
        _set_threads(run.threads)
    if run.engine == "here":
        if run.workers > 1:
            raise ValueError(f"--workers {run.workers} needs --engine local or --engine ray.")
        return InProcess(store, run.keep)
    if run.engine == "local":
        return LocalProcesses(store, run.keep, run.workers, run.devices)
    from benchmarks.frame.ray_engine import Ray

    return Ray(store, run.keep, run.workers, run.gpus, run.cpus)


def _set_threads(threads: int) -> None:
    """For this process and those that it starts."""
    import os

    import torch

    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)


def _check_versions(planned: Plan, store: Store, run: Run, console: Console) -> None:
    changed = changed_versions(planned, store)
    if not changed:
        return
    what = "; ".join(f"{name}: {', '.join(numbers)}" for name, numbers in changed.items())
    if run.strict_versions:
        raise ValueError(
            f"finished cells in {store.folder} were made with other versions ({what}). Install those, or give another --out, "
            "or leave --strict_versions away: every cell records its versions, and the tables warn of a mixture."
        )
    console.print(
        f"note: finished cells were made with other versions ({what}); the tables will say so.", highlight=False
    )


def _show(planned: Plan, store: Store, run: Run, console: Console) -> None:
    by_kind: dict[str, list[Cell]] = {}
    for cell in planned.cells:
        by_kind.setdefault(cell.kind, []).append(cell)
    table = RichTable("cells", "number", "finished", "hours of all", "disk, GB")
    for kind, cells in by_kind.items():
        estimate = planned.estimate(cells)
        finished = sum(map(store.is_finished, cells))
        table.add_row(kind, str(len(cells)), str(finished), f"{estimate.hours:.2f}", f"{estimate.megabytes / 1000:.2f}")
    left = [cell for cell in planned.cells if not store.is_finished(cell)]
    rest = planned.estimate(left)
    console.print(table)
    console.print(
        f"{len(left)} cells to run: about {duration(rest.hours * 3600 / run.workers)} with {run.workers} worker(s), "
        f"{rest.megabytes / 1000:.2f} GB in {store.folder}. Hours are estimates; see benchmarks/README.md.",
        highlight=False,
        soft_wrap=True,
    )
    for cell in planned.cells:
        console.print(f"  {cell.name}  {cell.describe()}", highlight=False, markup=False, soft_wrap=True)


def _write(
    driver: Driver, settings: Any, preset: str, store: Store, run: Run, console: Console, summary: Summary
) -> int:
    from benchmarks.frame.collect import write_all

    final = plan(driver.stages, settings, store)  # with the choices that the results have led to
    records = [record for cell in final.cells if (record := store.record(cell))]
    tables = driver.tables(settings, records)
    folder = Path(run.results) if run.results else store.folder
    paths = write_all(
        preset, f"{driver.title}: {preset}", folder, records, tables, driver.html(settings, records, store)
    )
    console.print(f"{len(records)} of {len(final.cells)} cells are finished.", highlight=False)
    for name in summary.names("failed", "blocked"):
        text = f"  {summary.outcomes[name].state}: {name}: {summary.outcomes[name].message}"
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    console.print(f"written: {', '.join(map(str, paths))}", highlight=False, soft_wrap=True)
    return 1 if summary.names("failed", "blocked") else 0
