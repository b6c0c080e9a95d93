"""A4A's Table 1 as a query over a run: the published number, ours, and the difference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.a4a.summary import select
from benchmarks.frame.published import published
from benchmarks.frame.summary import Spread, spread
from benchmarks.frame.tables import Table

TARGET = "sdxl"
METRICS = {"ida": "IDA", "clip_i": "CLIP-score"}
OURS = {"x-adapter": "", "pta-um": "native", "a4a": "a4a"}
"""The paper's rows by the driver's methods. X-Adapter is a model of its own, which this driver does not run."""


def table_1(results: Mapping[str, Any]) -> Table | None:
    """None where the run has nothing of the table's pair, SD1.5 to SDXL."""
    settings = results["settings"]
    rows = select(results["sweep"], target=TARGET, scale=settings["scale"])
    if not rows:
        return None
    lines = []
    for name, method in OURS.items():
        cells: list[str] = []
        for metric in METRICS:
            (printed,) = published("A4A-1", adaptation=name, metric=metric)
            ours = _over_seeds(rows, method, metric)
            apart = f"{ours.mean - printed.value:+.4f}" if ours and printed.value is not None else ""
            cells += [f"{printed.value:.4f}", ours.text(4) if ours else "", apart]
        lines.append([name, *cells])
    for method in dict.fromkeys(row["method"] for row in rows):
        if method not in OURS.values():
            found = {metric: _over_seeds(rows, method, metric) for metric in METRICS}
            lines.append(
                [method, *(cell for ours in found.values() for cell in ("", ours.text(4) if ours else "", ""))]
            )
    columns = [
        "adapter",
        *(f"{title}: {what}" for title in METRICS.values() for what in ("paper", "ours", "difference")),
    ]
    notes = [
        f"{settings['references']} references with {len(settings['prompts'])} images each, strength {settings['scale']:g}; the paper "
        "has 100 of CelebAMask-HQ with 4 images each.",
        f"IDA over the images in which a face is found, and CLIP-score by {settings['clip']}: the paper says neither.",
        "pta-um is the adapter that was published for the target; rows without a published number are controls of ours.",
    ]
    return Table("Table 1 of A4A, side by side", columns, lines, notes)


def _over_seeds(rows: list[Mapping[str, Any]], method: str, metric: str) -> Spread | None:
    values = [float(row[metric]) for row in select(rows, method=method) if metric in row]
    return spread(values) if values else None
