"""What was asked makes sense, and is not done: the verdict or the coverage speaks against it."""

from __future__ import annotations


class Refused(ValueError):
    """Nothing was written, because the result could not be trusted; the message says why and what would allow it.

    On the command line this is exit code 3, where a mistake in what was asked is 2.
    """
