"""The tables as plots: each variant's score on the target, and Figure 7 as lines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.dreambooth.measured import METRICS, TITLES, by_split, grouped, measured, over_seeds
from benchmarks.dreambooth.settings import Settings
from benchmarks.dreambooth.tables import chosen_rates_only, row_order
from benchmarks.frame.charts import dots, lines
from benchmarks.frame.store import Store
from benchmarks.frame.summary import Spread


def plots(settings: Settings, records: Sequence[dict[str, Any]], store: Store) -> list[str]:
    """HTML figures; mean and standard deviation over seeds."""
    found = chosen_rates_only(settings, measured(records))
    parts = []
    for (pair, side), own in grouped(found, lambda each: (each.variant.pair, each.side)).items():
        for metric in (each for each in METRICS if any(each in one.means for one in own)):
            variants = grouped(own, lambda each: each.variant)
            rows: list[tuple[str, Spread]] = []
            for variant in sorted(variants, key=row_order):
                size = f"r{variant.rank}" if variant.rank else ""
                value = over_seeds(variants[variant], metric)
                if value is not None:
                    rows.append((" ".join(filter(None, [variant.method, size, variant.label])), value))
            parts.append(dots(f"{pair}: {TITLES[metric]} on the {side}", rows))
    for (pair, rank, space), splits in by_split(found).items():
        for metric in METRICS:
            curve = [(float(split), value) for split, own in splits.items() if (value := over_seeds(own, metric))]
            title = f"Figure 7: {pair}, {TITLES[metric]} on the target by the part of rank {rank} in {space} space"
            parts.append(lines(title, f"rank in {space} space", {"": curve} if curve else {}))
    parts = [part for part in parts if part]
    return ["<h2>Plots</h2>", *parts] if parts else []
