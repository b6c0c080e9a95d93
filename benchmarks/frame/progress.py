"""How far a sweep is, and how long it will take."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from benchmarks.frame.store import Store
from benchmarks.frame.worker import Outcome

if TYPE_CHECKING:
    from benchmarks.frame.sweep import Plan


class Board:
    """One bar for the sweep and one printed line per cell. `bar=False` where the cells show bars of their own."""

    def __init__(
        self, console: Console | None = None, *, workers: int = 1, bar: bool = True, quiet: bool = False
    ) -> None:
        self.console = console or Console()
        self.workers, self.quiet = workers, quiet
        self._bar = bar and self.console.is_terminal and not quiet
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._left: dict[str, tuple[str, float]] = {}  # name -> kind, estimated seconds
        self._seconds: dict[str, list[float]] = defaultdict(list)  # by kind, as measured in this run
        self._total = 0

    @contextmanager
    def run(self, plan: Plan) -> Iterator[None]:
        """Show the bar while the cells of `plan` run."""
        self._total = len(plan.cells)
        self._left = {cell.name: (cell.kind, cell.estimate().hours * 3600) for cell in plan.cells}
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=30), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self.console, transient=True, disable=not self._bar) as self._progress:
            self._task = self._progress.add_task("cells", total=self._total)
            yield

    def ended(self, outcome: Outcome, store: Store) -> None:
        """Move on, and say what became of the cell unless it was there already."""
        kind = self._take(outcome.name)
        if outcome.state == "done":
            self._seconds[kind].append(outcome.seconds)
        done = self._total - len(self._left)
        if self._progress is not None:
            self._progress.update(self._task, completed=done, description=f"cells, {self._time_left()} left")
        if outcome.state == "kept":
            return
        text = f"[{done}/{self._total}] {outcome.name}: {outcome.state}"
        if outcome.state == "done":
            text += f" in {duration(outcome.seconds)}; {self._time_left()} left"
        if outcome.state == "blocked":
            text += f": {outcome.message}"
        if outcome.state == "failed":
            text += f": {outcome.message} (traceback in {store.folder / 'failed' / outcome.name}.json)"
        self.say(text)

    def _take(self, name: str) -> str:
        """Take a cell off the list. One that depends on results was planned under another name: then one of its kind."""
        kind = name.partition("-")[0]
        if name not in self._left:
            name = next((other for other, (of_kind, _) in self._left.items() if of_kind == kind), name)
        self._left.pop(name, None)
        return kind

    def say(self, text: str) -> None:
        if not self.quiet:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _time_left(self) -> str:
        """What this run measured of cells of the same kind, and the estimate for kinds that it has not met."""
        seconds = 0.0
        for kind, estimate in self._left.values():
            measured = self._seconds.get(kind)
            seconds += sum(measured) / len(measured) if measured else estimate
        return duration(seconds / self.workers)


def duration(seconds: float) -> str:
    """`42 s`, `3 min 20 s`, `5 h 07 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
