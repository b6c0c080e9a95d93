"""The files of the commonsense suite: a checkout of AGI-Edgerunners/LLM-Adapters (Apache-2.0), which the user downloads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOLDERS = {  # task -> folder under dataset/
    "boolq": "boolq",
    "piqa": "piqa",
    "social_iqa": "social_i_qa",
    "hellaswag": "hellaswag",
    "winogrande": "winogrande",
    "arc_easy": "ARC-Easy",
    "arc_challenge": "ARC-Challenge",
    "openbookqa": "openbookqa",
}
TRAINING = Path("ft-training_set") / "commonsense_170k.json"


def test_file(task: str) -> Path:
    return Path("dataset") / FOLDERS[task] / "test.json"


def check_folder(folder: str) -> None:
    """Raises ValueError where a file is missing, with the layout that is looked for."""
    wanted = [TRAINING, *map(test_file, FOLDERS)]
    if not folder:
        raise ValueError(
            "the recipe commonsense needs its data: git clone https://github.com/AGI-Edgerunners/LLM-Adapters, put "
            f"commonsense_170k.json (see its README) at {TRAINING} there, and give --data.commonsense that folder."
        )
    missing = [str(path) for path in wanted if not (Path(folder) / path).is_file()]
    if missing:
        raise ValueError(
            f"{folder} lacks {', '.join(missing)}. Expected is a checkout of AGI-Edgerunners/LLM-Adapters."
        )


def read(folder: str, file: Path, keys: tuple[str, ...]) -> list[dict[str, Any]]:
    """The entries of a file. Raises ValueError for another layout."""
    path = Path(folder) / file
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        check_folder(folder)
        raise
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}.") from None
    if not isinstance(found, list) or not all(isinstance(row, dict) and row.keys() >= set(keys) for row in found):
        raise ValueError(f"{path} has another layout; expected is a list of entries with {', '.join(keys)}.")
    return found
