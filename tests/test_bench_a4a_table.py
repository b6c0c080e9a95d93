"""A4A's Table 1 beside what the paper prints."""

from __future__ import annotations

from typing import Any

from benchmarks.a4a.table_1 import table_1


def results(target: str = "sdxl") -> dict[str, Any]:
    def row(method: str, seed: int, clip_i: float, scale: float = 1.0, **more: float) -> dict[str, Any]:
        return {"target": target, "method": method, "seed": seed, "scale": scale, "clip_i": clip_i, **more}

    return {
        "settings": {"references": 25, "prompts": ["a", "b"], "scale": 1.0, "clip": "clip"},
        "sweep": [
            row("a4a", 0, 0.90, ida=0.5),
            row("a4a", 1, 0.92, ida=0.6),
            row("a4a", 0, 0.10, scale=0.5, ida=0.0),
            row("native", 0, 0.80),
            row("random", 0, 0.70, ida=0.1),
        ],
    }


def test_published_ours_and_the_difference_stand_side_by_side() -> None:
    table = table_1(results())
    assert table is not None
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["a4a"] == ["0.5127", "0.5500 ± 0.0707", "+0.0373", "0.9154", "0.9100 ± 0.0141", "-0.0054"]
    assert rows["pta-um"] == ["0.4531", "", "", "0.9124", "0.8000", "-0.1124"]
    assert rows["x-adapter"] == ["0.0620", "", "", "0.7894", "", ""]
    assert rows["random"] == ["", "0.1000", "", "", "0.7000", ""]
    assert "25 references with 2 images each" in table.notes[0]


def test_of_another_pair_it_says_nothing() -> None:
    assert table_1(results("pixart")) is None
