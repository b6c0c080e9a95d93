"""benchmarks/llm: prompts, answers, tokens, settings, tables. The cells themselves: test_bench_llm_tiny.py."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.frame.settings import override, read_preset
from benchmarks.frame.store import Store
from benchmarks.frame.sweep import plan
from benchmarks.frame.worker import Worker
from benchmarks.llm import answers, code_tasks, commonsense, prompts
from benchmarks.llm.__main__ import DRIVER
from benchmarks.llm.bases import check_base
from benchmarks.llm.recipes import IGNORE, TEXTS, examples, fingerprint, tokenise
from benchmarks.llm.settings import Adapter, Data, Settings, check
from benchmarks.llm.stages import stages
from benchmarks.llm.suites import _paper
from benchmarks.llm.tables import PAPER_PAIR, tables
from benchmarks.llm.tiny import questions, tokenizer, training_examples
from benchmarks.llm.training import adapter_config


def preset(name: str, *arguments: str) -> Settings:
    settings: Settings = read_preset(Settings, DRIVER.presets / f"{name}.toml")
    return override(settings, {}, arguments, "llm")[0]


class TestPrompts:
    @pytest.mark.parametrize(
        ("prompt", "digest"),
        [
            (prompts.commonsense_training, "237a437520bc1ffb"),
            (prompts.commonsense_evaluation, "f057f5a4b3dcb308"),
            (prompts.plain, "35101bc36d10997c"),
        ],
    )
    def test_not_a_character_has_changed(self, prompt: Any, digest: str) -> None:
        assert hashlib.sha256(prompt("{instruction}").encode()).hexdigest()[:16] == digest

    def test_blanks(self) -> None:
        training, evaluation = prompts.commonsense_training("x"), prompts.commonsense_evaluation("x")
        assert "request.  \n\n" in training
        assert f"x\n{' ' * 16}\n{' ' * 16}### Response:\n{' ' * 16}" in training
        assert "request. \n\n" in evaluation
        assert f"x\n\n{' ' * 16}### Response:\n{' ' * 16}" in evaluation


class TestAnswers:
    @pytest.mark.parametrize(
        ("text", "task", "found"),
        [
            ("the correct answer is answer2", "social_iqa", "answer2"),
            ("answer1 ### Response: answer3 answer4", "arc_easy", "answer3"),
            ("the correct answer is True", "boolq", ""),
            ("false, true", "boolq", "false"),
            ("answer6", "openbookqa", ""),
            ("ending4.", "hellaswag", "ending4"),
        ],
    )
    def test_choices(self, text: str, task: str, found: str) -> None:
        assert answers.choice(text, task) == found

    @pytest.mark.parametrize(
        ("text", "found"),
        [
            ("so 3.\nThe answer is: 1,234.0", 1234),
            ("The answer is: $-5 dollars", -5),
            ("The answer is: 7 The answer is: 8", 7),
            ("12", None),
            ("The answer is: none", None),
        ],
    )
    def test_numbers(self, text: str, found: int | None) -> None:
        assert answers.number(text) == found

    def test_gold_numbers(self) -> None:
        assert answers.gsm8k_gold("16 - 3 = <<16-3=13>>13\n#### 1,013") == 1013

    def test_code(self) -> None:
        text = "Here:\n```python\ndef f():\n    return 1\n\nassert f() == 1\n```\nThat is all."
        assert answers.code(text) == "def f():\n    return 1\n"
        assert answers.code('def g(): pass\n\nif __name__ == "__main__":\n    g()') == "def g(): pass\n"


class TestRecipes:
    def test_the_loss_is_on_the_response_or_on_all(self) -> None:
        example, characters = ("R31415>", "51413"), tokenizer()
        on_response = tokenise(example, TEXTS["sorting"], characters, 32)
        assert characters.decode(on_response["input_ids"]) == "R31415>51413."
        assert on_response["labels"][:7] == [IGNORE] * 7
        assert on_response["labels"][7:] == on_response["input_ids"][7:]
        on_all = tokenise(example, TEXTS["commonsense"], characters, 32)
        assert on_all["labels"] == on_all["input_ids"]

    def test_what_is_too_long_is_cut_without_an_end(self) -> None:
        cut = tokenise(("R31415>", "51413"), TEXTS["sorting"], tokenizer(), 9)
        assert len(cut["input_ids"]) == len(cut["labels"]) == len(cut["attention_mask"]) == 9
        assert cut["input_ids"][-1] != tokenizer().eos_token_id

    def test_shuffling_changes_the_order_alone(self) -> None:
        a, b = (examples("sorting", Data(), 50, seed) for seed in (0, 1))
        assert a != b
        assert fingerprint(a) == fingerprint(b)
        assert fingerprint(a) != fingerprint(a[1:])

    def test_no_question_is_in_the_training_data(self) -> None:
        asked = {row["question"] for row in questions("sort_descending", 256)}
        trained = training_examples(9600)
        assert len(trained) == 9600
        assert not asked & {question for question, _ in trained}

    def test_questions_have_one_right_choice(self) -> None:
        for row in questions("pretrained", 40):
            assert row["choices"][row["label"]] == row["answer"]
            assert len(set(row["choices"])) == 4
        (row, *_) = questions("sort_descending", 1)
        digits = row["question"][1:-1]
        assert row["answer"] == "".join(sorted(digits, reverse=True))


class TestAdapters:
    @pytest.mark.parametrize(
        ("mode", "kind"),
        [
            ("lora", "LORA"),
            ("dora", "LORA"),
            ("input", "INPUT_ADA"),
            ("output", "OUTPUT_ADA"),
            ("dora-input", "INPUT_ADA"),
            ("hybrid-output", "HYBRID_ADA"),
        ],
    )
    def test_modes(self, mode: Any, kind: str) -> None:
        config: Any = adapter_config(mode, Adapter(rank=4, alpha=8, feature_rank=2, target_modules=("q_proj",)))
        assert config.peft_type.value == kind
        assert (config.r, config.lora_alpha) == (4, 8)
        assert config.use_dora == mode.startswith("dora")
        if mode == "hybrid-output":
            assert (config.space, config.feature_r) == ("output", 2)


class TestPresets:
    @pytest.mark.parametrize("name", ["paper", "small", "tiny"])
    def test_all_can_be_planned(self, name: str, tmp_path: Path) -> None:
        planned = plan(stages, preset(name), Store(tmp_path))
        assert planned.estimate().hours > 0
        kinds = {cell.kind for cell in planned.cells}
        assert {"training", "evaluation"} <= kinds
        assert all(cell.describe() for cell in planned.cells)

    def test_the_paper_s_cells(self, tmp_path: Path) -> None:
        cells = plan(stages, preset("paper"), Store(tmp_path)).cells
        trainings = [cell for cell in cells if cell.kind == "training"]
        # per recipe: three modes at three rates, at two more seeds; and LoRA again on the target, at three seeds
        assert len(trainings) == 3 * (3 * 3 + 3 * 2 + 3)

    def test_machines_and_places_do_not_change_names(self, tmp_path: Path) -> None:
        plain, other = (
            {cell.name for cell in plan(stages, settings, Store(tmp_path)).cells}
            for settings in (preset("paper"), preset("paper", "--machine.micro_batch", "4", "--data.commonsense", "x"))
        )
        assert plain == other

    def test_one_value_within_a_task(self) -> None:
        settings = preset("tiny", "--tasks.sorting.schedule.max_steps", "7", "--tasks.sorting.adapter.rank=2")
        assert settings.tasks["sorting"].schedule.max_steps == 7
        assert settings.tasks["sorting"].adapter.rank == 2
        with pytest.raises(ValueError, match="did you mean 'max_steps'"):
            preset("tiny", "--tasks.sorting.schedule.max_step", "7")


class TestBadInput:
    def test_settings_that_cannot_run(self) -> None:
        tiny = preset("tiny")
        task = tiny.tasks["sorting"]

        def with_task(**changes: Any) -> Settings:
            return replace(tiny, tasks={"sorting": replace(task, **changes)})

        for settings, message in [
            (replace(tiny, seeds=()), "seeds is empty"),
            (with_task(learning_rates=()), "learning_rates is empty"),
            (with_task(paper=("boolk",)), "did you mean 'boolq'"),
            (with_task(lm_eval=("humaneval_instruct",)), "unprotected"),
            (with_task(schedule=replace(task.schedule, batch=33)), "micro_batch"),
            (replace(tiny, target_revisions=("a",)), "give one each"),
            (replace(tiny, targets=("tiny/ligth",)), "did you mean 'light'"),
        ]:
            with pytest.raises(ValueError, match=message):
                check(settings)

    def test_missing_models(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import huggingface_hub.constants

        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(ValueError, match="no-such/model cannot be opened"):
            check_base("no-such/model")
        with pytest.raises(ValueError, match=r"config\.json"):
            check_base(str(tmp_path))

    def test_missing_commonsense_data(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="git clone"):
            commonsense.check_folder("")
        write_commonsense(tmp_path)
        commonsense.check_folder(str(tmp_path))
        (tmp_path / "dataset" / "ARC-Easy" / "test.json").unlink()
        with pytest.raises(ValueError, match=r"lacks dataset/ARC-Easy/test\.json"):
            commonsense.check_folder(str(tmp_path))
        (tmp_path / commonsense.TRAINING).write_text('[{"question": 1}]')
        with pytest.raises(ValueError, match="another layout"):
            examples("commonsense", Data(commonsense=str(tmp_path)), 0, 0)

    def test_evalplus_is_missing(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setitem(sys.modules, "evalplus.data", None)
        monkeypatch.setitem(sys.modules, "evalplus", None)
        with pytest.raises(ValueError, match=r"pip install evalplus==0\.3\.1"):
            code_tasks.write_and_score("mbpp", None, None, (), Worker(Store(tmp_path)))


def write_commonsense(folder: Path) -> None:
    """The layout of a checkout, with one entry per file."""
    entry = {"instruction": "Is it? Answer format: true/false", "input": "", "output": "the correct answer is true"}
    for path in (commonsense.TRAINING, *map(commonsense.test_file, commonsense.FOLDERS)):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(json.dumps([{**entry, "answer": "true"}]))


class TestPaperSuite:
    def test_commonsense(self, tmp_path: Path) -> None:
        write_commonsense(tmp_path)
        data = Data(commonsense=str(tmp_path))
        ((prompt, response),) = examples("commonsense", data, 0, 0)
        assert response == "the correct answer is true"
        assert prompt == prompts.commonsense_training("Is it? Answer format: true/false")
        task = _paper("boolq", data, 0)
        assert task["generation_kwargs"]["num_beams"] == 4
        row = {"prompt": "p", "gold": "true"}
        scores = [task["process_results"](row, [text])["accuracy"] for text in ("so true", "False", "false or true")]
        assert scores == [1.0, 0.0, 0.0]

    def test_scores_of_code_come_from_the_sandbox(self, tmp_path: Path) -> None:
        worker = Worker(Store(tmp_path))
        worker.out = tmp_path
        printed = "humaneval (base tests)\\npass@1:\\t0.213\\nhumaneval+ (base + extra tests)\\npass@1:\\t0.189"
        found = code_tasks.score("humaneval", (sys.executable, "-c", f'print("{printed}")', "{folder}"), worker)
        assert [(row["metric"], row["value"]) for row in found] == [("pass@1 base", 0.213), ("pass@1 plus", 0.189)]
        with pytest.raises(RuntimeError, match="status 3"):
            code_tasks.score("humaneval", (sys.executable, "-c", "raise SystemExit(3)"), worker)
        with pytest.raises(RuntimeError, match="no pass@1"):
            code_tasks.score("humaneval", (sys.executable, "-c", "print(1)"), worker)


def evaluation(
    task: str, value: float, *, side: int, mode: str | None, seed: int = 0, suite: str = "paper", trained_on: int = 0
) -> Mapping[str, Any]:
    """A record as the store has it, of the paper's pair."""
    base = [{"name": name, "revision": None, "made": None} for name in PAPER_PAIR]
    training = {"base_model": base[trained_on], "recipe": "math", "mode": mode, "seed": seed} if mode else None
    return {
        "kind": "evaluation",
        "settings": {"suite": suite, "task": task, "target": base[side], "training": training},
        "result": {
            "rows": [{"metric": "accuracy", "value": value, "primary": True}],
            "right": [float(index < 100 * value) for index in range(100)],
        },
    }


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
        table = self.of(records)["Table 6 of Revisit Model Adaptation, side by side"]
        assert ["target", "input", "gsm8k", "16.07", "16.00 ± 1.41", "-0.07"] in table.rows
        assert ["target", "bare", "gsm8k", "", "30.00", ""] in table.rows
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

    def test_the_average_needs_all_eight(self) -> None:
        seven = [evaluation(task, 0.5, side=0, mode="lora") for task in list(commonsense.FOLDERS)[:7]]
        assert not any(
            "commonsense_avg" in table.markdown() for title, table in self.of(seven).items() if "math" in title
        )
        eight = [*seven, evaluation("openbookqa", 0.9, side=0, mode="lora")]
        rows = self.of(eight)["Table 6 of Revisit Model Adaptation, side by side"].rows
        assert ["source", "lora", "commonsense_avg", "66.32", "55.00", "-11.32"] in rows
