"""The tables in README.md are those of the committed results and of the code as it is."""

from __future__ import annotations

import pytest

from benchmarks.readme import SECTIONS, section


@pytest.mark.parametrize("name", SECTIONS)
def test_table_is_what_was_measured(name: str) -> None:
    assert section(name) == SECTIONS[name](), "Run: python -m benchmarks.readme"
