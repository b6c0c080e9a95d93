"""One evaluation: one adapter, or none, on one model, one task of one suite."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from benchmarks.frame.cell import HOW, Cell, Estimate, Result, how
from benchmarks.llm.bases import Base, device, load
from benchmarks.llm.settings import Data, Dtype, Machine, Suite
from benchmarks.llm.suites import CODE, lm_eval_task
from benchmarks.llm.training import Training

if TYPE_CHECKING:
    from benchmarks.frame.worker import Worker


@dataclass(frozen=True, kw_only=True)
class Evaluation(Cell):
    """Its result holds a row per metric, and for every question whether it was answered rightly, for paired differences."""

    packages = ("lm-eval", "accelerate", "datasets")

    target: Base
    training: Training | None  # None is the bare model
    suite: Suite
    task: str
    dtype: Dtype
    limit: int | None = None
    lines: int = 0  # of a generated task
    data: Data = field(default_factory=Data, metadata=HOW)
    machine: Machine = field(default_factory=Machine, metadata=HOW)
    hours: float = how(0.0)

    def needs(self) -> tuple[Cell, ...]:
        return (*self.target.cells(), *((self.training,) if self.training else ()))

    def process_count(self) -> int:
        return 1 if self._writes_code() else self.machine.evaluation_processes  # one file of samples

    def estimate(self) -> Estimate:
        return Estimate(hours=self.hours, megabytes=0.1)

    def base(self) -> str:
        return f"{self.target.label()} in {self.dtype}"

    def describe(self) -> str:
        adapter = self.training.describe() if self.training else "bare"
        return f"{self.suite}: {self.task} on {self.target.label()}: {adapter}"

    def run(self, worker: Worker) -> Result:
        if self.suite == "lm-eval" and self.machine.backend == "vllm":
            from benchmarks.llm.vllm import language_model

            with language_model(self, worker) as lm:
                return self._scored(lm, worker)
        model, tokenizer = worker.base(self.base(), lambda: load(self.target, self.dtype, worker))
        with self._adapted(model, worker) as adapted:
            lm = _hflm(adapted, tokenizer, self.machine.evaluation_batch)
            if self._writes_code():
                from benchmarks.llm.code_tasks import write_and_score

                return write_and_score(self.task, lm, self.limit, self.machine.run_code, worker)
            return self._scored(lm, worker)

    def _writes_code(self) -> bool:
        return self.suite == "paper" and self.task in CODE

    @contextmanager
    def _adapted(self, model: Any, worker: Worker) -> Iterator[Any]:
        """The base with the adapter on it; the base as it was, afterwards."""
        if self.training is None:
            yield model
            return
        import xadapt

        adapted = xadapt.load(model, worker.artifacts(self.training) / "adapter").eval()
        yield adapted
        adapted.unload()  # after an error the worker drops the base altogether

    def _scored(self, lm: Any, worker: Worker) -> Result:
        from lm_eval import evaluator

        found = evaluator.evaluate(
            lm=lm,
            task_dict=lm_eval_task(self.suite, self.task, self.data, self.lines, worker),
            limit=self.limit,
            bootstrap_iters=0,
            log_samples=True,
        )
        if found is None:  # a process that only helps
            return {}
        ((name, scores),) = found["results"].items()
        metrics = {
            key.partition(",")[0]: float(value)
            for key, value in scores.items()
            if "," in key and "_stderr" not in key and isinstance(value, int | float)
        }
        samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
        metric = primary(metrics)
        rows = [{"metric": each, "value": value, "primary": each == metric} for each, value in metrics.items()]
        return {"rows": rows, "questions": len(samples), "right": [float(sample[metric]) for sample in samples]}


def primary(metrics: dict[str, float]) -> str:
    """The metric that tables show: normalised by length where lm-eval gives that."""
    for name in ("accuracy", "acc_norm", "acc", "exact_match"):
        if name in metrics:
            return name
    return next(iter(metrics))


def _hflm(model: Any, tokenizer: Any, batch: int) -> Any:
    """lm-eval's view of a live model, sharing its questions with the other processes of this cell, if there are any."""
    import logging

    from accelerate import Accelerator
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of each thing that is done on purpose here
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch, device=str(device()))
    accelerator = Accelerator(cpu=device().type == "cpu")
    if accelerator.num_processes > 1:
        # For a live model HFLM assumes a single process. These three are what its own distributed set-up sets
        # (lm-eval 0.4.13); a test holds that two processes find what one finds.
        lm.accelerator, lm._rank, lm._world_size = accelerator, accelerator.process_index, accelerator.num_processes
    return lm
