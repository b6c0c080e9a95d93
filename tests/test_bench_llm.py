"""benchmarks/llm: prompts, answers, tokens, settings, tables. The cells themselves: test_bench_llm_tiny.py."""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.frame.settings import override, read_preset
from benchmarks.frame.store import Store
from benchmarks.frame.sweep import plan
from benchmarks.frame.worker import Worker, execute
from benchmarks.llm import answers, code_tasks, commonsense, prompts
from benchmarks.llm.__main__ import DRIVER
from benchmarks.llm.bases import check_base
from benchmarks.llm.evaluation import Evaluation, tabled
from benchmarks.llm.recipes import IGNORE, TEXTS, examples, fingerprint, tokenise
from benchmarks.llm.settings import Adapter, Data, Settings, check
from benchmarks.llm.stages import stages
from benchmarks.llm.suites import _paper, check_stock, opened
from benchmarks.llm.tables import PAPER_PAIR, gather, tables
from benchmarks.llm.tiny import _wrong, questions, tokenizer, training_examples
from benchmarks.llm.training import Training, _keep_logs, adapter_config


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
        printed = "humaneval (base tests)\\npass@1:\\t0.213\\nhumaneval+ (base + extra tests)\\npass@1:\\t0.189"
        found = code_tasks.score("humaneval", (sys.executable, "-c", f'print("{printed}")', "{folder}"), tmp_path)
        assert [(row["metric"], row["value"]) for row in found] == [("pass@1 base", 0.213), ("pass@1 plus", 0.189)]
        with pytest.raises(RuntimeError, match="status 3"):
            code_tasks.score("humaneval", (sys.executable, "-c", "raise SystemExit(3)"), tmp_path)
        with pytest.raises(RuntimeError, match="no pass@1"):
            code_tasks.score("humaneval", (sys.executable, "-c", "print(1)"), tmp_path)

    def test_a_sandbox_gets_a_copy_of_what_was_written(self, tmp_path: Path) -> None:
        store = Store(tmp_path)
        (written, *_) = (
            cell
            for cell in plan(stages, preset("paper"), store).cells
            if isinstance(cell, Evaluation) and cell.writes_code()
        )
        program = "import pathlib, sys; print('pass@1:', pathlib.Path(sys.argv[1], 'samples.jsonl').read_text())"
        cell = code_tasks.Scoring(written=written, command=(sys.executable, "-c", program, "{folder}"))
        assert execute(cell, Worker(store)).state == "blocked"
        store.put(written, {"rows": []}, 1.0)
        store.artifacts(written).mkdir(parents=True)
        (store.artifacts(written) / "samples.jsonl").write_text("0.5")
        assert execute(cell, Worker(store)).state == "done", store.failure(cell)
        assert store.result(cell) == {"rows": [{"metric": "pass@1 base", "value": 0.5, "primary": True}]}
        record = store.record(cell)
        assert record is not None
        ((key, scores),) = gather([record], PAPER_PAIR[0]).items()
        assert key == ("paper", "", PAPER_PAIR[0], "bare", written.task)
        assert scores.by_seed == {None: 50.0}


class TestLmEval:
    """Where lm-eval's defaults would give other figures."""

    @staticmethod
    def model() -> tuple[Any, Any]:
        """Random weights, scaled up so that texts end early and late."""
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        characters: Any = tokenizer()
        characters.padding_side = "left"
        config = LlamaConfig(
            vocab_size=len(characters),
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            initializer_range=0.3,
            eos_token_id=characters.eos_token_id,
            pad_token_id=characters.pad_token_id,
        )
        return LlamaForCausalLM(config).eval(), characters

    @pytest.mark.parametrize("batch", [1, 16])
    def test_beams_are_those_of_transformers(self, batch: int) -> None:
        pytest.importorskip("lm_eval")
        from lm_eval.api.instance import Instance

        from benchmarks.llm.live import live

        model, characters = self.model()
        asked = [row["question"] for row in questions("pretrained", 16)]
        settings = {"until": [], "max_gen_toks": 24, "do_sample": False, "num_beams": 4}
        requests = [Instance("generate_until", {}, (text, settings), index) for index, text in enumerate(asked)]
        found = live(model, characters, batch).generate_until(requests, disable_tqdm=True)
        for text, answer in zip(asked, found, strict=True):
            tokens = characters(text, return_tensors="pt")
            prompt = {key: tokens[key] for key in ("input_ids", "attention_mask")}
            whole = model.generate(**prompt, num_beams=4, do_sample=False, max_new_tokens=24)[0]
            assert answer == characters.decode(whole[tokens["input_ids"].shape[1] :], skip_special_tokens=True)

    def test_examples_in_prompts_are_the_same_every_time(self) -> None:
        pytest.importorskip("lm_eval")
        import datasets
        from lm_eval import evaluator
        from lm_eval.tasks import TaskManager

        from benchmarks.llm.live import live

        rows = datasets.Dataset.from_list([{"q": row["question"]} for row in questions("pretrained", 40)])
        task = {
            "task": "few",
            "custom_dataset": lambda **_: datasets.DatasetDict(test=rows, train=rows),
            "test_split": "test",
            "fewshot_split": "train",
            "num_fewshot": 3,
            "output_type": "generate_until",
            "doc_to_text": "{{q}}",
            "doc_to_target": "1",
            "generation_kwargs": {"until": ["."], "max_gen_toks": 2, "do_sample": False},
            "filter_list": [
                {"name": name, "filter": [{"function": "regex", "regex_pattern": pattern}, {"function": "take_first"}]}
                for name, pattern in (("strict", "(x)"), ("flexible", "(.)"))
            ],
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
            "metadata": {"version": 1},
        }
        lm = live(*self.model(), 8)
        manager = TaskManager(include_defaults=False)
        first, second = (
            evaluator.evaluate(lm=lm, task_dict=opened(manager, task), limit=3, bootstrap_iters=0, log_samples=True)
            for _ in range(2)
        )
        prompts_of = [[sample["arguments"] for sample in found["samples"]["few"]] for found in (first, second)]
        assert prompts_of[0] == prompts_of[1]
        found = tabled(first["results"]["few"], first["samples"]["few"])
        assert found["questions"] == len(found["right"]) == 3, "each question once, though there are two filters"
        assert [(row["metric"], row["filter"], row["primary"]) for row in found["rows"]] == [
            ("exact_match", "strict", True),
            ("exact_match", "flexible", False),
        ]
        assert found["data"] == tabled(second["results"]["few"], second["samples"]["few"])["data"]


def test_tensorboard_s_files_stay(tmp_path: Path) -> None:
    (tmp_path / "trainer" / "runs" / "now").mkdir(parents=True)
    (tmp_path / "trainer" / "runs" / "now" / "events").write_text("loss")
    _keep_logs(tmp_path / "trainer", tmp_path / "trackers")
    assert (tmp_path / "trackers" / "now" / "events").read_text() == "loss"
    _keep_logs(tmp_path / "trainer", tmp_path / "trackers")


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
