"""The two suites: the paper's (generate, take the answer out of the text) and lm-eval's (its own tasks). Never in one table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from benchmarks.frame.settings import did_you_mean
from benchmarks.llm import answers, commonsense, prompts
from benchmarks.llm.settings import Data, Task

if TYPE_CHECKING:
    from benchmarks.frame.worker import Worker

LOCAL = ("sort_descending", "pretrained")  # generated, so both suites have them without a network
CODE = ("humaneval", "mbpp")
METRIC = "accuracy"
FEWSHOT_SEED = 1234
"""lm-eval's own default."""


def check_tasks(task: Task) -> None:
    """Raises ValueError for an evaluation of the paper's suite that there is none of, and for code that lm-eval would run."""
    known = (*commonsense.FOLDERS, "gsm8k", *CODE, *LOCAL)
    for name in task.paper:
        if name not in known:
            raise ValueError(
                f"no evaluation {name!r} in the suite paper{did_you_mean(name, known)} There are {', '.join(known)}."
            )
    for name in task.lm_eval:
        if name.startswith(CODE):
            raise ValueError(
                f"lm-eval runs what the model writes for {name} here, unprotected. Take {name.split('_')[0]} of the suite "
                "paper, with --machine.run_code."
            )


def check_stock(names: Sequence[str]) -> None:
    """Raises ValueError where lm-eval is not installed or has no task of that name. Takes seconds: it reads all its tasks."""
    try:
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError:
        raise ValueError("evaluations need lm-eval: pip install 'xadapt[eval]'.") from None
    if not (stock := [name for name in names if name not in LOCAL]):
        return
    known = TaskManager().all_subtasks
    for name in stock:
        if name not in known:
            raise ValueError(
                f"lm-eval has no task {name!r}{did_you_mean(name, known)} `lm-eval ls tasks` lists them; of a group, name its tasks."
            )


def lm_eval_task(suite: str, name: str, data: Data, count: int, worker: Worker) -> Any:
    """The task as lm-eval loads it: `TaskDict`. `count` is the number of lines of a local one."""
    if suite == "paper":
        return opened(_manager(worker, stock=False), _paper(name, data, count))
    if name in LOCAL:
        return opened(_manager(worker, stock=False), _multiple_choice(name, count))
    return opened(_manager(worker, stock=True), name)


def opened(manager: Any, task: str | dict[str, Any]) -> Any:
    """The task, ready for `evaluator.evaluate`, with what lm-eval's `simple_evaluate` does to it before that."""
    found = manager.load([task])
    for each in found["tasks"].values():
        if each.get_config("num_fewshot") is None:
            each.set_config(key="num_fewshot", value=0)
        each.set_fewshot_seed(FEWSHOT_SEED)  # or every call draws other examples
    return found


def _manager(worker: Worker, *, stock: bool) -> Any:
    """One per worker: with lm-eval's own tasks it takes seconds."""
    from lm_eval.tasks import TaskManager

    return worker.shared(f"task manager, stock {stock}", lambda: TaskManager(include_defaults=stock))


def _paper(name: str, data: Data, count: int) -> dict[str, Any]:
    if name in commonsense.FOLDERS:
        rows = commonsense.read(data.commonsense, commonsense.test_file(name), ("instruction", "answer"))
        found = [{"prompt": prompts.commonsense_evaluation(row["instruction"]), "gold": row["answer"]} for row in rows]
        # Beams, and no sampling: the scripts' temperature is without effect.
        return _generate(name, found, lambda text: answers.choice(text, name), stop=[], tokens=32, num_beams=4)
    if name == "gsm8k":
        from datasets import load_dataset

        rows = load_dataset(data.gsm8k, "main", split="test")
        found = [{"prompt": prompts.plain(row["question"]), "gold": answers.gsm8k_gold(row["answer"])} for row in rows]
        return _generate(name, found, answers.number, stop=[], tokens=1024)
    from benchmarks.llm.tiny import questions

    found = [{"prompt": row["question"], "gold": row["answer"]} for row in questions(name, count)]
    return _generate(name, found, lambda text: text.strip(), stop=["."], tokens=8)


def _generate(
    name: str,
    rows: Sequence[dict[str, Any]],
    extract: Callable[[str], Any],
    *,
    stop: Sequence[str],
    tokens: int,
    **generation: Any,
) -> dict[str, Any]:
    """A task that generates from each row's `prompt` and compares what `extract` finds with its `gold`."""

    def score(row: dict[str, Any], results: list[str]) -> dict[str, float]:
        found = extract(results[0])
        return {METRIC: float(found is not None and found == row["gold"])}

    return {
        **_local(f"paper_{name}", rows),
        "output_type": "generate_until",
        "doc_to_text": itemgetter("prompt"),
        "doc_to_target": lambda row: str(row["gold"]),
        "process_results": score,
        "generation_kwargs": {"until": list(stop), "max_gen_toks": tokens, "do_sample": False, **generation},
        "metric_list": [{"metric": METRIC, "aggregation": "mean", "higher_is_better": True}],
    }


def _multiple_choice(name: str, count: int) -> dict[str, Any]:
    from benchmarks.llm.tiny import questions

    return {
        **_local(name, questions(name, count)),
        "output_type": "multiple_choice",
        "doc_to_text": itemgetter("question"),
        "doc_to_choice": itemgetter("choices"),
        "doc_to_target": itemgetter("label"),
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }


def _local(name: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    import datasets

    def load(**_: Any) -> Any:  # lm-eval hands over the task's metadata
        return datasets.DatasetDict(test=datasets.Dataset.from_list(list(rows)))

    return {
        "task": name,
        "custom_dataset": load,
        "test_split": "test",
        "num_fewshot": 0,
        "metadata": {"version": 1},
    }
