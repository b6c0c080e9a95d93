"""The tables: what every adapter does where, beside what the paper prints, and beside the plain copy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from statistics import fmean
from typing import Any

from benchmarks.frame.published import Published, published
from benchmarks.frame.summary import Spread, paired, spread
from benchmarks.frame.tables import Table
from benchmarks.llm.bases import titled
from benchmarks.llm.commonsense import FOLDERS
from benchmarks.llm.settings import Settings

BARE = "bare"
AVERAGE = "commonsense_avg"
PUBLISHED_PAIR = "llama-3.2-1b->llama-3.2-1b-instruct"
PAPER_PAIR = ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B-Instruct")
RECIPES = {"gsm8k": "math", "humaneval": "code", "mbpp": "code"}  # what Table 6 trains on for its other tasks
ADAPTATION = {"lora": "param", "input": "input", "output": "output"}  # ours -> the paper's word
SUITES = {
    "paper": "the paper's evaluation (generation, answer extraction)",
    "lm-eval": "lm-eval's own tasks",
}
Seed = int | None


@dataclass
class Scores:
    """Of one adapter on one base in one task: percent by seed, and right or wrong by seed and question."""

    by_seed: dict[Seed, float] = field(default_factory=dict)
    by_question: dict[tuple[Seed, int], float] = field(default_factory=dict)


Key = tuple[str, str, str, str, str]  # suite, recipe or "", base, adapter, task


def tables(settings: Settings, records: Sequence[Mapping[str, Any]]) -> list[Table]:
    """Per suite: all scores, the differences to the plain copy, and for the paper's pair the published numbers."""
    found = []
    for suite, recipe, shown in scores_of(settings, records):
        title, tasks = f"{recipe}: {SUITES[suite]}", _tasks(shown, recipe)
        found.append(_all_scores(title, shown, tasks, settings))
        found.append(_beside_copy(f"{title}, difference to the plain copy of the LoRA", shown, tasks, settings))
    if (settings.source, *settings.targets) == PAPER_PAIR:
        found += _table_6(gather(records, _titles(settings)[0]), settings)
    return [*found, _learning_rates(records, settings)]


def scores_of(settings: Settings, records: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str, dict[Key, Scores]]]:
    """Suite, recipe, and the scores in the tasks that its adapters were asked: what shares a table."""
    scores = gather(records, _titles(settings)[0])
    for suite in SUITES:
        own = {key: value for key, value in scores.items() if key[0] == suite}
        for recipe in dict.fromkeys(key[1] for key in own if key[1]):
            of_recipe = {key: value for key, value in own.items() if key[1] in (recipe, "")}
            tasks = _tasks(of_recipe, recipe)
            yield suite, recipe, {key: value for key, value in of_recipe.items() if key[4] in tasks}


def lines_of(scores: Mapping[Key, Scores], settings: Settings, task: str) -> list[tuple[str, Spread]]:
    """Model and adapter in words, and what it scores in a task, in the order of the tables."""
    source = _titles(settings)[0]
    found = []
    for base, adapter in _lines(scores, settings):
        if (cell := _find(scores, base, adapter, task)) is not None:
            found.append((f"{base}: {_named(adapter, base, source)}", _spread(cell)))
    return found


def _titles(settings: Settings) -> list[str]:
    """The bases as the tables call them, the source first."""
    names, revisions = (settings.source, *settings.targets), (settings.source_revision, *settings.revisions())
    return [titled(name, revision) for name, revision in zip(names, revisions, strict=True)]


def _title(base: Mapping[str, Any]) -> str:
    return titled(base["name"], base["revision"])


