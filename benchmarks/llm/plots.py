"""The scores as dots: per suite, recipe and task, a row for each adapter on each model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.frame.charts import dots
from benchmarks.frame.store import Store
from benchmarks.llm.settings import Settings
from benchmarks.llm.tables import SUITES, lines_of, scores_of


def plots(settings: Settings, records: Sequence[Mapping[str, Any]], store: Store) -> list[str]:
    """HTML figures; mean and standard deviation over seeds, in percent right."""
    parts = []
    for suite, recipe, scores in scores_of(settings, records):
        for task in dict.fromkeys(key[4] for key in scores):
            title = f"{recipe}: {task}, {SUITES[suite]}, percent right"
            parts.append(dots(title, lines_of(scores, settings, task)))
    return ["<h2>Plots</h2>", *parts] if parts else []
