"""benchmarks/llm: prompts, answers, tokens, settings, tables. The cells themselves: test_bench_llm_tiny.py."""

from __future__ import annotations

import hashlib
import json
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.frame.store import Store
from benchmarks.frame.sweep import plan
from benchmarks.llm import answers, code_tasks, commonsense, prompts
from benchmarks.llm.bases import check_base
from benchmarks.llm.evaluation import Evaluation
from benchmarks.llm.recipes import IGNORE, TEXTS, examples, fingerprint, tokenise
from benchmarks.llm.settings import Adapter, Data, Settings, check
from benchmarks.llm.stages import stages
from benchmarks.llm.suites import check_stock
from benchmarks.llm.tables import tables
from benchmarks.llm.tiny import _wrong, questions, tokenizer, training_examples
from benchmarks.llm.training import Training, _keep_logs, adapter_config
from tests.llm_records import evaluation, preset, write_commonsense


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
            ("The answer is: 7 The answer is: 8", 8),
            ("The answer is: 7/2", 4),
            ("The answer is: 7/0", 7),
            ("The answer is: .6", 1),
            (f"The answer is: {'9' * 400}", None),
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
        assert answers.code("def h(n):\n    assert n\n    return n") == "def h(n):\n"
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
        assert {"".join(sorted(choice)) for choice in row["choices"]} == {"".join(sorted(digits))}, (
            "no digit gives it away"
        )
        assert len({*_wrong("1111", random.Random(0)), "1111"}) == 4


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
        trainings = [cell for cell in cells if isinstance(cell, Training)]
        for cell in trainings:  # 16 layers of Llama-3.2-1B: in and out of q, k, v, o, gate, up, down, in float32
            sizes = {"q_proj": 4096, "k_proj": 2560, "v_proj": 2560, "o_proj": 4096}
            per_layer = sum(sizes.get(name, 10240) for name in cell.adapter.target_modules)
            assert cell.megabytes == pytest.approx(16 * per_layer * cell.adapter.rank * 4 / 1e6, rel=0.01)
        # per recipe: three modes at three rates, at two more seeds; and LoRA again on the target, at three seeds
        assert len(trainings) == 3 * (3 * 3 + 3 * 2 + 3)

    def test_machines_and_places_do_not_change_names(self, tmp_path: Path) -> None:
        plain, other = (
            {cell.name for cell in plan(stages, settings, Store(tmp_path)).cells}
            for settings in (preset("paper"), preset("paper", "--machine.micro_batch", "4", "--data.commonsense", "x"))
        )
        assert plain == other

    def test_other_data_are_other_cells(self, tmp_path: Path) -> None:
        plain, other = (
            {cell.name for cell in plan(stages, settings, Store(tmp_path)).cells}
            for settings in (preset("small"), preset("small", "--data.pissa", "my/own", "--data.gsm8k", "my/gsm8k"))
        )
        assert not plain & other

    def test_code_that_was_written_is_run_when_that_is_asked_for(self, tmp_path: Path) -> None:
        written, scored = (
            plan(stages, preset("paper", *arguments), Store(tmp_path)).cells
            for arguments in ((), ("--machine.run_code", "[sandbox, '{folder}']"))
        )
        before = {cell.name for cell in written}
        assert before < {cell.name for cell in scored}
        added = [needed.name for cell in scored if cell.name not in before for needed in cell.needs()]
        assert added == [cell.name for cell in written if isinstance(cell, Evaluation) and cell.writes_code()]

    def test_two_revisions_of_a_model_are_two_models(self, tmp_path: Path) -> None:
        settings = preset("small", "--source", "m", "--targets", "[m]", "--target_revisions", "[later]")
        cells = [cell for cell in plan(stages, settings, Store(tmp_path)).cells if isinstance(cell, Evaluation)]
        assert {cell.base() for cell in cells} == {"m in bfloat16", "m at later in bfloat16"}
        records = []
        for revision, value in ((None, 0.2), ("later", 0.4)):
            record = json.loads(json.dumps(evaluation("gsm8k", value, side=0, mode="lora")))
            record["settings"]["target"] = {"name": "m", "revision": revision, "made": None}
            record["settings"]["training"]["base_model"] = {"name": "m", "revision": None, "made": None}
            records.append(record)
        (table, *_) = tables(settings, records)
        assert table.rows == [["m", "lora", "20.00"], ["m at later", "lora copy", "40.00"]]

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
            (replace(tiny, retrain=("dora-input",)), "add it to modes"),
            (with_task(schedule=replace(task.schedule, evaluate_every=0)), "evaluate_every"),
            (with_task(adapter=replace(task.adapter, feature_rank=9)), "feature_rank = 9 of rank = 8"),
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
        monkeypatch.setattr(code_tasks, "find_spec", lambda name: None)
        tiny = preset("tiny")
        with pytest.raises(ValueError, match=r"pip install evalplus==0\.3\.1"):
            check(replace(tiny, tasks={"sorting": replace(tiny.tasks["sorting"], paper=("mbpp",))}))

    def test_evalplus_scores_no_parts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(code_tasks, "find_spec", lambda name: True)
        tiny = preset("tiny", "--limit", "5")
        with pytest.raises(ValueError, match="limit = 5 does not go with it"):
            check(replace(tiny, tasks={"sorting": replace(tiny.tasks["sorting"], paper=("mbpp",))}))

    def test_lm_eval_s_tasks_are_looked_up_before_anything_is_trained(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("lm_eval")
        import lm_eval.tasks

        few = lm_eval.tasks.TaskManager(include_defaults=False)  # its own takes seconds to read
        monkeypatch.setattr(type(few), "all_subtasks", property(lambda self: ["arc_easy", "gsm8k"]))
        monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda: few)
        check_stock(["arc_easy", "sort_descending"])
        with pytest.raises(ValueError, match="did you mean 'arc_easy'"):
            check_stock(["arc_eazy"])
        monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
        with pytest.raises(ValueError, match=r"xadapt\[eval\]"):
            check_stock([])


def test_tensorboard_s_files_stay(tmp_path: Path) -> None:
    (tmp_path / "trainer" / "runs" / "now").mkdir(parents=True)
    (tmp_path / "trainer" / "runs" / "now" / "events").write_text("loss")
    _keep_logs(tmp_path / "trainer", tmp_path / "trackers")
    assert (tmp_path / "trackers" / "now" / "events").read_text() == "loss"
    _keep_logs(tmp_path / "trainer", tmp_path / "trackers")
