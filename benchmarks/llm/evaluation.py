"""One evaluation: one adapter, or none, on one model, one task of one suite."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from benchmarks.frame.cell import HOW, Cell, Estimate, Result, how
from benchmarks.llm.bases import Base, load
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
    data: Data = field(default_factory=Data)
    machine: Machine = field(default_factory=Machine, metadata=HOW)
    hours: float = how(0.0)

    def needs(self) -> tuple[Cell, ...]:
        return (*self.target.cells(), *((self.training,) if self.training else ()))

    def process_count(self) -> int:
        alone = self.writes_code() or self._by_vllm()  # one file of samples; vLLM has processes of its own
        return 1 if alone else self.machine.evaluation_processes

    def estimate(self) -> Estimate:
        return Estimate(hours=self.hours, megabytes=0.1)

    def base(self) -> str:
        return f"{self.target.label()} in {self.dtype}"

    def describe(self) -> str:
        adapter = self.training.describe() if self.training else "bare"
        return f"{self.suite}: {self.task} on {self.target.label()}: {adapter}"

    def run(self, worker: Worker) -> Result:
        if self._by_vllm():
            from benchmarks.llm.vllm import language_model

            with language_model(self, worker) as lm:
                return self._scored(lm, worker)
        model, tokenizer = worker.base(self.base(), lambda: load(self.target, self.dtype, worker))
        with self._adapted(model, worker) as adapted:
            from benchmarks.llm.live import live

            lm = live(adapted, tokenizer, self.machine.evaluation_batch)
            if self.writes_code():
                from benchmarks.llm.code_tasks import write

                return write(self.task, lm, self.limit, worker)
            return self._scored(lm, worker)

    def writes_code(self) -> bool:
        """Whether the result is a file of code, which a cell of its own scores if at all."""
        return self.suite == "paper" and self.task in CODE

    def _by_vllm(self) -> bool:
        return self.suite == "lm-eval" and self.machine.backend == "vllm"

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
        return tabled(scores, found["samples"][name])


def tabled(scores: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> Result:
    """lm-eval's scores of one task as rows, and its samples as how far each question was answered rightly, in the order of the questions.

    A task may have several filters, as GSM8K's strict and flexible one. Each has rows of its own; lm-eval's samples then hold
    every question once per filter, and the first filter is the one that tables show and differences are paired by.
    """
    values: dict[str, dict[str, float]] = {}  # filter -> metric -> value
    for key, value in scores.items():
        metric, comma, name = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
            values.setdefault(name, {})[metric] = float(value)
    first = next(iter(values))
    shown = primary(values[first])
    rows = [
        {"metric": metric, "filter": name, "value": value, "primary": (name, metric) == (first, shown)}
        for name, of_filter in values.items()
        for metric, value in of_filter.items()
    ]
    asked = sorted((each for each in samples if each["filter"] == first), key=lambda each: each["doc_id"])
    hashes = "".join(each["prompt_hash"] + each["target_hash"] for each in asked)
    right = [each[shown] for each in asked if isinstance(each.get(shown), int | float)]  # a perplexity has none
    return {
        "rows": rows,
        "questions": len(asked),
        "right": [float(each) for each in right] if len(right) == len(asked) else [],
        "data": hashlib.sha256(hashes.encode()).hexdigest()[:16],
    }


def primary(metrics: dict[str, float]) -> str:
    """The metric that tables show: normalised by length where lm-eval gives that."""
    for name in ("accuracy", "acc_norm", "acc", "exact_match"):
        if name in metrics:
            return name
    return next(iter(metrics))
