"""benchmarks/llm: the two suites, and what they say as rows."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.frame.store import Store
from benchmarks.frame.sweep import plan
from benchmarks.frame.worker import Worker, execute
from benchmarks.llm import code_tasks, prompts
from benchmarks.llm.evaluation import Evaluation, tabled
from benchmarks.llm.recipes import examples
from benchmarks.llm.settings import Data
from benchmarks.llm.stages import stages
from benchmarks.llm.suites import _paper, opened
from benchmarks.llm.tables import PAPER_PAIR, gather
from benchmarks.llm.tiny import questions, tokenizer
from tests.llm_records import preset, write_commonsense


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
