"""Progress bars: shown where somebody looks, which is decided once, not by every function on the way."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

T = TypeVar("T")
_shown: ContextVar[bool] = ContextVar("progress_shown", default=False)


@contextmanager
def showing(shown: bool = True) -> Iterator[None]:
    """Bars appear on stderr until the end of the block. The command line does so on a terminal; libraries keep still."""
    token = _shown.set(shown)
    try:
        yield
    finally:
        _shown.reset(token)


def track(items: Iterable[T], title: str, shown: bool = False) -> Iterator[T]:
    """The items one by one, with a bar where it is shown anyway, or asked for here."""
    if not (shown or _shown.get()):
        yield from items
        return
    from rich.console import Console
    from rich.progress import track as with_bar

    yield from with_bar(items, title, console=Console(stderr=True), transient=True)
