"""The language-model part for one seed: a source, its siblings, an adapter per space, and how each fares on each sibling."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import LlamaForCausalLM

from benchmarks.tiny.adapt import Plan, carry, train_adapter
from benchmarks.tiny.choice import moved
from benchmarks.tiny.drifted import DRIFTED, KEPT_BY_STUDENT
from benchmarks.tiny.evaluate import exact_match, held_out_loss, weight_distance
from benchmarks.tiny.pretrain import pretrain
from benchmarks.tiny.progress import Reporter
from benchmarks.tiny.settings import SIBLINGS, SPACES, LmSettings, Placement
from benchmarks.tiny.siblings import EXACT
from benchmarks.tiny.tasks import NEW_TASK, TASKS, Batch, make_batch

Row = dict[str, Any]


def run_lm(settings: LmSettings, seed: int, progress: Reporter) -> dict[str, list[Row]]:
    """All rows of one seed: scores, per-layer choices, and how far each sibling is from the source."""
    source = pretrain(settings, seed, progress)
    siblings = {name: make_sibling(name, source, settings, seed, progress) for name in settings.siblings}
    old_tasks = _draw("".join(TASKS), settings.eval_lines, seed + 4000)
    distances = [
        {
            "seed": seed,
            "sibling": name,
            "old_tasks": exact_match(model, old_tasks),
            "weights_moved": weight_distance(source, model),
        }
        for name, model in {"source": source, **siblings}.items()
    ]
    rows: list[Row] = []
    choices: list[Row] = []
    for placement in settings.placements:
        with TemporaryDirectory() as folder:
            arena = Arena(settings, placement, seed, source, siblings, Path(folder), progress)
            rows += arena.scores()
            choices += arena.choices
    return {"rows": rows, "choices": choices, "siblings": distances}


def tune(settings: LmSettings, seed: int, progress: Reporter) -> dict[str, list[Row]]:
    """Every learning rate of the grid in every space, on the source alone. No sibling is looked at."""
    source = pretrain(settings, seed, progress)
    validation = _draw(NEW_TASK, settings.eval_lines, seed + 6000)
    tried: list[Row] = []
    for placement in settings.placements:
        for space in SPACES:
            for rate in settings.learning_rate_grid:
                with TemporaryDirectory() as folder:
                    plan = {space: target_paths(source, placement)}
                    model = _train(source, plan, placement, settings, seed, Path(folder), progress, {space: rate})
                tried.append(
                    {
                        "part": placement.part,
                        "seed": seed,
                        "space": space,
                        "learning_rate": rate,
                        "loss": held_out_loss(model, validation),
                        "score": exact_match(model, validation),
                    }
                )
    return {"learning_rates": tried}


def chosen_learning_rates(tried: list[Row], part: str) -> dict[str, float]:
    """Per space, the rate with the lowest loss on the source."""
    best = {}
    for space in SPACES:
        candidates = [row for row in tried if row["part"] == part and row["space"] == space]
        best[space] = min(candidates, key=lambda row: row["loss"])["learning_rate"]
    return best


def make_sibling(
    name: str, source: LlamaForCausalLM, settings: LmSettings, seed: int, progress: Reporter
) -> LlamaForCausalLM:
    """The sibling of that name; `source` stays as it is."""
    if name in EXACT:
        return EXACT[name](source, torch.Generator().manual_seed(seed + 3000))
    return DRIFTED[name](source, settings, seed, progress)


def target_paths(model: LlamaForCausalLM, placement: Placement) -> list[str]:
    """The paths of the layers that the placement adapts."""
    return [name for name, _ in model.named_modules() if name.endswith(placement.target_modules)]


class Arena:
    """One placement on one source: trains each adapter once and scores it on every sibling."""

    def __init__(
        self,
        settings: LmSettings,
        placement: Placement,
        seed: int,
        source: LlamaForCausalLM,
        siblings: Mapping[str, LlamaForCausalLM],
        folder: Path,
        progress: Reporter,
    ) -> None:
        self.settings, self.placement, self.seed, self.progress = settings, placement, seed, progress
        self.source, self.siblings, self.folder = source, siblings, folder
        self.paths = target_paths(source, placement)
        self.test = _draw(NEW_TASK, settings.eval_lines, seed + 5000)
        self.calibration = _draw("".join(TASKS), settings.calibration_lines, seed + 7000).tokens
        self.trained: dict[tuple[tuple[str, str], ...], Path] = {}  # per layer its space -> the adapter's folder
        self.choices: list[Row] = []

    def scores(self, *, retrain: bool = True) -> list[Row]:
        """One row per sibling and adapter; without the column that costs most, if `retrain` is False."""
        rows = [self._row("source", "bare", exact_match(self.source, self.test))]
        for adapter, space in {"copy": "lora", "input": "input", "output": "output"}.items():
            rows.append(self._row("source", adapter, self._carried("source", dict.fromkeys(self.paths, space))))
        for name, target in self.siblings.items():
            rows.append(self._row(name, "bare", exact_match(target, self.test)))
            for adapter, space in {"copy": "lora", "input": "input", "output": "output"}.items():
                rows.append(self._row(name, adapter, self._carried(name, dict.fromkeys(self.paths, space))))
            rows.append(self._row(name, "choice", self._carried(name, self._choose(name))))
            if retrain:
                rows.append(self._row(name, "retrained", self._retrained(name)))
        return rows

    def _carried(self, name: str, spaces: Mapping[str, str]) -> float:
        target = self.source if name == "source" else self.siblings[name]
        folder = self._adapter(spaces)
        return exact_match(carry(folder, target, KEPT_BY_STUDENT if name == "student" else None), self.test)

    def _adapter(self, spaces: Mapping[str, str]) -> Path:
        """The folder of the adapter that has each layer in its space, trained on the source the first time it is asked for."""
        key = tuple(sorted(spaces.items()))
        if key not in self.trained:
            folder = self.folder / str(len(self.trained))
            plan = {space: [path for path in self.paths if spaces[path] == space] for space in SPACES}
            plan = {space: paths for space, paths in plan.items() if paths}
            _train(self.source, plan, self.placement, self.settings, self.seed, folder, self.progress)
            self.trained[key] = folder
        return self.trained[key]

    def _choose(self, name: str) -> dict[str, str]:
        """Per layer the space that carries over, from unlabelled lines of the old tasks."""
        kept = KEPT_BY_STUDENT if name == "student" else {index: index for index in range(self.settings.layers)}
        modules = {path: _renumbered(path, kept) for path in self.paths}
        found = moved(
            self.source,
            self.siblings[name],
            {path: theirs for path, theirs in modules.items() if theirs is not None},
            self.calibration,
        )
        spaces = {path: how_far.space(self.settings.clearly, self.settings.rounding) for path, how_far in found.items()}
        for path, how_far in found.items():
            self.choices.append(
                {
                    "part": self.placement.part,
                    "seed": self.seed,
                    "sibling": name,
                    "layer": path,
                    "inputs_moved": how_far.inputs,
                    "outputs_moved": how_far.outputs,
                    "space": spaces[path],
                }
            )
        elsewhere = Counter(spaces.values()).most_common(1)[0][0]  # for a layer that the target does not have
        return {path: spaces.get(path, elsewhere) for path in self.paths}

    def _retrained(self, name: str) -> float:
        target = self.siblings[name]
        plan = {"lora": target_paths(target, self.placement)}
        folder = self.folder / f"retrained-{name}"
        model = _train(
            target, plan, self.placement, self.settings, self.seed, folder, self.progress, where=SIBLINGS[name]
        )
        return exact_match(model, self.test)

    def _row(self, sibling: str, adapter: str, score: float) -> Row:
        return {
            "part": self.placement.part,
            "seed": self.seed,
            "adapter": adapter,
            "sibling": sibling,
            "score": score,
        }


def _train(
    model: LlamaForCausalLM,
    plan: Plan,
    placement: Placement,
    settings: LmSettings,
    seed: int,
    folder: Path,
    progress: Reporter,
    rates: Mapping[str, float] | None = None,
    where: str = "the source",
) -> torch.nn.Module:
    names = {"lora": "LoRA", "input": "input adapter", "output": "output adapter"}
    return train_adapter(
        model,
        plan,
        placement.rank,
        lambda generator: make_batch(NEW_TASK, settings.adapt_batch, generator),
        folder,
        steps=settings.adapt_steps,
        learning_rates=rates or {space: placement.learning_rates[space] for space in plan},
        seed=seed,
        title=f"{' + '.join(names[space] for space in plan)} on {where}",
        progress=progress,
    )


def _renumbered(path: str, kept: Mapping[int, int]) -> str | None:
    before, _, rest = path.partition(".layers.")
    index, _, after = rest.partition(".")
    return f"{before}.layers.{kept[int(index)]}.{after}" if int(index) in kept else None


def _draw(keywords: str, lines: int, seed: int) -> Batch:
    return make_batch(keywords, lines, torch.Generator().manual_seed(seed))
