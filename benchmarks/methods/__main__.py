"""python -m benchmarks.methods: measures the table of PEFT methods in feature space."""

from __future__ import annotations

from .measure import markdown, rows


def table() -> str:
    """The measured table as Markdown."""
    return markdown(list(zip(rows("input"), rows("output"), strict=True)))


if __name__ == "__main__":
    print(table())
