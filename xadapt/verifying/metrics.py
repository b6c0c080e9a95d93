"""What a user measures by himself: a function of his own, or tasks of lm-eval."""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

from torch import nn

Metric = Callable[[nn.Module], Any]


def metric_from(given: str | Metric) -> Metric:
    """A function from a model to a number, or to several by name; "module:function" is imported, from this folder too.

    Raises:
        ValueError: there is no such function.
    """
    if callable(given):
        return given
    module, found, name = given.partition(":")
    if not found or not module or not name:
        raise ValueError(f"metric={given!r}: write module:function, for example my_metrics:accuracy.")
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        function: Any = getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        raise ValueError(f"metric={given!r}: the module {module!r} cannot be imported ({error}).") from error
    finally:
        sys.path.remove(here)
    if not callable(function):
        raise ValueError(f"metric={given!r}: {module} has no function {name!r}.")
    return function  # type: ignore[no-any-return]  # the user's


def numbers(metric: Metric, model: nn.Module) -> dict[str, float]:
    """What a metric says of a model, by name.

    Raises:
        ValueError: it raises, or returns no number.
    """
    name = getattr(metric, "__name__", "metric")
    try:
        result = metric(model)
    except Exception as error:  # it is the user's code
        raise ValueError(f"The metric {name} failed: {type(error).__name__}: {error}") from error
    found = dict(result) if isinstance(result, Mapping) else {name: result}
    for key, value in found.items():
        if not isinstance(value, Real) or math.isnan(float(value)):
            raise ValueError(
                f"The metric {name} gave {key}={value!r}; it returns a number, or a dict of numbers by name."
            )
    return {str(key): float(value) for key, value in found.items()}


def lm_eval_metric(tasks: Sequence[str], tokenizer: Any, batch: int, limit: int | None = None) -> Metric:
    """A metric that runs lm-eval's tasks: names it knows, or paths of task files (.yaml).

    Raises:
        ValueError: lm-eval is not installed, or there is no tokenizer.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ValueError(
            f"tasks={list(tasks)!r} are run by lm-eval, which is not installed ({error}): pip install 'xadapt[eval]'."
        ) from error
    if tokenizer is None:
        raise ValueError("lm-eval's tasks are text, and the target has no tokenizer beside it: pass tokenizer=….")
    files = [Path(task) for task in tasks if Path(task).suffix in (".yaml", ".yml")]
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise ValueError(f"The task file {missing[0]} is not there.")
    named = [Path(task).stem if Path(task).suffix in (".yaml", ".yml") else task for task in tasks]
    # Its own tasks are thousands of files, which are looked through only where one of them is asked for.
    folders = [str(file.resolve().parent) for file in files]
    manager = TaskManager(include_path=folders or None, include_defaults=len(files) < len(tasks))
    unknown = [task for task in named if task not in manager.all_tasks]
    if unknown:
        raise ValueError(
            f"lm-eval knows no task {unknown[0]!r}: `lm-eval ls tasks` lists what it knows; a file of your own is called as its task is."
        )

    def run(model: nn.Module) -> dict[str, float]:
        harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch)
        told = lm_eval.simple_evaluate(
            model=harness, tasks=list(named), task_manager=manager, limit=limit, log_samples=False, bootstrap_iters=0
        )
        return {
            f"{task} {name.partition(',')[0]}": float(value)
            for task, scores in told["results"].items()
            for name, value in scores.items()
            if isinstance(value, int | float) and "stderr" not in name and "," in name
        }

    run.__name__ = "lm-eval"
    return run
