"""What the tests of benchmarks/llm share: presets, records as the store has them, a folder of data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.frame.settings import override, read_preset
from benchmarks.llm import commonsense
from benchmarks.llm.__main__ import DRIVER
from benchmarks.llm.settings import Settings
from benchmarks.llm.tables import PAPER_PAIR


def preset(name: str, *arguments: str) -> Settings:
    settings: Settings = read_preset(Settings, DRIVER.presets / f"{name}.toml")
    return override(settings, {}, arguments, "llm")[0]


def evaluation(
    task: str, value: float, *, side: int, mode: str | None, seed: int = 0, suite: str = "paper", trained_on: int = 0
) -> Mapping[str, Any]:
    """A record as the store has it, of the paper's pair."""
    base = [{"name": name, "revision": None, "made": None} for name in PAPER_PAIR]
    recipe = "math" if task == "gsm8k" else "commonsense"
    training = {"base_model": base[trained_on], "recipe": recipe, "mode": mode, "seed": seed} if mode else None
    return {
        "kind": "evaluation",
        "settings": {"suite": suite, "task": task, "target": base[side], "training": training},
        "result": {
            "rows": [{"metric": "accuracy", "value": value, "primary": True}],
            "right": [float(index < 100 * value) for index in range(100)],
        },
    }


def write_commonsense(folder: Path) -> None:
    """The layout of a checkout, with one entry per file."""
    entry = {"instruction": "Is it? Answer format: true/false", "input": "", "output": "the correct answer is true"}
    for path in (commonsense.TRAINING, *map(commonsense.test_file, commonsense.FOLDERS)):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(json.dumps([{**entry, "answer": "true"}]))
