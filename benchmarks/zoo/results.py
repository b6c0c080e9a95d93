"""The results on disk: every record in a compact JSON, and the tables and sentences of them in Markdown and HTML."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks import provenance
from benchmarks.tiny.results import write_together
from benchmarks.zoo.carry import BARE, CHOOSERS, RETRAINED, ROWS
from benchmarks.zoo.driver import MEASURES, Cell, plan
from benchmarks.zoo.settings import Settings
from benchmarks.zoo.stats import Example

SCHEMA = 1
Results = dict[str, Any]
COLUMNS = (
    *("part", "seed", "sibling", "task", "space", "row", "score", "kept", "left_out"),
    *("trust", "trust_bare", "direction", "strength", "same", "chosen", "seconds", "refused"),
)
LAYER_COLUMNS = (
    *("source", "target", "relation", "weight_drift", "weight_cosine", "inputs_overlap", "outputs_overlap"),
    *(
        "update_share",
        "update_share_there",
        "update_change",
        "inputs_moved",
        "outputs_moved",
        "inputs_cka",
        "outputs_cka",
    ),
)


def collect(settings: Settings, done: Mapping[Cell, Any], rates: Sequence[Mapping[str, Any]] = ()) -> Results:
    """Everything that is finished, as one JSON-able dictionary. `rates`: the learning rates that were tried."""
    records, layers, words = [], [], Words()
    for cell, content in done.items():
        for record in content["records"]:
            told = {"part": cell.part, "seed": cell.seed, **record}
            if cell.what == MEASURES:
                key = [told[name] for name in ("part", "seed", "sibling", "task", "space")]
                layers += [
                    [words.number(value) for value in (*key, *map(layer.get, LAYER_COLUMNS))]
                    for layer in told["layers"]
                ]
            else:
                records.append([told.get(name) for name in COLUMNS])
    seconds: dict[str, float] = {}
    for cell, content in done.items():
        seconds[f"{cell.part} {cell.what}"] = round(
            seconds.get(f"{cell.part} {cell.what}", 0.0) + content["seconds"], 1
        )
    return {
        "schema": SCHEMA,
        "preset": settings.preset,
        "command": f"python -m benchmarks.zoo {settings.preset}",
        "when": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "cells": {"finished": len(done), "planned": len(plan(settings))},
        "seconds": seconds,
        "versions": provenance.versions(),
        "hardware": provenance.hardware(),
        "git": provenance.git(),
        "settings": asdict(settings),
        "rows": {name: asdict(row) for name, row in ROWS.items()},
        "learning_rates": list(rates),
        "columns": list(COLUMNS),
        "records": records,
        "layer_columns": ["part", "seed", "sibling", "task", "space", *LAYER_COLUMNS],
        "words": words.all,
        "layers": layers,
    }


class Words:
    """Numbers in the place of texts, which repeat in every line of the layers: -1 is the first word, -2 the second."""

    def __init__(self) -> None:
        self.all: list[str] = []
        self._numbers: dict[str, int] = {}

    def number(self, value: Any) -> Any:
        """The number of a text; anything else as it is."""
        if not isinstance(value, str):
            return value
        if value not in self._numbers:
            self.all.append(value)
            self._numbers[value] = -len(self.all)
        return self._numbers[value]


def records_of(results: Results) -> list[dict[str, Any]]:
    """Its records as dictionaries, without what they lack."""
    columns = results["columns"]
    return [
        {name: value for name, value in zip(columns, record, strict=True) if value is not None}
        for record in results["records"]
    ]


def examples_of(results: Results) -> list[Example]:
    """One example per adapter and sibling of which the bare score is known."""
    choices = {name: row["trains"] for name, row in results["rows"].items() if name not in CHOOSERS}
    bare: dict[tuple[Any, ...], float] = {}
    home: dict[tuple[Any, ...], float] = {}
    cells: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for record in records_of(results):
        place = (record["part"], record["seed"], record["sibling"], record["task"])
        if record["sibling"] == "source":
            home[record["part"], record["seed"], record["task"], record["space"]] = record["score"]
        elif record["row"] == BARE:
            bare[place] = record["score"]
        elif record["row"] != RETRAINED:
            cells.setdefault((*place, record["space"]), {})[record["row"]] = record
    layers = _layers(results)
    examples = []
    for key, rows in cells.items():
        part, seed, sibling, task, space = key
        if key[:4] not in bare:
            continue
        worked = {name: record for name, record in rows.items() if "score" in record}
        examples.append(
            Example(
                part=part,
                seed=seed,
                sibling=sibling,
                task=task,
                space=space,
                scores={BARE: bare[key[:4]], **{name: record["score"] for name, record in worked.items()}},
                left_out={name: record.get("left_out", 0) for name, record in worked.items()},
                free=frozenset(name for name in worked if name in choices and not choices[name]),
                trained=frozenset(name for name in worked if choices.get(name)),
                ran=frozenset(rows),
                trust={
                    name: {
                        k: record[k] for k in ("trust", "trust_bare", "direction", "strength", "same") if k in record
                    }
                    for name, record in worked.items()
                },
                layers=layers.get(key, ()),
                home=home.get((part, seed, task, space), 0.0),
            )
        )
    return examples


def _layers(results: Results) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    words, texts = results["words"], ("part", "sibling", "task", "space", "source", "target", "relation")
    is_text = [name in texts for name in results["layer_columns"]]
    for stored in results["layers"]:
        line = [words[-value - 1] if text and value else value for text, value in zip(is_text, stored, strict=True)]
        told = dict(zip(results["layer_columns"][5:], line[5:], strict=True))
        found.setdefault(tuple(line[:5]), []).append({name: value for name, value in told.items() if value is not None})
    return found


def read_results(path: Path) -> Results:
    """A JSON file that `write_results` has written.

    Raises:
        ValueError: it is none.
    """
    try:
        results: Results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}. Give the JSON file that a run has written.") from None
    if not isinstance(results, dict) or results.get("schema") != SCHEMA or "records" not in results:
        raise ValueError(f"{path} is not a result of the zoo in schema {SCHEMA}.")
    return results


def write_results(results: Results, folder: Path) -> Sequence[Path]:
    """`<preset>.json`, `.md` and `.html` in `folder`, all or none."""
    from benchmarks.zoo.markdown import markdown
    from benchmarks.zoo.report import html

    paths = [folder / f"{results['preset']}.{suffix}" for suffix in ("json", "md", "html")]
    texts = (_compact(results), markdown(results), html(results))
    write_together(dict(zip(paths, texts, strict=True)))
    return paths


def _compact(results: Results) -> str:
    """One line per record, the rest indented."""
    rest = {key: value for key, value in results.items() if key not in ("records", "layers")}
    text = json.dumps(rest, indent=1, ensure_ascii=False)[:-2]
    for key in ("records", "layers"):
        lines = ",\n".join(json.dumps(line, ensure_ascii=False, separators=(",", ":")) for line in results[key])
        text += f',\n "{key}": [\n{lines}\n ]'
    return text + "\n}\n"
