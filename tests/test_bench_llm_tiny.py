"""benchmarks/llm end to end on the models of the preset tiny, trained for a few steps: the code path of every preset."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import xadapt
from benchmarks.frame.driver import main
from benchmarks.frame.settings import override, read_preset
from benchmarks.frame.store import Store
from benchmarks.frame.sweep import plan
from benchmarks.frame.worker import Worker, execute
from benchmarks.llm.__main__ import DRIVER
from benchmarks.llm.bases import load
from benchmarks.llm.evaluation import Evaluation
from benchmarks.llm.settings import Machine, Settings
from benchmarks.llm.stages import stages
from benchmarks.llm.training import Training

pytest.importorskip("lm_eval", reason="lm-eval is an extra: pip install xadapt[eval]")
FEW_STEPS = [
    *("--seeds", "[0]", "--modes", "[lora, output]", "--retrain", "[]", "--targets", "[tiny/rot]"),
    *("--tiny.pretrain_steps", "150", "--tiny.test_lines", "24", "--tiny.examples", "400"),
    *("--tasks.sorting.learning_rates", "[1e-2]", "--tasks.sorting.schedule.max_steps", "6"),
    *("--tasks.sorting.schedule.evaluate_every", "3", "--tasks.sorting.schedule.validation", "32"),
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run in which everything has finished."""
    out = tmp_path_factory.mktemp("llm")
    assert main(DRIVER, ["tiny", *FEW_STEPS, "--out", str(out)]) == 0
    return out


@pytest.fixture
def evaluations(finished: Path) -> list[Evaluation]:
    settings: Settings = override(read_preset(Settings, DRIVER.presets / "tiny.toml"), {}, FEW_STEPS, "llm")[0]
    cells = plan(stages, settings, Store(finished)).cells
    return [cell for cell in cells if isinstance(cell, Evaluation)]


