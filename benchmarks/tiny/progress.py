"""Progress bars for a person, silence for a test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class Reporter(Protocol):
    """What the parts of a benchmark tell whoever watches."""

    def track(self, title: str, total: int) -> Iterator[int]:
        """Yield `range(total)` and show how far it is."""

    def shares(self) -> AbstractContextManager[Callable[[str, float], None]]:
        """A function to call with what is being done and the share of it that is done, 0 to 1."""

    def say(self, text: str) -> None:
        """Print one line."""


class Bars:
    """A bar per running loop, removed when the loop ends, and one printed line per finished piece."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()

    def track(self, title: str, total: int) -> Iterator[int]:
        with self.shares() as show:
            for step in range(total):
                show(title, step / total)
                yield step

    @contextmanager
    def shares(self) -> Iterator[Callable[[str, float], None]]:
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=30), TaskProgressColumn())
        times = (TimeElapsedColumn(), TimeRemainingColumn())
        terminal = self.console.is_terminal
        with Progress(*columns, *times, console=self.console, transient=True, disable=not terminal) as bars:
            current: list[tuple[str, TaskID]] = []

            def show(what: str, share: float) -> None:
                if not current or current[0][0] != what:
                    if current:
                        bars.remove_task(current[0][1])
                    current[:] = [(what, bars.add_task(what, total=1.0))]
                    if not terminal:  # a log: one line per loop
                        self.say(what)
                bars.update(current[0][1], completed=share)

            yield show

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False)


class Silent:
    """Says nothing."""

    def track(self, title: str, total: int) -> Iterator[int]:
        yield from range(total)

    @contextmanager
    def shares(self) -> Iterator[Callable[[str, float], None]]:
        yield lambda what, share: None

    def say(self, text: str) -> None:
        pass
