"""The language-model part of the zoo: one seed's source, siblings and adapters."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from benchmarks.tiny.adapt import adapter_config
from benchmarks.tiny.evaluate import exact_match, held_out_loss
from benchmarks.tiny.pretrain import fit
from benchmarks.tiny.progress import Reporter
from benchmarks.tiny.tasks import Batch
from benchmarks.zoo.carry import put_on
from benchmarks.zoo.settings import LmZoo
from benchmarks.zoo.shelf import Shelf
from benchmarks.zoo.siblings import llama, make_sibling, paths, pretrain
from benchmarks.zoo.tasks import answered_by, answers_count, arguments, new_lines, old_lines
from benchmarks.zoo.world import Arguments
from xadapt.contract import Adapter
from xadapt.data.counting import with_neutral

LAYERS = {"student": -1, "cut": -1, "deeper": +2}  # against the source's


class LmWorld:
    """See `World`. Scores are exact matches of whole answers."""

    part = "lm"

    def __init__(self, settings: LmZoo, seed: int, folder: Path, progress: Reporter) -> None:
        self.settings, self.seed, self.progress = settings, seed, progress
        self.siblings, self.tasks, self.spaces = settings.siblings, settings.tasks, settings.spaces
        self.distil = settings.distil
        made_with = {key: value for key, value in asdict(settings).items() if key not in _LATER}
        self.shelf = Shelf(folder / f"lm-seed{seed}", made_with)
        self.tuning_shelf = Shelf(folder / "lm-tuning", made_with)
        self.test = {
            task: new_lines(task, settings.test_lines, _generator(seed + 5000), scored=True) for task in self.tasks
        }
        self.old = old_lines(settings.old_lines, _generator(seed + 4000))
        # A world lives as long as its run, and so may what it has made.
        self.source = cache(self._source)
        self.sibling = cache(self._sibling)
        self.adapter = cache(self._adapter)
        self.calibration = cache(self._calibration)
        self.unlabelled = cache(self._unlabelled)

    def _source(self) -> LlamaForCausalLM:
        tiny = self.settings.tiny
        return _frozen(
            self.shelf.model("source", lambda: llama(tiny), lambda: pretrain(self.settings, self.seed, self.progress))
        )

    def _sibling(self, name: str) -> LlamaForCausalLM:
        settings = self.settings
        return _frozen(
            self.shelf.model(
                f"sibling-{name}",
                lambda: llama(
                    settings.tiny,
                    hidden=settings.hidden.get(name),
                    layers=settings.tiny.layers + LAYERS.get(name, 0),
                ),
                lambda: make_sibling(
                    name, copy.deepcopy(self.source()).requires_grad_(True), settings, self.seed, self.progress
                ),
            )
        )

    def _adapter(self, task: str, space: str) -> Adapter:
        return self.shelf.adapter(
            f"adapter-{task}-{space}",
            lambda: self._train(self.source(), task, space, f"{task}, {space}, on the source"),
        )

    def retrained(self, sibling: str, task: str) -> nn.Module:
        target, steps = self.sibling(sibling), self.settings.retrain_steps
        adapter = self.shelf.adapter(
            f"retrained-{sibling}-{task}",
            lambda: self._train(target, task, "lora", f"{task}, LoRA, on {sibling}", steps=steps),
        )
        return put_on(target, adapter)

    def _calibration(self, task: str, space: str, much: bool = False) -> Sequence[Arguments]:
        """The task's lines, more of them for methods that train, and old ones, on which nothing is judged."""
        settings = self.settings
        old = old_lines(settings.calibration_lines, _generator(self.seed + 7000)).tokens
        lines = settings.distil_lines if much else settings.calibration_lines
        new = self._answered(task, space, lines, self.seed + 7000)
        return with_neutral(
            [answers_count(part) for part in new.split(32)], [arguments(part) for part in old.split(32)]
        )

    def _unlabelled(self, task: str, space: str) -> list[Arguments]:
        return [answers_count(self._answered(task, space, self.settings.trust_lines, self.seed + 8000))]

    def score(self, model: nn.Module, sibling: str, task: str) -> float:
        return exact_match(model, self.test[task])

    def kept(self, model: nn.Module, sibling: str) -> float:
        return exact_match(model, self.old)

    def learning_rates(self) -> dict[str, float]:
        """Per space the rate with the lowest mean loss over the tasks, on a source that is used for nothing else."""
        chosen: dict[str, float] = {}
        for space in self.spaces:
            tried = [row for row in self.tried() if row["space"] == space]
            losses = {
                rate: sum(row["loss"] for row in tried if row["learning_rate"] == rate)
                for rate in self.settings.learning_rate_grid
            }
            chosen[space] = min(losses, key=lambda rate: losses[rate])
        return chosen

    def tried(self) -> list[dict[str, Any]]:
        """Every learning rate of the grid, for every task and space."""
        rows: list[dict[str, Any]] = self.tuning_shelf.facts(_RATES, self._tune)
        return rows

    def is_tuned(self) -> bool:
        """Whether that has been done."""
        return self.tuning_shelf.has(_RATES)

    def _tune(self) -> list[dict[str, Any]]:
        settings = self.settings
        source = _frozen(pretrain(settings, settings.tuning_seed, self.progress))
        rows = []
        for task in self.tasks:
            validation = new_lines(task, settings.score_lines, _generator(settings.tuning_seed + 6000))
            for space in self.spaces:
                for rate in settings.learning_rate_grid:
                    model = self._train(source, task, space, f"{task}, {space}, learning rate {rate:g}", rate)
                    loss, score = held_out_loss(model, validation), exact_match(model, validation)
                    rows.append({"task": task, "space": space, "learning_rate": rate, "loss": loss, "score": score})
        return rows

    def _train(
        self,
        base: LlamaForCausalLM,
        task: str,
        space: str,
        title: str,
        rate: float | None = None,
        steps: int | None = None,
    ) -> PeftModel:
        settings = self.settings
        torch.manual_seed(self.seed + 2000)
        config = adapter_config(space, settings.rank, paths(base, settings.target_modules))
        model = get_peft_model(copy.deepcopy(base), config)
        fit(
            model,
            lambda generator: new_lines(task, settings.adapt_batch, generator),
            steps=steps or settings.adapt_steps,
            learning_rate=rate or self.learning_rates()[space],
            seed=self.seed + 2000,
            title=title,
            progress=self.progress,
        )
        return model

    def _answered(self, task: str, space: str, lines: int, seed: int) -> Tensor:
        asked: Batch = new_lines(task, lines, _generator(seed))
        return answered_by(put_on(self.source(), self.adapter(task, space)), asked.tokens)


_RATES = "learning-rates"
_LATER = ("siblings", "test_lines", "old_lines", "calibration_lines", "distil_lines", "distil", "trust_lines")
"""Settings that change nothing that is trained."""


def _frozen(model: LlamaForCausalLM) -> LlamaForCausalLM:
    return model.requires_grad_(False).eval()


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
