"""The cells of a preset: learning rates first, on the source alone; then every adapter; then what all of them do where."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from benchmarks.frame.cell import Cell, Result
from benchmarks.frame.sweep import Finished
from benchmarks.llm.bases import TINY, Base, Made
from benchmarks.llm.code_tasks import Scoring
from benchmarks.llm.evaluation import Evaluation
from benchmarks.llm.settings import Mode, Recipe, Settings, Suite, Task
from benchmarks.llm.training import Training


def stages(settings: Settings, finished: Finished) -> Iterator[Sequence[Cell]]:
    """Generator of the groups of cells; see benchmarks/frame/sweep.py."""
    yield [
        candidate
        for recipe in settings.tasks
        for mode in settings.modes
        for candidate in _candidates(settings, recipe, mode)
    ]
    for recipe, task in settings.tasks.items():
        best = {mode: finished.best(_candidates(settings, recipe, mode), _validation_loss) for mode in settings.modes}
        rates = {mode: cell.learning_rate for mode, cell in best.items() if cell}  # without the modes that all failed
        for seed in settings.seeds:
            trained = {mode: _training(settings, recipe, mode, rate, seed) for mode, rate in rates.items()}
            evaluations = _evaluations(settings, task, trained, seed)
            yield [*evaluations, *_scorings(settings, evaluations)]


def _candidates(settings: Settings, recipe: Recipe, mode: Mode) -> list[Training]:
    return [
        _training(settings, recipe, mode, rate, settings.seeds[0]) for rate in settings.tasks[recipe].learning_rates
    ]


def _validation_loss(result: Result) -> float:
    loss: float = result["validation_loss"]
    return loss


def _training(settings: Settings, recipe: Recipe, mode: Mode, learning_rate: float, seed: int) -> Training:
    task = settings.tasks[recipe]
    return Training(
        base_model=source(settings, seed),
        recipe=recipe,
        mode=mode,
        adapter=task.adapter,
        schedule=task.schedule,
        learning_rate=learning_rate,
        seed=seed,
        examples=settings.tiny.examples if recipe == "sorting" else 0,
        data=settings.data,
        machine=settings.machine,
        hours=task.hours,
        megabytes=task.megabytes,
    )


def _evaluations(settings: Settings, task: Task, trained: dict[Mode, Training], seed: int) -> list[Evaluation]:
    """Bare source and targets, every adapter on all of them, and what was trained on a target there."""
    asked: list[tuple[Suite, str]] = [
        *(("paper", name) for name in task.paper),
        *(("lm-eval", name) for name in task.lm_eval),
    ]
    home, abroad = source(settings, seed), targets(settings, seed)
    pairs: list[tuple[Base, Training | None]] = [(base, None) for base in (home, *abroad)]
    pairs += [(base, training) for base in (home, *abroad) for training in trained.values()]
    pairs += [
        (base, replace(trained[mode], base_model=base))
        for base in abroad
        for mode in settings.retrain
        if mode in trained
    ]
    return [
        Evaluation(
            target=base,
            training=training,
            suite=suite,
            task=name,
            dtype=task.schedule.dtype,
            limit=settings.limit,
            lines=settings.tiny.test_lines if base.made else 0,
            data=settings.data,
            machine=settings.machine,
            hours=task.evaluation_hours,
        )
        for base, training in pairs
        for suite, name in asked
    ]


def _scorings(settings: Settings, evaluations: Sequence[Evaluation]) -> list[Scoring]:
    """What runs the code that was written, if that is asked for."""
    command = settings.machine.run_code
    return [Scoring(written=each, command=command) for each in evaluations if each.writes_code() and command]


def source(settings: Settings, seed: int) -> Base:
    """The base that adapters are trained on."""
    return _base(settings, settings.source, settings.source_revision, seed)


def targets(settings: Settings, seed: int) -> list[Base]:
    """The bases that they are carried to."""
    pairs = zip(settings.targets, settings.revisions(), strict=True)
    return [_base(settings, name, revision, seed) for name, revision in pairs]


def _base(settings: Settings, name: str, revision: str | None, seed: int) -> Base:
    if not name.startswith(TINY):
        return Base(name=name, revision=revision)
    tiny = settings.tiny
    return Base(name=name, made=Made(seed=seed, pretrain_steps=tiny.pretrain_steps, drift_steps=tiny.drift_steps))
