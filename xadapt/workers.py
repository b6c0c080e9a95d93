"""Work on many layers at once: threads, since torch lets go of the interpreter while it calculates."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from xadapt.progress import track

T = TypeVar("T")
R = TypeVar("R")


def each(function: Callable[[T], R], items: Sequence[T], title: str, progress: bool = False) -> Iterator[R]:
    """function(item) for every item, in their order; as many at once as torch has threads, each with one thread.

    At the first error, or when the caller stops, what has not begun is dropped, and what has begun is waited for.
    """
    threads = torch.get_num_threads()
    executor = ThreadPoolExecutor(max_workers=threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        results = [executor.submit(function, item) for item in items]
        for future in track(results, title, progress):
            yield future.result()
    finally:
        executor.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # torch's setting reaches beyond the thread that makes it