def gather(records: Iterable[Mapping[str, Any]], source: str) -> dict[Key, Scores]:
    """Scores by suite, recipe, base, adapter and task. A recipe's bare rows have no recipe: they are everybody's."""
    found: dict[Key, Scores] = {}
    for record in records:
        if record["kind"] not in ("evaluation", "scoring"):
            continue
        settings, result = record["settings"], record["result"]
        settings = settings.get("written", settings)  # code is written in one cell and run in another
        training, target = settings["training"], settings["target"]
        primary = [row["value"] for row in result["rows"] if row["primary"]]
        if not primary:  # code that was written and not run
            continue
        made = (training or {}).get("seed"), (target["made"] or {}).get("seed")
        seed: Seed = next((each for each in made if each is not None), None)
        recipe, adapter = ("", BARE) if training is None else (training["recipe"], training["mode"])
        if training is not None and _title(training["base_model"]) != source:
            adapter = f"{adapter}, retrained"
        key = (settings["suite"], recipe, _title(target), adapter, settings["task"])
        scores = found.setdefault(key, Scores())
        scores.by_seed[seed] = 100 * primary[0]
        scores.by_question |= {(seed, index): 100 * right for index, right in enumerate(result.get("right", []))}
    return found | _averages(found)


def _averages(scores: Mapping[Key, Scores]) -> dict[Key, Scores]:
    """Over the eight commonsense tasks, where a seed has all of them."""
    found: dict[Key, Scores] = {}
    for suite, recipe, base, adapter in dict.fromkeys(key[:4] for key in scores):
        each = [scores.get((suite, recipe, base, adapter, task), Scores()).by_seed for task in FOLDERS]
        seeds = [seed for seed in each[0] if all(seed in by_seed for by_seed in each)]
        if seeds:
            by_seed = {seed: fmean(one[seed] for one in each) for seed in seeds}
            found[suite, recipe, base, adapter, AVERAGE] = Scores(by_seed)
    return found


def _tasks(scores: Mapping[Key, Scores], recipe: str) -> list[str]:
    """What adapters of the recipe were asked."""
    return list(dict.fromkeys(key[4] for key in scores if key[1] == recipe))


def _all_scores(title: str, scores: Mapping[Key, Scores], tasks: Sequence[str], settings: Settings) -> Table:
    rows = []
    for base, adapter in _lines(scores, settings):
        cells = [_find(scores, base, adapter, task) for task in tasks]
        texts = [_spread(cell).text() if cell else "" for cell in cells]
        rows.append([base, _named(adapter, base, _titles(settings)[0]), *texts])
    counts = {len(value.by_seed) for value in scores.values()}
    seeds = f"{max(counts)} seeds" if max(counts) > 1 else "one seed"
    return Table(
        title,
        ["model", "adapter", *tasks],
        rows,
        [f"Percent right; mean ± sample standard deviation over {seeds} of training. Higher is better."],
    )


def _beside_copy(title: str, scores: Mapping[Key, Scores], tasks: Sequence[str], settings: Settings) -> Table:
    rows = []
    for base, adapter in _lines(scores, settings):
        texts = []
        for task in tasks:
            ours, copy = _find(scores, base, adapter, task), _find(scores, base, "lora", task)
            both = (_questions(ours, copy), copy.by_question) if ours and copy else None
            difference = paired(*both, group=itemgetter(1)) if both else None
            texts.append(difference.text() if difference else "")
        if adapter != "lora" and any(texts):
            rows.append([base, adapter, *texts])
    return Table(
        title,
        ["model", "adapter", *tasks],
        rows,
        [
            "Points, with a 95 % bootstrap interval over the questions, each with all its seeds. It says how sure the "
            "difference is for these trainings; how much trainings differ is the ± of the table above.",
        ],
    )


def _questions(scores: Scores, like: Scores) -> dict[tuple[Seed, int], float]:
    """By the other's seeds: a bare hub model has no seed, and is paired with every one."""
    seeds = dict.fromkeys(seed for seed, _ in like.by_question)
    if {seed for seed, _ in scores.by_question} != {None}:
        return scores.by_question
    return {(seed, index): value for (_, index), value in scores.by_question.items() for seed in seeds}


