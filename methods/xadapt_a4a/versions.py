"""Whether an adapter's files were written by a version that this one can read."""

from __future__ import annotations

from packaging.version import InvalidVersion, Version

from xadapt.version import __version__


def check_version(written_by: str, name: str) -> None:
    """ValueError if a newer xadapt wrote it: what it means there may not be what it means here."""
    if not written_by:
        return
    try:
        newer = Version(written_by) > Version(__version__)
    except InvalidVersion as error:
        raise ValueError(f"{name} says it was written by xadapt {written_by!r}, which is no version.") from error
    if newer:
        raise ValueError(
            f"{name} was written by xadapt {written_by}, and this is {__version__}, which may read it wrongly. "
            "pip install --upgrade xadapt"
        )
