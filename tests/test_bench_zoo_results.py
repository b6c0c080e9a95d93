"""benchmarks/zoo: results on disk, what is read from them, and what is said of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.zoo.analysis import analyse
from benchmarks.zoo.carry import ROWS
from benchmarks.zoo.results import COLUMNS, LAYER_COLUMNS, SCHEMA, Words, examples_of, read_results, write_results
from benchmarks.zoo.settings import FULL


def small_results() -> dict[str, Any]:
    def record(**told: Any) -> list[Any]:
        return [{"part": "lm", "seed": 0, "task": "D", "space": "lora", **told}.get(name) for name in COLUMNS]

    words = Words()
    figures = {
        "kept": 0.5,
        "left_out": 0,
        "trust": 0.7,
        "trust_bare": 0.1,
        "direction": 0.8,
        "strength": 1.0,
        "same": 0.9,
    }
    layer = dict.fromkeys(LAYER_COLUMNS) | {"source": "a", "target": "a", "relation": "same", "weight_drift": 0.1}
    return {
        "schema": SCHEMA,
        "preset": "full",
        "command": "python -m benchmarks.zoo full",
        "when": "now",
        "cells": {"finished": 5, "planned": 9},
        "seconds": {"lm bare": 1.0},
        "versions": {"torch": "1"},
        "hardware": {"processor": "one", "threads_used": 1},
        "git": {"revision": "f" * 40, "modified": False},
        "settings": {
            "seeds": [0],
            "lm": json.loads(json.dumps(vars(FULL.lm) | {"tiny": vars(FULL.lm.tiny)}, default=str)),
            "denoiser": json.loads(json.dumps(vars(FULL.denoiser) | {"tiny": vars(FULL.denoiser.tiny)}, default=str)),
            "halves": json.loads(json.dumps(vars(FULL.halves))),
        },
        "rows": {name: {"trains": row.trains} for name, row in ROWS.items()},
        "learning_rates": [],
        "columns": list(COLUMNS),
        "records": [
            record(sibling="source", row="bare", space="", score=0.0, kept=0.9),
            record(sibling="source", row="copy", score=0.8, kept=0.2),
            record(sibling="rot", row="bare", space="", score=0.1, kept=0.9),
            record(sibling="rot", row="copy", score=0.4, **figures),
            record(sibling="rot", row="aligned", score=0.6, **figures | {"trust": 0.8}),
            record(sibling="rot", row="lora_x", refused="no"),
            record(sibling="rot", row="auto", score=0.6, **figures | {"trust": 0.8}, chosen="aligned"),
            record(sibling="rot", row="retrained", space="", score=1.0, kept=0.3),
        ],
        "layer_columns": ["part", "seed", "sibling", "task", "space", *LAYER_COLUMNS],
        "words": words.all,
        "layers": [[words.number(value) for value in ("lm", 0, "rot", "D", "lora", *layer.values())]],
    }


def test_examples_from_records() -> None:
    (one,) = examples_of(small_results())
    assert one.scores == {"bare": 0.1, "copy": 0.4, "aligned": 0.6, "auto": 0.6}
    assert one.free == {"copy", "aligned"}
    assert one.ran == {"copy", "aligned", "auto", "lora_x"}
    assert one.home == 0.8
    assert one.score("lora_x") == 0.1  # refused: the bare target
    assert [dict(layer) for layer in one.layers] == [
        {"source": "a", "target": "a", "relation": "same", "weight_drift": 0.1}
    ]


def test_analysis_says_what_holds_and_what_does_not() -> None:
    found = analyse(small_results())
    (scores,) = found.grids
    assert scores.rows["rot"]["lora_x"].text() == "0.10*"
    assert scores.rows["rot"]["retrained"].mean == 1.0
    lines = {line.name: line for line in found.policies["lm"]}
    assert lines["copy if shapes fit"].everywhere.mean == pytest.approx(20)
    assert lines["auto"].everywhere.mean == 0
    text = "\n".join(found.sentences)
    assert "Incomplete: 5 of 9 cells" in text
    assert "mean regret 0.00 (asked: at most 1): holds" in text
    assert "ranks 2 carried adapters as their scores do with Spearman's ρ = 1.00" in text  # auto's is aligned's
    worse = small_results()
    worse["records"][6][COLUMNS.index("score")] = 0.05
    text = "\n".join(analyse(worse).sentences)
    assert "mean regret 55.00 (asked: at most 1): does not hold" in text
    assert "below bare by 5.0 at most (asked: 0.5): does not hold" in text


def test_results_are_written_whole_and_read_back(tmp_path: Path) -> None:
    results = small_results()
    paths = write_results(results, tmp_path)
    assert [path.name for path in paths] == ["full.json", "full.md", "full.html"]
    assert read_results(paths[0]) == results
    page = paths[2].read_text(encoding="utf-8")
    assert "<svg" in page
    assert "http" not in page.replace("http://www.w3.org", "")
    assert "Incomplete: 5 of 9 cells" in paths[1].read_text(encoding="utf-8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full.html", "full.json", "full.md"]
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(ValueError, match="not a result of the zoo"):
        read_results(tmp_path / "other.json")
    with pytest.raises(ValueError, match="cannot be read"):
        read_results(tmp_path / "none.json")
