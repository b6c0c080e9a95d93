"""benchmarks/llm: the tables, from records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.llm import commonsense
from benchmarks.llm.tables import PAPER_PAIR, tables
from tests.llm_records import evaluation, preset


class TestTables:
    @staticmethod
    def of(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        settings = preset("paper")
        return {table.title: table for table in tables(settings, list(records))}  # type: ignore[arg-type]

    def test_beside_the_published_numbers(self) -> None:
        records = [
            evaluation("gsm8k", value, side=1, mode="input", seed=seed) for seed, value in enumerate((0.15, 0.17))
        ]
        records += [evaluation("gsm8k", 0.3, side=1, mode=None)]
        records += [evaluation("gsm8k", 0.4, side=1, mode="lora", trained_on=1)]
        table = self.of(records)["Table 6 of Revisit Model Adaptation, side by side"]
        assert ["target", "input", "gsm8k", "16.07", "16.00 ± 1.41", "-0.07"] in table.rows
        assert ["target", "bare", "gsm8k", "", "30.00", ""] in table.rows
        assert ["target", "lora, retrained", "gsm8k", "", "40.00", ""] in table.rows
        assert ["source", "input", "gsm8k", "23.96", "", ""] in table.rows

    def test_suites_stay_apart(self) -> None:
        found = self.of(
            [
                evaluation("gsm8k", 0.5, side=0, mode="lora"),
                evaluation("gsm8k", 0.9, side=0, mode="lora", suite="lm-eval"),
            ]
        )
        paper = [table.markdown() for title, table in found.items() if "lm-eval" not in title]
        assert not any("90.00" in text for text in paper)
        (other,) = (table for title, table in found.items() if title == "math: lm-eval's own tasks")
        assert other.rows == [[PAPER_PAIR[0], "lora", "90.00"]]

    def test_differences_to_the_copy_are_paired_by_question(self) -> None:
        records = [evaluation("gsm8k", value, side=1, mode="lora", seed=seed) for seed, value in ((0, 0.2), (1, 0.4))]
        records += [evaluation("gsm8k", value, side=1, mode="input", seed=seed) for seed, value in ((0, 0.3), (1, 0.5))]
        records += [evaluation("gsm8k", 0.2, side=1, mode="lora", trained_on=1)]
        records += [evaluation("gsm8k", 0.1, side=1, mode=None)]
        title = "math: the paper's evaluation (generation, answer extraction), difference to the plain copy of the LoRA"
        rows = {row[1]: row[2] for row in self.of(records)[title].rows}
        assert rows["input"].startswith("+10.00 [+6.")
        assert rows["bare"].startswith("-20.00 [")
        assert rows["lora, retrained"].startswith("+0.00")

    def test_a_rate_at_an_edge_of_the_grid_is_named(self) -> None:
        settings = preset("tiny")
        records = [
            {
                "kind": "training",
                "seconds": 1.0,
                "result": {"validation_loss": 0.1},
                "settings": {
                    "recipe": "sorting",
                    "mode": mode,
                    "seed": seed,
                    "learning_rate": rate,
                    "base_model": {"name": "tiny/source", "revision": None},
                },
            }
            for mode, seed, rate in (("lora", 0, 0.1), ("lora", 1, 0.1), ("input", 0, 0.1), ("input", 1, 0.03))
        ]
        (table,) = tables(settings, records)
        assert [note for note in table.notes if "edge" in note] == [
            "Chosen at an edge of the grid, so a better one may lie beyond: sorting, lora at 0.1."
        ]

    def test_the_average_needs_all_eight(self) -> None:
        seven = [evaluation(task, 0.5, side=0, mode="lora") for task in list(commonsense.FOLDERS)[:7]]
        assert not any(
            "commonsense_avg" in table.markdown() for title, table in self.of(seven).items() if "commonsense:" in title
        )
        eight = [*seven, evaluation("openbookqa", 0.9, side=0, mode="lora")]
        rows = self.of(eight)["Table 6 of Revisit Model Adaptation, side by side"].rows
        assert ["source", "lora", "commonsense_avg", "66.32", "55.00", "-11.32"] in rows
