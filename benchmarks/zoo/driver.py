"""Which cells a preset has, and running those that are not finished."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import provenance
from benchmarks.tiny.progress import Reporter
from benchmarks.tiny.results import Cells
from benchmarks.zoo.carry import BARE, RETRAINED, ROWS
from benchmarks.zoo.settings import Settings

if TYPE_CHECKING:
    from benchmarks.zoo.cells import Keeper

PARTS = ("lm", "denoiser")
HOME, MEASURES = "home", "measures"


@dataclass(frozen=True)
class Cell:
    """One piece of work. `what`: a row, or bare, retrained, measures; of the source, home."""

    part: str
    seed: int
    sibling: str
    what: str

    @property
    def name(self) -> str:
        return f"{self.part}-seed{self.seed}-{self.sibling}-{self.what}"


def plan(settings: Settings, parts: Sequence[str] = PARTS) -> list[Cell]:
    """Every cell, in the order in which they run: what needs no training on a target comes first."""
    cells: list[Cell] = []
    for seed in settings.seeds:
        for part in (part for part in PARTS if part in parts):
            siblings = getattr(settings, part).siblings
            cells.append(Cell(part, seed, "source", HOME))
            free = [BARE, MEASURES, *(row.name for row in ROWS.values() if not row.trains)]
            trained = [RETRAINED, *(row.name for row in ROWS.values() if row.trains)]
            for group in (free, trained):
                cells += [Cell(part, seed, sibling, what) for sibling in siblings for what in group]
    return cells


def made_with(cell: Cell, settings: Settings) -> dict[str, Any]:
    """What a cell's content depends on. A finished one is taken again only if this is the same."""
    found: dict[str, Any] = {"settings": asdict(getattr(settings, cell.part)), "versions": provenance.versions()}
    # The other siblings are none of its business: one more of them leaves what is finished.
    found["settings"].pop("siblings")
    training = found["settings"].pop("distil")
    if cell.what in ROWS and ROWS[cell.what].trains:
        found["training"] = training
    if cell.what in ROWS:
        found["row"] = asdict(ROWS[cell.what])
    return found


def finished(settings: Settings, cells: Cells, parts: Sequence[str] = PARTS) -> dict[Cell, Any]:
    """The contents of all cells that are done."""
    contents = {cell: cells.get(cell.name, made_with(cell, settings)) for cell in plan(settings, parts)}
    return {cell: content for cell, content in contents.items() if content is not None}


def run(
    settings: Settings,
    cells: Cells,
    shelf: Path,
    progress: Reporter,
    *,
    parts: Sequence[str] = PARTS,
    only: Sequence[str] = (),
    seeds: Sequence[int] = (),
    again: bool = False,
) -> None:
    """Runs what is not finished. Several processes may share the folders: each takes seeds or rows of its own.

    Args:
        shelf: folder for trained models and adapters.
        only: what to run (rows, "bare", "measures", "retrained", "home"); everything if empty.
        seeds: of the preset's seeds, these; all if empty.
        again: run these cells even if they are finished.
    """
    keepers: dict[tuple[str, int], Keeper] = {}
    wanted = [
        cell
        for cell in plan(replace(settings, seeds=tuple(seeds) or settings.seeds), parts)
        if not only or cell.what in only
    ]
    for number, cell in enumerate(wanted, 1):
        key = made_with(cell, settings)
        if not again and cells.get(cell.name, key) is not None:
            continue
        started = time.process_time()
        if (cell.part, cell.seed) not in keepers:
            keepers.clear()  # of one seed and part at a time
            keepers[cell.part, cell.seed] = _keeper(cell, settings, shelf, progress)
        content = _work(keepers[cell.part, cell.seed], cell)
        seconds = time.process_time() - started
        cells.put(cell.name, key, {"records": content, "seconds": round(seconds, 2)})
        progress.say(f"[{number}/{len(wanted)}] {cell.name}: {seconds:.1f} s")


def learning_rates(settings: Settings, shelf: Path) -> list[dict[str, Any]]:
    """What was tried on the source of the tuning seed; nothing if that has not been done yet."""
    from benchmarks.tiny.progress import Silent
    from benchmarks.zoo.lm import LmWorld

    world = LmWorld(settings.lm, settings.seeds[0], shelf, Silent())
    return world.tried() if world.is_tuned() else []


def _keeper(cell: Cell, settings: Settings, shelf: Path, progress: Reporter) -> Keeper:
    from benchmarks.zoo.cells import Keeper  # torch, transformers, peft: seconds that --plan need not wait

    if cell.part == "lm":
        from benchmarks.zoo.lm import LmWorld

        return Keeper(LmWorld(settings.lm, cell.seed, shelf, progress))
    from benchmarks.zoo.denoiser import DenoiserWorld

    return Keeper(DenoiserWorld(settings.denoiser, cell.seed, shelf, progress))


def _work(keeper: Keeper, cell: Cell) -> Any:
    if cell.what == HOME:
        return keeper.at_home()
    if cell.what == BARE:
        return keeper.bare(cell.sibling)
    if cell.what == RETRAINED:
        return keeper.retrained(cell.sibling)
    if cell.what == MEASURES:
        return keeper.measures(cell.sibling)
    return keeper.carried(cell.sibling, ROWS[cell.what])
