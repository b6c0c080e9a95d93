"""HumanEval and MBPP by EvalPlus: the model writes, EvalPlus scores in a sandbox, and nothing is run unless asked for."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.frame.cell import Cell, Estimate, Result, how
from benchmarks.llm import answers, prompts
from benchmarks.llm.evaluation import Evaluation
from benchmarks.llm.suites import CODE

if TYPE_CHECKING:
    from benchmarks.frame.worker import Worker

SAMPLES = "samples.jsonl"
SANDBOX = "docker run --rm --network none -v {folder}:/app ganler/evalplus:latest evalplus.evaluate --dataset {dataset} --samples /app/samples.jsonl"


@dataclass(frozen=True, kw_only=True)
class Scoring(Cell):
    """The code of an evaluation, run in a sandbox. A cell of its own: a sandbox that fails costs no writing."""

    written: Evaluation
    command: tuple[str, ...] = how(())

    def describe(self) -> str:
        return f"run what was written: {self.written.describe()}"

    def estimate(self) -> Estimate:
        return Estimate(hours=0.05, megabytes=1.0)

    def run(self, worker: Worker) -> Result:
        shutil.copy(worker.artifacts(self.written) / SAMPLES, worker.out)
        return {"rows": score(self.written.task, self.command, worker.out)}


def write(task: str, lm: Any, limit: int | None, worker: Worker) -> Result:
    """`samples.jsonl` among the cell's files. Greedy, 1024 tokens. EvalPlus puts a problem's prompt before its completion."""
    problems = list(_problems(task).items())[:limit]
    from lm_eval.api.instance import Instance

    generation = {"until": [], "max_gen_toks": 1024, "do_sample": False}
    requests = [
        Instance("generate_until", {}, (prompts.plain(problem["prompt"]), generation), index)
        for index, (_, problem) in enumerate(problems)
    ]
    written = lm.generate_until(requests)
    lines = [
        json.dumps({"task_id": name, "completion": answers.code(text)})
        for (name, _), text in zip(problems, written, strict=True)
    ]
    (worker.out / SAMPLES).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {"rows": [], "note": f"written and not run: give --machine.run_code, for example {shlex.split(SANDBOX)}"}


def score(task: str, run_code: Sequence[str], folder: Path) -> list[dict[str, Any]]:
    """What the sandbox prints as pass@1 for the samples in `folder`, without and with EvalPlus's additional tests.

    `run_code` is the command of a sandbox; it runs code that a language model wrote, and prints as EvalPlus does.
    """
    command = [part.replace("{folder}", str(folder)).replace("{dataset}", task) for part in run_code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)} failed with status {done.returncode}:\n{done.stderr[-2000:]}")
    found = pass_at_1(done.stdout)
    if not found:
        raise RuntimeError(f"{shlex.join(command)} printed no pass@1:\n{done.stdout[-2000:]}")
    # The paper does not say which of the two it prints.
    return [
        {"metric": name, "value": value, "primary": index == 0} for index, (name, value) in enumerate(found.items())
    ]


def pass_at_1(output: str) -> dict[str, float]:
    """{"pass@1 base": …, "pass@1 plus": …} out of EvalPlus's output."""
    names = ("pass@1 base", "pass@1 plus")
    values = [float(line.split()[-1]) for line in output.splitlines() if line.strip().startswith("pass@1:")]
    return dict(zip(names, values, strict=False))


def check_installed() -> None:
    """Raises ValueError where EvalPlus is not installed."""
    if find_spec("evalplus") is None:
        raise ValueError(
            f"{' and '.join(CODE)} need EvalPlus: pip install evalplus==0.3.1, or leave them out of the preset."
        )


def _problems(task: str) -> dict[str, dict[str, Any]]:
    check_installed()
    from evalplus.data import get_human_eval_plus, get_mbpp_plus

    found: dict[str, dict[str, Any]] = get_human_eval_plus() if task == "humaneval" else get_mbpp_plus()
    return found