def _table_6(scores: Mapping[Key, Scores], settings: Settings) -> list[Table]:
    """Published, ours, difference; and the rows that the paper leaves out: the bare models, and training on the target."""
    source, target = _titles(settings)
    sides = {"source": source, "target": target}
    rows = [row for record in published("6") if (row := _side_by_side(record, scores, sides[record.side]))]
    for side, base in sides.items():
        for task in dict.fromkeys(key[4] for key in scores if key[0] == "paper"):
            for adapter in (BARE, *(f"{mode}, retrained" for mode in settings.retrain)):
                if found := _find(scores, base, adapter, task, suite="paper"):
                    rows.append([side, adapter, task, "", _spread(found).text(), ""])
    notes = [
        "Published numbers are single runs; rank and learning rate of the paper's runs on this model are not stated."
    ]
    if settings.limit is not None:
        notes.append(f"Ours: of the first {settings.limit} questions of each task alone.")
    if short := [name for name, task in settings.tasks.items() if task.schedule.max_steps > 0]:
        notes.append(f"Ours: {', '.join(short)} trained for a number of steps in the place of the recipe's epochs.")
    columns = ["side", "adapter", "task", "published", "ours", "difference"]
    return [Table("Table 6 of Revisit Model Adaptation, side by side", columns, rows, notes)] if rows else []


def _side_by_side(record: Published, scores: Mapping[Key, Scores], base: str) -> list[str] | None:
    adapter = {theirs: ours for ours, theirs in ADAPTATION.items()}[record.adaptation]
    task = record.metric.removeprefix("acc_pct/")
    ours = scores.get(("paper", RECIPES.get(task, "commonsense"), base, adapter, task))
    if record.value is None:
        return None
    if ours is None:
        return [record.side, adapter, task, f"{record.value:.2f}", "", ""]
    mean = _spread(ours)
    return [record.side, adapter, task, f"{record.value:.2f}", mean.text(), f"{mean.mean - record.value:+.2f}"]


def _learning_rates(records: Iterable[Mapping[str, Any]], settings: Settings) -> Table:
    rows = []
    trainings = [record for record in records if record["kind"] == "training"]
    edges = [*dict.fromkeys(_at_an_edge(record["settings"], settings) for record in trainings)]
    for record in sorted(trainings, key=lambda record: _order(record["settings"])):
        each = record["settings"]
        where = [each["recipe"], _title(each["base_model"]), each["mode"], str(each["seed"])]
        numbers = [
            f"{each['learning_rate']:g}",
            f"{record['result']['validation_loss']:.4f}",
            f"{record['seconds']:.0f}",
        ]
        rows.append([*where, *numbers])
    columns = ["recipe", "model", "adapter", "seed", "learning rate", "validation loss", "seconds"]
    note = (
        "All trainings. Each mode's learning rate is the one with the lowest validation loss on the source with the first "
        "seed; the other seeds and the models that it is trained on again take it over."
    )
    edge = f"Chosen at an edge of the grid, so a better one may lie beyond: {'; '.join(filter(None, edges))}."
    return Table("Trainings and learning rates", columns, rows, [note, *([edge] if any(edges) else [])])


def _at_an_edge(training: Mapping[str, Any], settings: Settings) -> str:
    """In words, if the rate was chosen (only then another seed has it) and is the smallest or largest of several; or ""."""
    grid = settings.tasks[training["recipe"]].learning_rates
    rate, chosen = training["learning_rate"], training["seed"] != settings.seeds[0]
    outermost = len(grid) > 1 and rate in (min(grid), max(grid))
    return f"{training['recipe']}, {training['mode']} at {rate:g}" if chosen and outermost else ""


def _order(settings: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(settings[key] for key in ("recipe", "mode", "seed", "learning_rate"))


def _lines(scores: Mapping[Key, Scores], settings: Settings) -> list[tuple[str, str]]:
    """The rows: source first, bare first, in the order of the settings."""
    bases = _titles(settings)
    adapters = [BARE, *settings.modes, *(f"{mode}, retrained" for mode in settings.retrain)]
    return [
        (base, adapter) for base in bases for adapter in adapters if any(key[2:4] == (base, adapter) for key in scores)
    ]


def _named(adapter: str, base: str, source: str) -> str:
    """A LoRA that was trained elsewhere is a copy there."""
    return "lora copy" if adapter == "lora" and base != source else adapter


def _find(scores: Mapping[Key, Scores], base: str, adapter: str, task: str, suite: str | None = None) -> Scores | None:
    for key, value in scores.items():
        if key[2:] == (base, adapter, task) and suite in (None, key[0]):
            return value
    return None


def _spread(scores: Scores) -> Spread:
    return spread(list(scores.by_seed.values()))
