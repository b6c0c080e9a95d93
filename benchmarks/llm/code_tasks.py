"""HumanEval and MBPP by EvalPlus: the model writes, EvalPlus scores in a sandbox, and nothing is run unless asked for."""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.frame.cell import Result
from benchmarks.llm import answers, prompts

if TYPE_CHECKING:
    from benchmarks.frame.worker import Worker

SANDBOX = "docker run --rm --network none -v {folder}:/app ganler/evalplus:latest evalplus.evaluate --dataset {dataset} --samples /app/samples.jsonl"


def write_and_score(task: str, lm: Any, limit: int | None, run_code: Sequence[str], worker: Worker) -> Result:
    """`samples.jsonl` among the cell's files; rows only where `run_code` was given. Greedy, 1024 tokens.

    `run_code` is the command of a sandbox; it runs code that a language model wrote, and prints pass@1 as EvalPlus does.
    """
    problems = list(_problems(task).items())[:limit]
    from lm_eval.api.instance import Instance

    generation = {"until": [], "max_gen_toks": 1024, "do_sample": False}
    requests = [
        Instance("generate_until", {}, (prompts.plain(problem["prompt"]), generation), index)
        for index, (_, problem) in enumerate(problems)
    ]
    written = lm.generate_until(requests)
    lines = [
        json.dumps({"task_id": name, "solution": answers.code(text)})
        for (name, _), text in zip(problems, written, strict=True)
    ]
    (worker.out / "samples.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if not run_code:
        return {"rows": [], "note": f"written and not run: give --machine.run_code, for example {shlex.split(SANDBOX)}"}
    return {"rows": score(task, run_code, worker)}


def score(task: str, run_code: Sequence[str], worker: Worker) -> list[dict[str, Any]]:
    """What the sandbox prints as pass@1, without and with EvalPlus's additional tests."""
    command = [part.format(folder=worker.out, dataset=task) for part in run_code]
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


def _problems(task: str) -> dict[str, dict[str, Any]]:
    try:
        from evalplus.data import get_human_eval_plus, get_mbpp_plus
    except ModuleNotFoundError:
        raise ValueError(
            f"{task} needs EvalPlus: pip install evalplus==0.3.1, or leave {task} out of the preset."
        ) from None
    found: dict[str, dict[str, Any]] = get_human_eval_plus() if task == "humaneval" else get_mbpp_plus()
    return found