def test_the_tables_hold_everything(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (finished / "tiny.md").read_text()
    paper, lm_eval = "## sorting: the paper's evaluation", "## sorting: lm-eval's own tasks"
    assert paper in text
    assert lm_eval in text
    for row, count in {  # once in the scores of each suite, and once in its differences to the copy
        "| tiny/source | bare |": 4,
        "| tiny/rot | bare |": 4,
        "| tiny/rot | lora copy |": 2,
        "| tiny/rot | output |": 4,
    }.items():
        assert text.count(row) == count, row
    assert (finished / "tiny.html").read_text().count("<svg") == 3, "a plot for each suite and task"
    assert not (finished / "failed").exists()
    capsys.readouterr()
    assert main(DRIVER, ["tiny", *FEW_STEPS, "--out", str(finished)]) == 0
    assert "done in" not in capsys.readouterr().out


def test_a_training_leaves_an_adapter_and_nothing_else(finished: Path) -> None:
    for folder in (finished / "artifacts").glob("training-*"):
        assert [path.name for path in folder.iterdir()] == ["adapter"]
        assert {path.name for path in (folder / "adapter").iterdir()} >= {"adapter_config.json"}


def test_the_base_is_as_it_was_after_an_adapter(finished: Path, evaluations: list[Evaluation]) -> None:
    worker = Worker(Store(finished))
    cell = next(cell for cell in evaluations if cell.training and cell.training.mode == "output")
    model, _ = worker.base(cell.base(), lambda: load(cell.target, cell.dtype, worker))
    tokens = torch.arange(12).reshape(1, 12)
    before, names = model(tokens).logits, [name for name, _ in model.named_modules()]
    cell.run(worker)
    assert torch.equal(model(tokens).logits, before)
    assert [name for name, _ in model.named_modules()] == names


@pytest.mark.parametrize(("suite", "task"), [("paper", "pretrained"), ("lm-eval", "sort_descending")])
def test_two_processes_find_what_one_finds(
    finished: Path, evaluations: list[Evaluation], suite: str, task: str
) -> None:
    store = Store(finished)
    cell = next(
        cell
        for cell in evaluations
        if cell.suite == suite and cell.task == task and cell.training and cell.target.name == "tiny/source"
    )
    alone = store.result(cell)
    assert alone is not None
    assert 0 < sum(alone["right"]) < alone["questions"] == 24, "a model that knows something, and not everything"
    together = replace(cell, machine=Machine(evaluation_processes=2, evaluation_batch=4))
    assert together.name == cell.name
    (finished / "cells" / f"{cell.name}.json").unlink()
    outcome = execute(together, Worker(store, quiet=True))
    assert outcome.state == "done", store.failure(cell)
    found = store.result(cell)
    assert found is not None
    assert found["right"] == alone["right"]
    assert found["rows"] == [{**row, "value": pytest.approx(row["value"], abs=1e-12)} for row in alone["rows"]]


def test_two_processes_train_one_adapter(finished: Path, evaluations: list[Evaluation], tmp_path: Path) -> None:
    cell = next(cell.training for cell in evaluations if cell.training)
    together = replace(cell, machine=replace(cell.machine, training_processes=2))
    store = Store(finished)
    worker = Worker(store, quiet=True)
    worker.out = tmp_path
    from benchmarks.frame.launch import run_together

    alone, found = store.result(cell), run_together(together, worker)
    assert alone is not None
    assert found["steps"] == alone["steps"]
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    # the same examples in other batches: no equal figures, but of one size
    assert found["validation_loss"] == pytest.approx(alone["validation_loss"], rel=0.2)


def test_checkpointing_and_accumulation_change_nothing(
    finished: Path, evaluations: list[Evaluation], tmp_path: Path
) -> None:
    cell = next(cell.training for cell in evaluations if cell.training)
    store = Store(finished)
    worker = Worker(store, quiet=True)
    worker.out = tmp_path
    machine = replace(cell.machine, micro_batch=8, gradient_checkpointing=True)
    alone = store.result(cell)
    assert alone is not None
    assert cell.schedule.batch == 32
    found = replace(cell, machine=machine).run(worker)
    assert found["steps"] == alone["steps"]
    assert found["validation_loss"] == pytest.approx(alone["validation_loss"], rel=1e-3)


class TestVllm:
    def test_it_says_what_is_missing(
        self, finished: Path, evaluations: list[Evaluation], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import sys

        monkeypatch.setitem(sys.modules, "vllm", None)
        cell = next(cell for cell in evaluations if cell.suite == "lm-eval")
        with pytest.raises(ValueError, match="pip install vllm"):
            replace(cell, machine=Machine(backend="vllm")).run(Worker(Store(finished)))

    def test_the_export_is_the_adapter(self, finished: Path, evaluations: list[Evaluation], tmp_path: Path) -> None:
        from peft import PeftModel

        from benchmarks.llm.vllm import exported

        worker = Worker(Store(finished))
        cell = next(
            c for c in evaluations if c.training and c.training.mode == "output" and c.target.name == "tiny/rot"
        )
        assert isinstance(cell.training, Training)
        told = exported(cell, worker, tmp_path)
        assert told["max_lora_rank"] == 8

        def logits(adapted: Any) -> torch.Tensor:
            return adapted.eval()(torch.arange(12).reshape(1, 12)).logits

        ours = logits(xadapt.load(load(cell.target, "float32", worker)[0], worker.artifacts(cell.training) / "adapter"))
        bare = logits(load(cell.target, "float32", worker)[0])
        stock = logits(PeftModel.from_pretrained(load(cell.target, "float32", worker)[0], told["lora_local_path"]))
        torch.testing.assert_close(stock, ours, rtol=1e-4, atol=1e-4)
        assert (stock - bare).abs().max() > 1e-2


def test_a_failed_training_takes_along_what_hangs_on_it_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["tiny", *FEW_STEPS, "--out", str(tmp_path), "--tiny.pretrain_steps", "1"]
    assert main(DRIVER, [*arguments, "--tasks.sorting.adapter.target_modules", "['no_such_layer']"]) == 1
    assert "no_such_layer" in capsys.readouterr().out
    failures = list((tmp_path / "failed").glob("training-*.json"))
    assert len(failures) == 2
    assert "Traceback" in failures[0].read_text()
    text = (tmp_path / "tiny.md").read_text()
    assert "evaluation" in {path.name.partition("-")[0] for path in (tmp_path / "cells").iterdir()}, "the bare models"
    assert "8 cells" in text
