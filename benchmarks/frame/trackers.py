"""Whether the trackers that a preset asks for are there: accelerate leaves out in silence what is not."""

from __future__ import annotations

from collections.abc import Sequence


def check_trackers(names: Sequence[str]) -> None:
    """Raises ValueError for a tracker that accelerate does not know, or whose package is not installed."""
    if not names:
        return
    from accelerate.tracking import get_available_trackers
    from accelerate.utils import LoggerType

    from benchmarks.frame.settings import did_you_mean

    known = [str(each.value) for each in LoggerType if each != LoggerType.ALL]
    there = [str(getattr(each, "value", each)) for each in get_available_trackers()]
    for name in names:
        if name not in known:
            raise ValueError(f"no tracker {name!r}{did_you_mean(name, known)} accelerate knows {', '.join(known)}.")
        if name not in there:
            raise ValueError(f"the tracker {name} is not installed: pip install {name}, or leave it out.")
